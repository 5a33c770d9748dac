"""Requests of a study: when they come, for which model, how long they are."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.coldstart.spec import lengths_of
from workload.arrivals import Gamma

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator.coldstart.spec import ModelSpec, StudySpec


@dataclass(slots=True)
class Request:
    number: int
    model: str
    arrived_s: float
    prompt_tokens: int
    output_tokens: int
    #: First time its model was ready for it.
    begun_s: float | None = None
    finished_s: float | None = None
    #: Standing still after that, all together.
    paused_s: float = 0.0
    num_moves: int = 0
    num_preemptions: int = 0
    #: Of its answer.
    written_tokens: float = 0.0
    stopped_s: float | None = None

    @property
    def start_up_s(self) -> float:
        """From arrival until its model was loaded, and what it waited for that again."""
        assert self.begun_s is not None
        return self.begun_s - self.arrived_s + self.paused_s


def model_names(spec: StudySpec) -> dict[str, ModelSpec]:
    return {f"{kind}-{number:02}": model for kind, (count, model) in spec.models.items() for number in range(count)}


def requests(spec: StudySpec) -> list[Request]:
    """In order of arrival. Equal seeds give equal requests, whatever places them."""
    load = spec.load
    rng = random.Random(f"coldstart {load.seed}")
    names = list(model_names(spec))
    rng.shuffle(names)
    weights = [rank**-load.zipf for rank in range(1, len(names) + 1)]
    prompts, outputs = lengths_of(load.lengths)
    total = sum(weights)
    streams = [
        _stream(name, load.rate_rps * weight / total, load.cv, random.Random(rng.random()))
        for name, weight in zip(names, weights, strict=True)
    ]
    return [
        Request(number, model, at_s, prompts.sample(rng), outputs.sample(rng))
        for number, (at_s, model) in enumerate(itertools.islice(heapq.merge(*streams), load.num_requests))
    ]


def _stream(model: str, rate_rps: float, cv: float, rng: random.Random) -> Iterator[tuple[float, str]]:
    """Gamma gaps from the middle of some gap on: were the first one like the others, all models would begin with a
    burst."""
    shape = cv**-2
    # The gap that a moment falls into is the longer for being longer: its law is the same with a shape larger by one.
    first_s = rng.random() * rng.gammavariate(shape + 1.0, 1.0 / (rate_rps * shape))
    yield first_s, model
    for at_s in Gamma(rate_rps, cv).times(rng):
        yield first_s + at_s, model
