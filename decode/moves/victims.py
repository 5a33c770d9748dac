"""Which requests leave a worker that was asked for some: one rule for workers and for studies. Pure.

Who waits goes before who runs: it has nothing here. Of those that wait, preempted answers come first, then prompts. Of
those that run the lowest priority goes, and among these the one that takes the least time (Llumnix, OSDI'24, section
4.4.3); where something is to come free here, the smallest that suffices for it, else the largest.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from contracts.messages import MigrateRequest


RequestT = TypeVar("RequestT")


class Kind(IntEnum):
    """In the order in which they go."""

    PREEMPTED = 0
    PROMPT = 1
    RUNNING = 2


class Candidate(NamedTuple, Generic[RequestT]):
    request: RequestT
    kind: Kind
    priority: int
    #: Of the prompt and the answer so far; and the KV blocks that these take, here or there.
    num_tokens: int
    num_blocks: int
    #: In its line, of a prompt: 0 is read next.
    place: int = 0


class Wanted(NamedTuple):
    """As `contracts.messages.MigrateRequest` asks."""

    max_requests: int
    waiting: bool = True
    running: bool = True
    #: Of prompts: as they stand in line; else the last one first.
    first_in_line: bool = False
    #: Only priorities of at most this one; None: any.
    max_priority: int | None = None
    #: What they may take there, all of them together; None: anything.
    max_blocks: int | None = None
    #: What is to come free here by answers that run leaving; 0: they are to leave as fast as they can.
    need_blocks: int = 0


def wanted_of(ask: MigrateRequest) -> Wanted:
    return Wanted(
        max_requests=ask.max_requests,
        waiting=ask.waiting,
        running=ask.running,
        first_in_line=ask.first_in_line,
        max_priority=ask.max_priority,
        max_blocks=ask.max_blocks,
        need_blocks=ask.need_blocks,
    )


def in_order(candidates: Iterable[Candidate[RequestT]], wanted: Wanted) -> list[Candidate[RequestT]]:
    """All that may go, the one that is to go first at the front."""
    return sorted((one for one in candidates if _is_meant(one, wanted)), key=lambda one: _rank(one, wanted))


def begin_some(candidates: Iterable[Candidate[RequestT]], wanted: Wanted, begin: Callable[[RequestT], bool]) -> int:
    """Begins with as many as are wanted and fit, in order; `begin` says whether one could. How many did."""
    number, blocks_left, need_left = 0, wanted.max_blocks, wanted.need_blocks
    left = in_order(candidates, wanted)
    while left and number < wanted.max_requests:
        one = left.pop(0)
        if blocks_left is not None and one.num_blocks > blocks_left:
            continue
        if not begin(one.request):
            continue
        number += 1
        if blocks_left is not None:
            blocks_left -= one.num_blocks
        if one.kind is Kind.RUNNING and need_left:
            need_left = max(0, need_left - one.num_blocks)
            if not need_left:
                break
            left = in_order(left, wanted._replace(need_blocks=need_left))
    return number


def _is_meant(one: Candidate[Any], wanted: Wanted) -> bool:
    if wanted.max_priority is not None and one.priority > wanted.max_priority:
        return False
    if wanted.max_blocks is not None and one.num_blocks > wanted.max_blocks:
        return False
    return wanted.running if one.kind is Kind.RUNNING else wanted.waiting


def _rank(one: Candidate[Any], wanted: Wanted) -> tuple[int, int, int, int]:
    if one.kind is Kind.PROMPT:
        return one.kind, 0, one.place if wanted.first_in_line else -one.place, 0
    if one.kind is Kind.RUNNING and wanted.need_blocks:
        suffices = one.num_blocks >= wanted.need_blocks
        return one.kind, one.priority, not suffices, one.num_tokens if suffices else -one.num_tokens
    return one.kind, one.priority, 0, one.num_tokens
