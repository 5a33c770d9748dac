"""Which prefill and which decode worker a request gets: compatible, not avoided if possible, least loaded.

Both workers are chosen at arrival (Splitwise, ISCA'24, section 4.3), so that the copy can overlap the
prefill. Prefill load is prompt tokens not yet computed, decode load is context tokens held; ties go to the
smaller worker id, so that one view always gives one answer. Tokens placed by this call and by earlier ones
that no heartbeat reports yet count as load, else a burst would land on one worker.

A replayed request names the workers that it was just lost on. They are avoided as long as another worker of the
role can take it, and used when there is none: the failure may be over, a new life may be behind the name.

`choose` decides over rows; `dispatch` puts its answer into messages and words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from contracts.errors import ContextLengthExceeded, NoCapacity, NotReady
from contracts.messages import Peer, Placement, Rejection

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.messages import DispatchItem, WorkerInfo
    from coordinator.policy.fleet_view import Counts, Flags, FleetView

#: What a refused client is told while all queues are full.
_FULL_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchLimits:
    #: A worker with this many requests waiting gets no more: beyond it waiting only grows.
    max_waiting_requests: int = 512
    #: What a refused client is told while no worker of a role is up.
    not_ready_retry_after_s: float = 1.0


class Chosen(NamedTuple):
    """Rows of the view."""

    prefill_row: int
    #: The prefill row: a mixed worker keeps its prompt.
    decode_row: int


class Refused(NamedTuple):
    #: The prompt fits into no worker; no worker that reads prompts can hold it; those that can have full queues;
    #: no decode worker that can hold it understands the KV of those with room in their queues.
    why: Literal["too_long", "no_prefill", "full", "no_decode"]
    #: Of the `contracts.errors` class that says so to a client.
    code: str
    retry_after_s: float


def dispatch(items: Sequence[DispatchItem], view: FleetView, limits: DispatchLimits) -> list[Placement | Rejection]:
    """One verdict for each item, in order. Earlier items of the call count as load for later ones."""
    verdicts: list[Placement | Rejection] = []
    for item in items:
        choice = choose(item, view, limits)
        if isinstance(choice, Refused):
            verdicts.append(_rejection(item, choice, view))
        else:
            verdicts.append(_placement(item, choice, view))
            view = view.booked(item, choice.prefill_row, choice.decode_row)
    return verdicts


def choose(item: DispatchItem, view: FleetView, limits: DispatchLimits) -> Chosen | Refused:
    """The first reader (in order of being avoided, load, id) that has a writer, where neither is avoided; else the
    first of the pairs with the fewest avoided."""
    fits = view.fits(item)
    readers = fits & view.can_read
    open_readers = readers & (view.waiting_requests < limits.max_waiting_requests)
    wishes = _wishes(item, view)
    best: Chosen | None = None
    fewest = 3
    left = open_readers
    while (reader := _least_loaded(view.prefill_load_tokens, left, wishes)) is not None:
        writer = _writer_for(item, reader, fits, wishes, view)
        if writer is not None:
            num_avoided = sum(not wish[row] for wish in wishes for row in (reader, writer))
            if not num_avoided:
                return Chosen(reader, writer)
            if num_avoided < fewest:
                best, fewest = Chosen(reader, writer), num_avoided
        # Those like this reader come later and have no better writer: no pair of theirs has fewer avoided.
        left = left & ~_readers_like(reader, view)
    return best or _refused(fits, readers, open_readers, limits)


def _wishes(item: DispatchItem, view: FleetView) -> tuple[Flags, ...]:
    return (~view.rows_of(item.avoid),) if item.avoid else ()


def _writer_for(item: DispatchItem, reader: int, fits: Flags, wishes: tuple[Flags, ...], view: FleetView) -> int | None:
    """The decode worker for a prompt read by `reader`: itself when mixed, else the least loaded whose KV
    means the same; not avoided before avoided, one that can hold the whole answer before one that cannot. None
    when there is none."""
    if view.is_mixed[reader]:
        return reader
    writers = fits & view.is_writer & (view.kv_class == view.kv_class[reader])
    holds_answer = view.max_context_tokens >= item.prompt_tokens + item.max_tokens
    return _least_loaded(view.decode_load_tokens, writers, (*wishes, holds_answer))


def _least_loaded(load_tokens: Counts, candidates: Flags, wishes: tuple[Flags, ...]) -> int | None:
    """The first candidate row with the least load among those that meet the wishes; a wish that nobody left meets
    is dropped, and the earlier wish comes first. None without candidates."""
    for wish in wishes:
        wished = candidates & wish
        if wished.any():
            candidates = wished
    rows = candidates.nonzero()[0]
    return int(rows[load_tokens[rows].argmin()]) if rows.size else None


def _readers_like(reader: int, view: FleetView) -> Flags:
    """Those that the same workers can write for: itself for a mixed one, else one class's decode workers."""
    alike: Flags = view.is_mixed if view.is_mixed[reader] else ~view.is_mixed & (view.kv_class == view.kv_class[reader])
    return alike


def _refused(fits: Flags, readers: Flags, open_readers: Flags, limits: DispatchLimits) -> Refused:
    if fits.size and not fits.any():
        return Refused("too_long", ContextLengthExceeded.code, 0.0)
    if not readers.any():
        return Refused("no_prefill", NotReady.code, limits.not_ready_retry_after_s)
    if not open_readers.any():
        return Refused("full", NoCapacity.code, _FULL_RETRY_AFTER_S)
    return Refused("no_decode", NotReady.code, limits.not_ready_retry_after_s)


# --- in words ---------------------------------------------------------------------------------------------


def _placement(item: DispatchItem, chosen: Chosen, view: FleetView) -> Placement:
    reader, writer = view.infos[chosen.prefill_row], view.infos[chosen.decode_row]
    again = dict.fromkeys(info.worker_id for info in (reader, writer) if info.worker_id in item.avoid)
    reason = (
        f"least loaded: prefill {view.prefill_load_tokens[chosen.prefill_row]} tokens pending of "
        f"{(view.fits(item) & view.can_read).sum()} workers, "
        f"decode {view.decode_load_tokens[chosen.decode_row]} context tokens"
        + (f"; nobody else than {', '.join(again)}, to be avoided" if again else "")
    )
    return Placement(request_id=item.request_id, prefill=_peer(reader), decode=_peer(writer), reason=reason)


def _rejection(item: DispatchItem, refused: Refused, view: FleetView) -> Rejection:
    match refused.why:
        case "too_long":
            message = _too_long(item, view)
        case "full":
            message = _full(item, view)
        case "no_prefill":
            message = _nobody("prefill", view)
        case "no_decode":
            message = _nobody("decode", view)
    return Rejection(
        request_id=item.request_id, code=refused.code, message=message, retry_after_s=refused.retry_after_s
    )


def _nobody(role: str, view: FleetView) -> str:
    present = ", ".join(f"{info.worker_id} ({info.role})" for info in view.infos) or "none"
    return f"no {role} worker can take the request (workers up: {present})"


def _too_long(item: DispatchItem, view: FleetView) -> str:
    return (
        f"a prompt of {item.prompt_tokens} tokens and an answer fit into no worker; "
        f"the largest holds {view.max_prompt_tokens.max() + 1} tokens"
    )


def _full(item: DispatchItem, view: FleetView) -> str:
    load_tokens, readers = view.prefill_load_tokens, view.fits(item) & view.can_read
    least = _least_loaded(load_tokens, readers & (load_tokens == load_tokens[readers].min()), _wishes(item, view))
    assert least is not None, "full queues are somebody's"
    return (
        f"all {readers.sum()} prefill workers have full queues; the least loaded, {view.infos[least].worker_id}, has "
        f"{view.waiting_requests[least]} requests and {load_tokens[least]} prompt tokens waiting"
    )


def _peer(info: WorkerInfo) -> Peer:
    return Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address)
