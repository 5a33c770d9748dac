"""The conductor alone, in one process and on one core: how long its decisions take, and what a block costs it."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import numpy as np
import psutil

from benchmarks.dispatch_traffic import BLOCK_TOKENS, Traffic, fit, load, worker_infos
from coordinator.conductor import Conductor, ConductorSettings
from coordinator.decision import Refused
from coordinator.directory.directory import Directory
from coordinator.live_costs import LiveCosts
from workload.slo import SloClass

#: Wide enough that nearly all are placed, so that whole decisions are measured and not quick refusals.
SLOS = {"interactive": SloClass("interactive", 20_000.0, 100.0), "batch": SloClass("batch", 300_000.0, 1000.0)}
HEARTBEAT_INTERVAL_S = 0.5

#: Tell of a prefix cache that fills: hints that become known together.
_STORED_TOGETHER = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    num_workers: int
    #: Requests that are looked up in the directory together.
    batch: int
    #: Each decision with its part of that, without words.
    took_s: list[float]
    #: Means of the words for a decision, and of a heartbeat.
    words_s: float
    beat_s: float
    num_refused: int

    @property
    def per_s(self) -> float:
        """What one core decides beside the heartbeats of all workers."""
        left_s = 1.0 - self.num_workers / HEARTBEAT_INTERVAL_S * self.beat_s
        return left_s / self.mean_s

    @property
    def mean_s(self) -> float:
        return sum(self.took_s) / len(self.took_s)

    def quantile_s(self, share: float) -> float:
        return sorted(self.took_s)[int(share * (len(self.took_s) - 1))]


class _Beats:
    """Workers that report every half second, at different times."""

    def __init__(self, conductor: Conductor, num_workers: int, seed: int) -> None:
        self._conductor = conductor
        rng = np.random.default_rng(seed)
        self._infos = worker_infos(num_workers)
        #: Made before: drawing figures is no part of what is measured.
        self._loads = [load(rng) for _ in range(4 * num_workers)]
        self._fits = [fit(rng) for _ in range(4 * num_workers)]
        self._next = 0
        for info in self._infos:
            conductor.add(info, 0.0)
            self._beat(0.0)
        self._took_s = 0.0

    @property
    def mean_s(self) -> float:
        return self._took_s / max(1, self._next - len(self._infos))

    def until(self, now_s: float) -> None:
        started_s = time.thread_time()
        while self._next < (1 + now_s / HEARTBEAT_INTERVAL_S) * len(self._infos):
            self._beat(now_s)
        self._took_s += time.thread_time() - started_s

    def _beat(self, now_s: float) -> None:
        info = self._infos[self._next % len(self._infos)]
        which = self._next % len(self._loads)
        self._conductor.report(info.worker_id, self._loads[which], now_s, self._fits[which])
        self._next += 1


def decide(
    num_workers: int, num_blocks: int, num_items: int, rate_per_s: float, *, batch: int = 1, seed: int = 1
) -> Decided:
    """Decisions over a fleet of `num_workers` and a directory of about `num_blocks`, at virtual `rate_per_s`.

    `batch`: so many come together, as in one call of a gateway; 1: each is looked up by itself."""
    conductor = Conductor(
        costs=LiveCosts(),
        slos=SLOS,
        default_slo=None,
        settings=ConductorSettings(block_tokens=BLOCK_TOKENS),
        rng=random.Random(seed),
    )
    beats = _Beats(conductor, num_workers, seed)
    traffic = Traffic(num_blocks, seed)
    infos = worker_infos(num_workers)
    for worker, hints in traffic.held_by(num_workers):
        conductor.directory.store(conductor.number_of(infos[worker].worker_id), hints)
    while conductor.directory.sweep(1_000_000):
        pass
    items = traffic.items(num_items, ("interactive", "batch", ""))
    took_s: list[float] = []
    words_s = 0.0
    num_refused = 0
    for first in range(0, num_items, batch):
        together = items[first : first + batch]
        now_s = first / rate_per_s
        beats.until(now_s)
        before_s = time.thread_time()
        matches = conductor.matches(together)
        matched_s = (time.thread_time() - before_s) / len(together)
        for item, match in zip(together, matches, strict=True):
            before_s = time.thread_time()
            decision = conductor.decide(item, now_s, match=match)
            after_s = time.thread_time()
            took_s.append(after_s - before_s + matched_s)
            conductor.in_words(item, decision, now_s)
            words_s += time.thread_time() - after_s
            num_refused += isinstance(decision, Refused)
    return Decided(
        num_workers=num_workers,
        batch=batch,
        took_s=took_s,
        words_s=words_s / num_items,
        beat_s=beats.mean_s,
        num_refused=num_refused,
    )


def bytes_per_block(num_blocks: int, num_workers: int, seed: int = 1) -> float:
    """Memory that the process gained for each block of a directory that fills to `num_blocks`."""
    rng = np.random.default_rng(seed)
    process = psutil.Process()
    directory = Directory(2 * num_blocks)
    for number in range(num_workers):
        directory.add_worker(number)
    before = process.memory_info().rss
    number = 0
    while directory.num_blocks < num_blocks:
        hints = rng.integers(1, 2**64, size=_STORED_TOGETHER, dtype=np.uint64)
        directory.store(number % num_workers, hints)
        # Some prefixes stand at several workers.
        for more in range(int(rng.choice([0, 0, 0, 1, 2]))):
            directory.store((number + 7 * (more + 1)) % num_workers, hints[: int(rng.integers(1, len(hints)))])
        number += 1
    return (process.memory_info().rss - before) / directory.num_blocks
