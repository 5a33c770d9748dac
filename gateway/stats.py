"""What the core counts; `gateway.metrics` shows it."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

#: Upper bounds in seconds: a stream that closes is noticed at once, a hang after 3 s, a restart takes 1 to 8 s.
RESUME_BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 20.0, 30.0)
#: A move costs a step or two of a few ms to 100 ms; one whose tokens have to be written again, up to the gap timer.
MOVE_GAP_BOUNDS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)


@dataclass(slots=True)
class Durations:
    """Counts of durations by upper bound; the last count is of those beyond all bounds."""

    bounds_s: tuple[float, ...]
    counts: list[int] = field(init=False)
    sum_s: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds_s) + 1)

    def add(self, duration_s: float) -> None:
        self.counts[bisect_left(self.bounds_s, duration_s)] += 1
        self.sum_s += duration_s


@dataclass(slots=True)
class CoreStats:
    """Counters over the life of the gateway."""

    #: By reason: deltas that reached no client (duplicates, forgotten requests, other attempts, …).
    dropped_deltas: dict[str, int] = field(default_factory=dict[str, int])
    lost_streams: int = 0
    num_frames: int = 0
    #: By reason (an error's code): requests taken up again.
    replays: dict[str, int] = field(default_factory=dict[str, int])
    #: From a failure to the first token after it, of requests that were taken up again.
    resumed: Durations = field(default_factory=lambda: Durations(RESUME_BOUNDS_S))
    #: Requests that were taken up again and failed all the same.
    failed_after_replays: int = 0
    #: By what became of them (labels of `gateway.claims.Outcome`): claims of workers on requests.
    claims: dict[str, int] = field(default_factory=dict[str, int])
    #: Between the last token before a grant and the first after it.
    move_gaps: Durations = field(default_factory=lambda: Durations(MOVE_GAP_BOUNDS_S))
    #: Placements by who made them: "coordinator", or "snapshot" while none answered.
    placements: dict[str, int] = field(default_factory=dict[str, int])
    coordinator_outages: int = 0

    def drop(self, reason: str, count: int = 1) -> None:
        self.dropped_deltas[reason] = self.dropped_deltas.get(reason, 0) + count

    def claim(self, outcome: str) -> None:
        self.claims[outcome] = self.claims.get(outcome, 0) + 1

    def placed(self, by: str) -> None:
        self.placements[by] = self.placements.get(by, 0) + 1

    def replay(self, reason: str) -> None:
        self.replays[reason] = self.replays.get(reason, 0) + 1
