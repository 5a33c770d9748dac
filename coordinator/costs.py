"""What placing a request would cost where: the models that predictions rest on, by worker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from contracts.latency import LatencyModel, TransferModel
    from contracts.messages import LatencyFit, WorkerInfo
    from coordinator.policy.pair_links import PairLinks


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCosts:
    """Of one kind of worker; kinds are told apart by identity."""

    latency: LatencyModel
    #: Token budget of one of its steps.
    max_batch_tokens: int
    #: Spent between two steps outside the engine.
    between_steps_s: float = 0.0
    #: Of the KV that it holds; 0: as the source says of all.
    kv_token_bytes: int = 0


class CostSource(Protocol):
    """Where a coordinator learns what its workers cost."""

    @property
    def transfer(self) -> TransferModel:
        """Between two workers."""
        ...

    @property
    def pairs(self) -> PairLinks | None:
        """Pairs of workers whose transfers take notably more or less time. None: none is known."""
        ...

    @property
    def kv_token_bytes(self) -> int: ...

    def of(self, info: WorkerInfo) -> WorkerCosts | None:
        """None: nothing is known (yet) of what its steps cost. The answer changes only after `observe`."""
        ...

    def observe(self, info: WorkerInfo, fit: LatencyFit) -> bool:
        """A worker tells what its steps took lately. True: `of` answers differently now for this worker."""
        ...


def costs_of(info: WorkerInfo, source: CostSource) -> WorkerCosts | None:
    """What a member's steps cost; None where nothing is known, and of a store, which takes none."""
    return None if info.role == "store" else source.of(info)
