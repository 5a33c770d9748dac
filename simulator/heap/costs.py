"""What the coordinator of a study knows of its workers' costs: exactly what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.costs import WorkerCosts

if TYPE_CHECKING:
    from contracts.latency import TransferModel
    from contracts.messages import LatencyFit, WorkerInfo
    from simulator.heap.spec import StudySpec, WorkerGroup


class StudyCosts:
    """Implements `coordinator.costs.CostSource`: as after a profile that fits. Groups that cost the same are of one
    kind."""

    def __init__(self, spec: StudySpec) -> None:
        self._transfer = spec.transfer
        self._kv_token_bytes = spec.kv_token_bytes
        kinds: dict[tuple[int, int], WorkerCosts] = {}
        self._by_group = {group.name: kinds.setdefault(_kind(group), _costs(group, spec)) for group in spec.groups}

    @property
    def transfer(self) -> TransferModel:
        return self._transfer

    @property
    def pairs(self) -> None:
        """All ways are alike."""

    @property
    def kv_token_bytes(self) -> int:
        return self._kv_token_bytes

    def of(self, info: WorkerInfo) -> WorkerCosts | None:
        return self._by_group[info.worker_id.rpartition("-")[0]]

    def observe(self, info: WorkerInfo, fit: LatencyFit) -> bool:
        del info, fit
        return False


def _kind(group: WorkerGroup) -> tuple[int, int]:
    return id(group.latency), group.budget.max_tokens


def _costs(group: WorkerGroup, spec: StudySpec) -> WorkerCosts:
    return WorkerCosts(
        latency=group.latency, max_batch_tokens=group.budget.max_tokens, between_steps_s=spec.between_steps_s
    )
