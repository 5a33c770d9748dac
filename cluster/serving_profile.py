"""What a running cluster adds to the steps of its engines, as a client sees it.

One prefill and one decode worker are served as a child, asked one request after another over HTTP, and what the fit
says of the engine's part is taken off. One after another, because what requests do to each other is what a study
simulates; the client is a process of its own, as clients are.
"""

from __future__ import annotations

import os
import random
import resource
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import httpx

from cluster.child_cluster import child_cluster
from contracts.config import GatewayConfig
from contracts.errors import WorkerUnavailable
from contracts.latency import StepWork
from contracts.profile import ServingOverheads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from contracts.clock import Clock
    from contracts.config import ClusterConfig, PoolConfig
    from contracts.messages import Role
    from contracts.profile import LatencyProfile

#: Of each answer.
OUTPUT_TOKENS = 64

#: Prompts, as parts of the largest chunk: each is read in one step.
_PROMPT_DIVISORS = (32, 4, 1)

#: How often every prompt length is asked; and before that, once each to warm up.
ROUNDS = 8

_WIDTHS = (11, 10, 14, 10, 11, 10)

#: The longest silence of an answer.
_READ_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """One request as its client saw it; it met no other."""

    prompt_tokens: int
    ttft_s: float
    #: From each token to the next; at least two.
    gaps_s: tuple[float, ...]


def cluster_to_measure(config: ClusterConfig, model_dir: Path, threads: int) -> ClusterConfig:
    """One prefill and one decode worker of `threads` threads, as the pools of `config` would start them; where
    workers are mixed, two of them in these roles."""
    return config.model_copy(
        update={
            "model": str(model_dir),
            # On a free port of the loopback; and the keys are not written anywhere.
            "gateway": GatewayConfig(port=0),
            "pools": tuple(_pool_of(config, role, threads) for role in ("prefill", "decode")),
            "log_dir": None,
        }
    )


def _pool_of(config: ClusterConfig, role: Role, threads: int) -> PoolConfig:
    pool = next(pool for pool in config.pools if pool.role in (role, "mixed"))
    changes = {"name": role, "role": role, "workers": 1, "threads": threads}
    # A step may be as large as those that were fitted.
    return pool.model_copy(update={**changes, "max_batch_tokens": None, "max_sequences": None})


async def measure_answers(
    config: ClusterConfig,
    *,
    max_chunk_tokens: int,
    vocab_size: int,
    clock: Clock,
    progress: Callable[[int, int], None],
) -> list[ServedAnswer]:
    """Starts `config` as a child and stops it. `progress(answers so far, answers in all)`.

    Raises WorkerUnavailable when the cluster does not start or does not answer as asked.
    """
    lengths = [max_chunk_tokens // divisor for divisor in _PROMPT_DIVISORS]
    rng = random.Random(0)
    answers: list[ServedAnswer] = []
    async with (
        child_cluster(config) as state,
        httpx.AsyncClient(base_url=state.base_url, timeout=_READ_TIMEOUT_S) as client,
    ):
        total = len(lengths) * (ROUNDS + 1)
        for number in range(total):
            prompt = [rng.randrange(vocab_size) for _ in range(lengths[number % len(lengths)])]
            answers.append(await _ask(client, state.model_name, prompt, clock))
            progress(number + 1, total)
    # The first of a process also pay for what is made once.
    return answers[len(lengths) :]


async def _ask(client: httpx.AsyncClient, model: str, prompt: list[int], clock: Clock) -> ServedAnswer:
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    stamps_s = [clock.now_s()]
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                # The gateway sends one line for each token, also where its text is held back.
                if line.startswith("data: {") and not line.startswith('data: {"error"'):
                    stamps_s.append(clock.now_s())
    except httpx.HTTPError as error:
        raise WorkerUnavailable(f"the measured cluster did not answer: {type(error).__name__}: {error}") from error
    if len(stamps_s) != OUTPUT_TOKENS + 1:
        raise WorkerUnavailable(
            f"the measured cluster answered a prompt of {len(prompt)} tokens with HTTP {response.status_code} and "
            f"{len(stamps_s) - 1} of {OUTPUT_TOKENS} tokens"
        )
    first_s, *gaps_s = (after - before for before, after in pairwise(stamps_s))
    return ServedAnswer(len(prompt), first_s, tuple(gaps_s))


def overheads(answers: Sequence[ServedAnswer], profile: LatencyProfile) -> ServingOverheads:
    """What the answers took beyond the steps and the link of `profile`; 0 where they were faster than these."""
    shortest = min(answer.prompt_tokens for answer in answers)
    # A fit's error grows with the prompt, what a cluster adds to its first token hardly does.
    first_tokens_s = [
        answer.ttft_s - _prefill_s(answer, profile) for answer in answers if answer.prompt_tokens == shortest
    ]
    steps_s: list[float] = []
    handoffs_s: list[float] = []
    for answer in answers:
        second_gap_s, *gaps_s = answer.gaps_s
        second_step_s, *later_steps_s = _decode_steps_s(answer, profile)
        # Means over an answer: two tokens may reach the client together, and the next then seems late.
        steps_s.append(fmean(gaps_s) - fmean(later_steps_s))
        handoffs_s.append(second_gap_s - second_step_s - _link_s(answer, profile))
    return ServingOverheads(
        first_token_s=_typical(first_tokens_s), step_s=_typical(steps_s), handoff_s=_typical(handoffs_s)
    )


def _typical(values_s: Sequence[float]) -> float:
    """The median, where a fit believes the lower quartile of its steps: what differs from one answer to the next is
    also whether the kernel puts gateway and client beside the worker, and that belongs to the cluster."""
    return max(0.0, median(values_s))


def _prefill_s(answer: ServedAnswer, profile: LatencyProfile) -> float:
    tokens = answer.prompt_tokens
    return profile.latency.step_s(StepWork(tokens, tokens * (tokens + 1) / 2, 1))


def _decode_steps_s(answer: ServedAnswer, profile: LatencyProfile) -> Iterator[float]:
    base_s, per_context_token_s = profile.latency.decode_terms(1)
    return (base_s + per_context_token_s * (answer.prompt_tokens + 1 + number) for number in range(len(answer.gaps_s)))


def _link_s(answer: ServedAnswer, profile: LatencyProfile) -> float:
    """What a study takes for the prompt's bytes on the link, without the link's latency."""
    if profile.transfer is None:
        return 0.0
    num_blocks = -(-answer.prompt_tokens // profile.block_tokens)
    num_bytes = num_blocks * profile.block_tokens * profile.kv_token_bytes
    return profile.transfer.transfer_s(num_bytes, 1) - profile.transfer.latency_s


def others_cpu_s() -> float:
    """Processor time on this machine so far that neither this process nor its ended children used; 0 where no kernel
    tells."""
    file = Path("/proc/stat")
    if not file.exists():
        return 0.0
    _, user, nice, system, _, _, irq, softirq, steal, *_ = file.read_text(encoding="ascii").split(maxsplit=10)
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return ticks / os.sysconf("SC_CLK_TCK") - sum(usage.ru_utime + usage.ru_stime for usage in own)


def report_lines(answers: Sequence[ServedAnswer], profile: LatencyProfile, found: ServingOverheads) -> Iterator[str]:
    """For people: medians by length of the prompt, each beside what `profile` and `found` say of it."""
    headings = ("TTFT ms", "modelled", "2nd token ms", "modelled", "token ms", "modelled")
    yield f"{'prompt':>7}{''.join(f'{heading:>{width}}' for heading, width in zip(headings, _WIDTHS, strict=True))}"
    for prompt_tokens in sorted({answer.prompt_tokens for answer in answers}):
        alike = [answer for answer in answers if answer.prompt_tokens == prompt_tokens]
        second_step_s, *steps_s = _decode_steps_s(alike[0], profile)
        columns_s = (
            median(answer.ttft_s for answer in alike),
            _prefill_s(alike[0], profile) + found.first_token_s,
            median(answer.gaps_s[0] for answer in alike),
            second_step_s + _link_s(alike[0], profile) + found.handoff_s,
            median(fmean(answer.gaps_s[1:]) for answer in alike),
            fmean(steps_s) + found.step_s,
        )
        cells = (f"{seconds * 1e3:>{width}.2f}" for seconds, width in zip(columns_s, _WIDTHS, strict=True))
        yield f"{prompt_tokens:>7}{''.join(cells)}"
    for name, seconds in (
        ("first token", found.first_token_s),
        ("second token", found.handoff_s),
        ("later token", found.step_s),
    ):
        nothing = "; the answers were not slower than the fitted steps alone" if not seconds else ""
        yield f"serving adds to a {name}: {seconds * 1e3:.3f} ms{nothing}"
