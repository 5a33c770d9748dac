"""What entered and left a worker's prefix cache, as numbered events, and how the coordinator is told of them.

One message is under way at a time. What it acknowledges is not sent again; what the log no longer has, because the
coordinator was away for too long, or is another one, is sent as a snapshot of the cache. See
`contracts.messages.BlockEvents` for what messages mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from contracts.messages import BlockEvents, SnapshotPage
from kvstore.block_keys import HINT_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import BlockEventsReply


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLogLimits:
    #: Events kept for repeating them.
    max_events: int = 65_536
    max_events_per_message: int = 8_192
    #: A page keeps the coordinator from deciding for some milliseconds.
    max_hints_per_page: int = 16_384

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")


@dataclass(slots=True)
class _Snapshot:
    """A copy of what the cache held before event `start`."""

    start: int
    hints: bytes
    num_pages: int
    #: Taken by the coordinator.
    num_sent: int = 0


class BlockLog:
    """The worker's side of one life. `stored` and `removed` may be called at any time, also while a message is under
    way; the others by turns: `next_message`, then `answered` or `failed`. Not thread-safe."""

    def __init__(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        held: Callable[[], bytes],
        limits: BlockLogLimits | None = None,
        *,
        holds_already: bool = False,
    ) -> None:
        """`held`: the hints of everything that the cache holds now, one after another; asked for a snapshot. The cache
        is empty as the log begins, unless it `holds_already` what it kept from an earlier life; its changes are told to
        the log as they happen."""
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._held = held
        self._limits = limits or BlockLogLimits()
        #: The events from number `_first` on, parallel.
        self._hints = bytearray()
        self._stored = bytearray()
        # What stands from before counts as one event that nobody can be told of: it takes a snapshot.
        self._first = int(holds_already)
        #: The coordinator has all below; -1: it needs a snapshot; None: it is to be asked what it has.
        self._acknowledged: int | None = 0
        self._snapshot: _Snapshot | None = None
        self._sent: BlockEvents | None = None

    @property
    def num_events(self) -> int:
        """Since this life began; the number of the next one."""
        return self._first + len(self._stored)

    def stored(self, hint: bytes) -> None:
        """A block came into the cache."""
        self._note(hint, 1)

    def removed(self, hint: bytes) -> None:
        """A block left the cache."""
        self._note(hint, 0)

    def next_message(self) -> BlockEvents | None:
        """What to send now; None: the coordinator is in step. After a failure the same again, or more."""
        if self._acknowledged is None:
            self._sent = self._message(self.num_events)
        elif self._snapshot is not None:
            self._sent = self._page(self._snapshot)
        elif self._acknowledged == self.num_events:
            self._sent = None
        elif self._acknowledged < self._first:
            self._sent = self._page(self._begin_snapshot())
        else:
            start = self._acknowledged - self._first
            stop = start + self._limits.max_events_per_message
            self._sent = self._message(
                self._acknowledged,
                keys=bytes(self._hints[start * HINT_BYTES : stop * HINT_BYTES]),
                stored=bytes(self._stored[start:stop]),
            )
        return self._sent

    def answered(self, reply: BlockEventsReply) -> None:
        """The reply to the message under way. Ignored where none is: `reset` came first."""
        sent, self._sent = self._sent, None
        if sent is None:
            return
        if not reply.known:
            self.reset()
        elif reply.expected is None:
            self._acknowledged = -1
            self._snapshot = None
        elif self._snapshot is not None and sent.snapshot is not None and reply.expected == self._snapshot.start:
            self._snapshot.num_sent += 1
            if self._snapshot.num_sent == self._snapshot.num_pages:
                self._acknowledged = self._snapshot.start
                self._snapshot = None
        else:
            # A coordinator that claims to know what has not happened knows another history.
            self._acknowledged = reply.expected if reply.expected <= self.num_events else -1
            self._snapshot = None

    def failed(self) -> None:
        """No reply came to the message under way: it may have arrived or not."""
        self._sent = None

    def reset(self) -> None:
        """This life registered anew: nobody knows what the coordinator has; it is asked."""
        self._acknowledged = None
        self._snapshot = None
        self._sent = None

    def _note(self, hint: bytes, stored: int) -> None:
        if len(hint) != HINT_BYTES:
            raise ValueError(f"a hint has {HINT_BYTES} bytes, not {len(hint)}")
        self._hints += hint
        self._stored.append(stored)
        if len(self._stored) > self._limits.max_events:
            del self._hints[:HINT_BYTES], self._stored[:1]
            self._first += 1

    def _begin_snapshot(self) -> _Snapshot:
        hints = self._held()
        if len(hints) % HINT_BYTES:
            raise ValueError(f"held() gave {len(hints)} bytes; each hint has {HINT_BYTES}")
        # In an order of its own: two copies of the same contents have the same pages, so that a page which arrives late
        # does no harm among those of another copy.
        hints = np.sort(np.frombuffer(hints, np.uint64)).tobytes()
        page_bytes = self._limits.max_hints_per_page * HINT_BYTES
        self._snapshot = _Snapshot(self.num_events, hints, max(1, -(-len(hints) // page_bytes)))
        return self._snapshot

    def _page(self, snapshot: _Snapshot) -> BlockEvents:
        page_bytes = self._limits.max_hints_per_page * HINT_BYTES
        index = snapshot.num_sent
        return self._message(
            snapshot.start,
            keys=snapshot.hints[index * page_bytes : (index + 1) * page_bytes],
            snapshot=SnapshotPage(index, snapshot.num_pages),
        )

    def _message(
        self, start: int, *, keys: bytes = b"", stored: bytes = b"", snapshot: SnapshotPage | None = None
    ) -> BlockEvents:
        return BlockEvents(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            start=start,
            keys=keys,
            stored=stored,
            snapshot=snapshot,
        )
