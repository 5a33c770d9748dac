"""What failures of workers mean for one request. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.errors import (
    ERROR_BY_CODE,
    BadRequest,
    Cancelled,
    Internal,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    WorkerUnavailable,
)

if TYPE_CHECKING:
    from contracts.ids import WorkerId
    from contracts.messages import Placement
    from contracts.requests import TokenDelta


def may_hold_it(error: TandemError) -> bool:
    """Whether a worker that answered Prefill so (or not at all) may have started the request."""
    return not isinstance(error, NoCapacity | BadRequest | StaleIncarnation | NotReady)


def worker_error(delta: TokenDelta, worker_id: WorkerId) -> TandemError:
    """What a delta that ends with "error" says."""
    info = delta.error
    if info is None:
        return Internal(f"worker {worker_id} failed without saying why")
    kind = ERROR_BY_CODE.get(info.code, Internal)
    # Here Cancelled says that the client is gone; a worker that gave up is another matter.
    return WorkerUnavailable(info.message) if kind is Cancelled else kind(info.message)


def owner_ids(placement: Placement) -> tuple[WorkerId, ...]:
    """Both sides, each once."""
    return tuple(dict.fromkeys((placement.prefill.worker_id, placement.decode.worker_id)))
