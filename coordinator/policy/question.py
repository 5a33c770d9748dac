"""What one decision is about, and who may take the request at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from contracts.errors import ContextLengthExceeded, NoCapacity, NotReady
from coordinator.decision import Refused

if TYPE_CHECKING:
    from random import Random

    import numpy as np
    from numpy.typing import NDArray

    from contracts.messages import DispatchItem
    from coordinator.policy.fleet_view import Flags, FleetView
    from coordinator.policy.settings import DispatchLimits

    HeldBlocks = NDArray[np.int32]

#: What a refused client is told while all queues are full.
_FULL_RETRY_AFTER_S = 1.0


class Question(NamedTuple):
    item: DispatchItem
    now_s: float
    #: Expected of its answer.
    answer_tokens: float
    #: Leading blocks of the prompt that each worker is believed to hold, by row; and the different counts above 0,
    #: rising. None: nobody holds any. At least one token of the prompt is never held.
    held: HeldBlocks | None
    held_lengths: tuple[int, ...]
    #: Whether a decode worker or a store holds any.
    is_kept: bool
    #: Of urgency, see `Outlook`.
    rank: int
    #: What its TPOT may be predicted to be; None: anything.
    tpot_limit_s: float | None
    #: By row; None: all are.
    usable: Flags | None
    #: How many decisions came before, for taking turns.
    turn: int
    rng: Random

    def held_by(self, row: int) -> int:
        return 0 if self.held is None else self.held.item(row)


class Candidates(NamedTuple):
    """Rows that can hold the prompt and one token of an answer, that read prompts, that have room in their queues."""

    fits: Flags
    readers: Flags
    open_readers: Flags
    #: Those that the request should not get again where others can take it; None: nobody.
    avoided: Flags | None


def candidates(question: Question, view: FleetView, limits: DispatchLimits) -> Candidates:
    item = question.item
    fits = view.fits(item)
    if question.usable is not None:
        fits = fits & question.usable
    readers = view.can_read if fits is view.everybody else fits & view.can_read
    open_readers = readers & (view.waiting_requests < limits.max_waiting_requests)
    return Candidates(fits, readers, open_readers, view.rows_of(item.avoid) if item.avoid else None)


def refused(question: Question, view: FleetView, found: Candidates, limits: DispatchLimits) -> Refused:
    """Why no pair of these workers could take the request."""
    workers = view.computes if question.usable is None else view.computes & question.usable
    if workers.any() and not found.fits.any():
        return Refused("too_long", ContextLengthExceeded.code, 0.0)
    if not found.readers.any():
        return Refused("no_prefill", NotReady.code, limits.not_ready_retry_after_s)
    if not found.open_readers.any():
        return Refused("full", NoCapacity.code, _FULL_RETRY_AFTER_S)
    return Refused("no_decode", NotReady.code, limits.not_ready_retry_after_s)
