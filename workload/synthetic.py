"""Synthetic workloads: arrivals, lengths, shared prefixes and SLO classes put together, drawn from one seed."""

from __future__ import annotations

import random
from itertools import count, repeat
from typing import TYPE_CHECKING

from workload.checks import require_positive
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from workload.arrivals import Arrivals
    from workload.lengths import Lengths
    from workload.prefixes import SharedPrefixes


def synthetic(
    *,
    arrivals: Arrivals,
    prompts: Lengths,
    outputs: Lengths,
    seed: int,
    num_requests: int | None = None,
    duration_s: float | None = None,
    prefixes: SharedPrefixes | None = None,
    slo_mix: Mapping[str, float] | None = None,
) -> Iterator[WorkloadRequest]:
    """Requests by arrival, as many as come within both bounds; at least one bound must be given.

    With `prefixes`, `prompts` are the new tokens of each turn (see `SharedPrefixes`). `slo_mix` weighs SLO classes by
    name; None: all are "default". Nothing but open conversations is held in memory.

    Arrivals, lengths, conversations and classes draw from generators of their own, so that a study at another
    rate asks for the same prompts and answers. Raises ValueError for bounds or weights that cannot be.
    """
    if num_requests is None and duration_s is None:
        raise ValueError("a synthetic workload needs num_requests or duration_s")
    if num_requests is not None:
        require_positive(num_requests=num_requests)
    if duration_s is not None:
        require_positive(duration_s=duration_s)
    times = _bounded(arrivals.times(generator(seed, "arrivals")), num_requests, duration_s)
    classes = slo_classes(slo_mix or {"default": 1.0}, generator(seed, "slo_classes"))
    if prefixes is None:
        return _independent(times, prompts, outputs, classes, generator(seed, "lengths"))
    return prefixes.requests(
        times, prompts, outputs, classes, generator(seed, "lengths"), generator(seed, "conversations")
    )


def generator(seed: int, purpose: str) -> random.Random:
    """Unrelated to those of other purposes: what one of them draws does not move what another does."""
    return random.Random(f"{seed}/{purpose}")


def _independent(
    times: Iterator[float], prompts: Lengths, outputs: Lengths, classes: Iterator[str], rng: random.Random
) -> Iterator[WorkloadRequest]:
    for arrival_s, slo_class in zip(times, classes, strict=False):
        prompt_tokens = prompts.sample(rng)
        yield WorkloadRequest(arrival_s, prompt_tokens, outputs.sample(rng), slo_class=slo_class)


def _bounded(times: Iterator[float], num_requests: int | None, duration_s: float | None) -> Iterator[float]:
    """Times before `duration_s`, at most `num_requests` of them."""
    for _ in count() if num_requests is None else range(num_requests):
        arrival_s = next(times)
        if duration_s is not None and arrival_s >= duration_s:
            return
        yield arrival_s


def slo_classes(mix: Mapping[str, float], rng: random.Random) -> Iterator[str]:
    """Names without end, as often as the weights of `mix` say. Raises ValueError for weights that are not above 0."""
    require_positive(**mix)
    if len(mix) == 1:
        return repeat(next(iter(mix)))
    names = sorted(mix)
    weights = [mix[name] for name in names]
    return (rng.choices(names, weights)[0] for _ in count())
