"""What a coordinator counts of itself, for metrics."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from contracts.messages import CoordinatorFigures

if TYPE_CHECKING:
    from coordinator.autoscaler import Autoscaler
    from coordinator.conductor import Conductor
    from coordinator.directory.sync import DirectorySync

#: Upper ends of the classes of time that a decision takes.
DECISION_BOUNDS_S = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1, math.inf)


@dataclass(slots=True)
class ReplanFigures:
    """Counts since the start."""

    shifts_total: int = 0
    proposals_total: int = 0
    #: The split that was proposed last.
    proposed: str = ""


class RebalanceFigures:
    """Counts since the start, of requests by purpose."""

    def __init__(self) -> None:
        self.asked_total: Counter[str] = Counter()
        self.begun_total: Counter[str] = Counter()
        #: Not begun by a source that answered; asked of a source that did not answer.
        self.refused_total: Counter[str] = Counter()
        self.failed_total: Counter[str] = Counter()
        #: Workers that should have given something away and did not, at each look, by why.
        self.withheld_total: Counter[str] = Counter()


class ShellFigures:
    """Counts since the start."""

    def __init__(self) -> None:
        #: By "placement" or the word for a refusal's reason.
        self.verdicts_total: dict[str, int] = {}
        self._decisions = [0] * len(DECISION_BOUNDS_S)
        self._decisions_s = 0.0
        #: None: nobody compares the workload with a plan.
        self.replanning: ReplanFigures | None = None
        #: None: nobody moves requests.
        self.rebalancing: RebalanceFigures | None = None
        #: None: no pool follows the load.
        self.scaler: Autoscaler | None = None

    def count(self, outcome: str, took_s: float) -> None:
        """One decision, words included."""
        self.verdicts_total[outcome] = self.verdicts_total.get(outcome, 0) + 1
        self._decisions[bisect_left(DECISION_BOUNDS_S, took_s)] += 1
        self._decisions_s += took_s

    def message(self, conductor: Conductor, sync: DirectorySync) -> CoordinatorFigures:
        replanning, directory = self.replanning or ReplanFigures(), conductor.directory
        moves = self.rebalancing or RebalanceFigures()
        return CoordinatorFigures(
            verdicts_total=dict(self.verdicts_total),
            decision_bounds_s=DECISION_BOUNDS_S,
            decisions_within=tuple(accumulate(self._decisions)),
            decisions_s=self._decisions_s,
            directory_blocks=directory.num_blocks,
            directory_dropped=directory.num_dropped,
            directory_bytes=directory.num_bytes,
            block_events_total=sync.events_total,
            block_gaps_total=sync.gaps_total,
            block_snapshots_total=sync.snapshots_total,
            workload_shifts_total=replanning.shifts_total,
            splits_proposed_total=replanning.proposals_total,
            proposed_split=replanning.proposed,
            ttft_margins=conductor.margins.shares(),
            moves_asked_total=dict(moves.asked_total),
            moves_begun_total=dict(moves.begun_total),
            moves_refused_total=dict(moves.refused_total),
            moves_failed_total=dict(moves.failed_total),
            moves_withheld_total=dict(moves.withheld_total),
            pools=() if self.scaler is None else self.scaler.figures,
        )
