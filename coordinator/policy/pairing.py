"""A reader for the prompt and a writer for the answer: compatible, and not avoided where others can take the request.

Both workers are chosen at arrival (Splitwise, ISCA'24, section 4.3), so that the copy can overlap the prefill. Which
reader and which writer is the policies' to say; how the two are brought together is said here.

A replayed request names the workers that it was just lost on. They are avoided as long as another worker of the
role can take it, and used when there is none: the failure may be over, a new life may be behind the name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from coordinator.policy.fleet_view import Counts, Expected, Flags, FleetView, Seconds
    from coordinator.policy.question import Candidates, Question

    #: The best row of those marked; at least one is.
    Pick = Callable[[Flags], int]
    #: Given a reader that is no mixed worker, and those that could write for it (at least one): the best.
    PickWriter = Callable[[int, Flags], int]


class Pair(NamedTuple):
    reader: int
    #: The reader itself when it is mixed.
    writer: int
    num_avoided: int = 0


def pair(view: FleetView, found: Candidates, readers: Flags, pick: Pick, pick_writer: PickWriter) -> Pair | None:
    """The first reader (in order of being avoided, then as picked) that has a writer, where neither is avoided; else
    the first of the pairs with the fewest avoided. None where nobody has a writer."""
    avoided = found.avoided
    best: Pair | None = None
    left = readers
    while is_any(left):
        reader = pick(left if avoided is None else wished(left, ~avoided))
        writer = _writer_for(view, found, reader, pick_writer)
        if writer is not None:
            if avoided is None:
                return Pair(reader, writer)
            num_avoided = int(avoided[reader]) + int(avoided[writer])
            if best is None or num_avoided < best.num_avoided:
                best = Pair(reader, writer, num_avoided)
            if not num_avoided:
                return best
        # Those like this reader come later and have no better writer: no pair of theirs has fewer avoided.
        left = left & ~_readers_like(reader, view)
    return best


def wished(candidates: Flags, wish: Flags) -> Flags:
    """Those that meet the wish, or all where nobody does."""
    granted = candidates & wish
    return granted if is_any(granted) else candidates


def is_any(marked: Flags) -> bool:
    """Whether any row is marked. `any` takes ten times as long."""
    return 1 in marked.tobytes()


def is_all(marked: Flags) -> bool:
    """Whether all rows are."""
    return 0 not in marked.tobytes()


def least(figures: Counts | Expected | Seconds, candidates: Flags) -> int:
    """The first of the marked rows with the smallest figure; at least one must be marked."""
    rows = candidates.nonzero()[0]
    return int(rows.item(figures[rows].argmin()))


def most(figures: Counts | Expected | Seconds, candidates: Flags) -> int:
    """The first of the marked rows with the largest figure; at least one must be marked."""
    rows = candidates.nonzero()[0]
    return int(rows.item(figures[rows].argmax()))


def fewest_wishes_dropped(question: Question, view: FleetView, found: Candidates, writers: Flags) -> Flags:
    """Of these writers those not avoided before avoided ones, then those that can hold the whole answer."""
    if found.avoided is not None:
        writers = wished(writers, ~found.avoided)
    whole_tokens = question.item.prompt_tokens + question.item.max_tokens
    if whole_tokens <= view.least_context_tokens:
        return writers
    return wished(writers, view.max_context_tokens >= whole_tokens)


def _writer_for(view: FleetView, found: Candidates, reader: int, pick_writer: PickWriter) -> int | None:
    if view.is_mixed[reader]:
        return reader
    writers = view.writers_of_class[int(view.kv_class[reader])]
    if found.fits is not view.everybody:
        writers = found.fits & writers
    return pick_writer(reader, writers) if is_any(writers) else None


def _readers_like(reader: int, view: FleetView) -> Flags:
    """Those that the same workers can write for: itself for a mixed one, else one class's decode workers."""
    alike: Flags = view.is_mixed if view.is_mixed[reader] else ~view.is_mixed & (view.kv_class == view.kv_class[reader])
    return alike
