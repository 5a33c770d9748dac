"""Keeps the directory in step with what workers hold: numbered events, and snapshots where numbers are missing.

A worker's life begins with an empty cache, and each of its events says that one block came or went. Whoever has had all
events from 0 to n therefore knows what it held before event n. A repeat changes nothing; a gap changes nothing either,
and is answered with the number that is missing; where the worker has forgotten it, or nothing is known, a snapshot
takes its place. So messages may be lost, repeated and late.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import BadRequest
from contracts.messages import BlockEventsReply
from coordinator.directory.hints import as_hints

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import BlockEvents, SnapshotPage
    from coordinator.directory.directory import Directory
    from coordinator.directory.hints import Hints

_NO_HINTS = np.zeros(0, np.uint64)


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """Blocks that came and blocks that went; none is among both."""

    stored: Hints
    removed: Hints
    #: That these rest on; one that came and went again counts twice.
    num_events: int


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A part of a snapshot: the first one begins a replacement, the last one completes it."""

    hints: Hints
    is_first: bool
    is_last: bool


class BlockFeed:
    """What is known of one life's events: messages in, what to do with the directory out."""

    def __init__(self) -> None:
        #: All events below are contained in the directory.
        self.expected = 0
        #: Messages that began beyond what was expected of a life that was followed already, and pages out of turn.
        self.num_gaps = 0
        # The snapshot in progress: its event, its pages, and how many of them have come.
        self._snapshot: tuple[int, int] | None = None
        self._num_pages = 0

    def handle(self, events: BlockEvents) -> tuple[Change | Page | None, BlockEventsReply]:
        """What to do, in full, before the reply is given. Raises BadRequest for a message that makes no sense."""
        hints = as_hints(events.keys, "keys")
        if events.start < 0:
            raise BadRequest(f"start is {events.start}; events are numbered from 0", param="start")
        if events.snapshot is not None:
            return self._handle_page(events, events.snapshot, hints)
        if len(events.stored) != len(hints):
            raise BadRequest(f"stored has {len(events.stored)} bytes for {len(hints)} keys", param="stored")
        stored = np.frombuffer(events.stored, np.uint8)
        if len(stored) and stored.max() > 1:
            raise BadRequest(f"stored has a byte {stored.max()}; 1 says stored and 0 removed", param="stored")

        if events.start > self.expected:
            if self.expected:
                self.num_gaps += 1
                return None, BlockEventsReply(expected=self.expected)
            # Nothing is known of this life, for one because the coordinator is younger: a snapshot says all at once.
            return None, BlockEventsReply(expected=None)
        known = self.expected - events.start
        if known >= len(hints):
            return None, BlockEventsReply(expected=self.expected)
        self.expected = events.start + len(hints)
        return _net_change(hints[known:], stored[known:] == 1), BlockEventsReply(expected=self.expected)

    def _handle_page(
        self, events: BlockEvents, page: SnapshotPage, hints: Hints
    ) -> tuple[Page | None, BlockEventsReply]:
        """The reply to a page that is taken names the event that the snapshot stands before."""
        if not 0 <= page.index < page.count:
            raise BadRequest(f"snapshot is page {page.index} of {page.count}", param="snapshot")
        if events.stored:
            raise BadRequest("stored is not empty in a snapshot", param="stored")
        if events.start < self.expected:
            # Late: more is known already.
            return None, BlockEventsReply(expected=self.expected)
        snapshot = (events.start, page.count)
        if page.index == 0:
            self._snapshot = snapshot
            self._num_pages = 0
        elif self._snapshot != snapshot or page.index > self._num_pages:
            self.num_gaps += 1
            self._snapshot = None
            return None, BlockEventsReply(expected=None)
        elif page.index < self._num_pages:
            return None, BlockEventsReply(expected=events.start)
        self._num_pages += 1
        is_last = self._num_pages == page.count
        if is_last:
            self._snapshot = None
            self.expected = events.start
        return Page(hints, page.index == 0, is_last), BlockEventsReply(expected=events.start)


@dataclass(slots=True)
class _Follower:
    """The one life of a worker that the directory follows."""

    incarnation: Incarnation
    number: int
    feed: BlockFeed
    num_staged: int = 0


class DirectorySync:
    """Follows the events of every worker. Not thread-safe."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._followers: dict[WorkerId, _Follower] = {}
        #: Events that the directory was changed by.
        self.events_total = 0
        #: Messages that could not be used because something before them is missing.
        self.gaps_total = 0
        #: Snapshots completed.
        self.snapshots_total = 0
        #: Blocks of snapshots beyond what the directory can know at all.
        self.cut_total = 0

    def handle(self, events: BlockEvents, number: int | None, incarnation: Incarnation | None) -> BlockEventsReply:
        """The worker's number in the directory and its life, as the membership knows them; None: it knows none.

        Changes the directory. Raises BadRequest for a message that makes no sense.
        """
        if number is None or incarnation is None or events.incarnation != incarnation:
            return BlockEventsReply(expected=None, known=False)
        follower = self._followers.get(events.worker_id)
        if follower is None or (follower.incarnation, follower.number) != (incarnation, number):
            follower = self._followers[events.worker_id] = _Follower(incarnation, number, BlockFeed())
        num_gaps = follower.feed.num_gaps
        to_do, reply = follower.feed.handle(events)
        self.gaps_total += follower.feed.num_gaps - num_gaps
        match to_do:
            case Change():
                self._directory.drop(number, to_do.removed)
                self._directory.store(number, to_do.stored)
                self.events_total += to_do.num_events
            case Page():
                self._take_page(follower, to_do)
            case None:
                pass
        return reply

    def forget(self, worker_id: WorkerId) -> None:
        """The worker left the directory. Unknown ones are no error."""
        self._followers.pop(worker_id, None)

    def _take_page(self, follower: _Follower, page: Page) -> None:
        if page.is_first:
            self._directory.begin(follower.number)
            follower.num_staged = 0
        taken = page.hints[: self._directory.max_blocks - follower.num_staged]
        self.cut_total += len(page.hints) - len(taken)
        self._directory.stage(follower.number, taken)
        follower.num_staged += len(taken)
        if page.is_last:
            self._directory.commit(follower.number)
            self.snapshots_total += 1


def _net_change(hints: Hints, stored: NDArray[np.bool_]) -> Change:
    """Of several events about one block only the last one counts."""
    if stored.all():
        return Change(hints, _NO_HINTS, len(hints))
    if not stored.any():
        return Change(_NO_HINTS, hints, len(hints))
    # Stable, so the last of equal hints is the last that happened.
    order = np.argsort(hints, kind="stable")
    in_order = hints[order]
    is_last = np.append(in_order[1:] != in_order[:-1], True)
    in_order, stored = in_order[is_last], stored[order][is_last]
    return Change(in_order[stored], in_order[~stored], len(hints))
