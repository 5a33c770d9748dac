"""Studies whose coordinator keeps a decision log, as the live one does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from coordinator.conductor import Conductor
from coordinator.decision_log import DecisionLog
from coordinator.decision_records import Surroundings
from simulator.heap.study import simulate

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.messages import DispatchItem
    from coordinator.decision import Chosen, Refused
    from coordinator.directory.directory import Match
    from coordinator.policy.fleet_view import Flags
    from simulator.heap.results import StudyResult
    from simulator.heap.spec import StudySpec
    from workload.request import WorkloadRequest

STARTED_AT = 1_700_000_000.0


def simulate_logged(
    spec: StudySpec, requests: Iterable[WorkloadRequest], *, starts_s: float = 0.0
) -> tuple[StudyResult, bytes]:
    """A study, and the log of its decisions from `starts_s` on."""
    lines: list[bytes] = []

    class Logged(Conductor):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self._log = DecisionLog(
                self,
                given["costs"],
                settings=given["settings"],
                slos=given["slos"],
                default_slo=given["default_slo"],
                surroundings=Surroundings(
                    heartbeat_interval_s=spec.heartbeat_interval_s,
                    max_sequences={group.role: group.budget.max_sequences for group in spec.groups},
                ),
                version="test",
                started_at=STARTED_AT,
                started_s=0.0,
            )

        def decide(
            self, item: DispatchItem, now_s: float, usable: Flags | None = None, match: Match | None = None
        ) -> Chosen | Refused:
            decision = super().decide(item, now_s, usable, match)
            if now_s >= starts_s:
                if not lines:
                    lines.append(self._log.opening(now_s))
                lines.append(self._log.decided(item, decision, now_s))
            return decision

    with patch("simulator.heap.coordinator.Conductor", Logged):
        result = simulate(spec, requests)
    return result, b"".join(lines)
