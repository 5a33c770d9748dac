"""Appends records to the newest segment, and moves what is worth keeping there when an old one is given up."""

from __future__ import annotations

import asyncio
import errno
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from contracts.errors import NoCapacity
from kvstore.ssd.format import whole_pages
from kvstore.ssd.reclaim import choose_kept
from kvstore.ssd.records import EncodedBlock, blocks_per_record, buffer_bytes_for, make_record

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from contracts.clock import Clock
    from kvstore.ssd.catalogue import Location, Segment
    from kvstore.ssd.files import BlockFiles
    from kvstore.ssd.holdings import Holdings
    from kvstore.ssd.reader import Reader
    from kvstore.ssd.records import Record
    from kvstore.ssd.room import Room
    from kvstore.ssd.settings import SsdSettings

T = TypeVar("T")

#: Calls that the disk has not answered, beyond which it is not called any more.
MAX_STUCK = 4
#: Segments that are begun for one record, before it is refused.
_MAX_SEGMENTS_TRIED = 3
#: The one that fills and the one after it may be gone.
_MAX_LOST = 2


@dataclass(slots=True, eq=False)
class _Put:
    """A record on its way to its place."""

    segment: Segment
    offset: int
    writing: asyncio.Task[None]
    #: The one in front of it, until that is known to be written.
    before: _Put | None
    #: Set when its blocks have been entered, or will not be.
    is_over: asyncio.Future[None]

    async def written(self) -> None:
        """Raises OSError, also where one before it in the segment was not written: recovery would stop there."""
        while self.before is not None:
            await asyncio.wait([self.before.writing])
            error = self.before.writing.exception()
            if error is not None:
                await asyncio.wait([self.writing])
                self.writing.exception()
                raise error
            self.before = self.before.before
        await asyncio.shield(self.writing)


class Appender:
    """The only one who writes segments. On the store's loop; changes go one after another."""

    def __init__(
        self,
        *,
        files: BlockFiles,
        clock: Clock,
        holdings: Holdings,
        room: Room,
        reader: Reader,
        identity: bytes,
        block_bytes: int,
        settings: SsdSettings,
    ) -> None:
        self._files = files
        self._clock = clock
        self._holdings = holdings
        self._room = room
        self._reader = reader
        self._identity = identity
        self._settings = settings
        payload_bytes = settings.record_bytes_for(block_bytes)
        self._blocks_per_record = blocks_per_record(block_bytes, payload_bytes)
        self._buffer_bytes = buffer_bytes_for(block_bytes, payload_bytes)
        self._changing = asyncio.Lock()
        self._syncing = asyncio.Lock()
        self._active: Segment | None = None
        self._last_put: _Put | None = None
        #: Those that are not over.
        self._puts: dict[_Put, None] = {}
        #: The segment after the active one, or who makes it.
        self._spare: Segment | None = None
        self._making: asyncio.Task[None] | None = None
        #: Segments with bytes that a crash of the machine might take.
        self._unsynced: list[Segment] = []
        self._sealing: asyncio.Task[None] | None = None
        #: Calls that were given up; their threads still hang.
        self._stuck: set[asyncio.Task[object]] = set()

    @property
    def num_stuck(self) -> int:
        return len(self._stuck)

    async def append(self, record: Record) -> None:
        """Several may be under way: they stand in the order of the calls. Raises OSError, TimeoutError (the buffer may
        still be read then) and NoCapacity: nothing is stored then."""
        for _ in range(_MAX_LOST):
            # Where somebody deleted the files, new ones are made.
            with suppress(FileNotFoundError):
                return await self._append(record)
        await self._append(record)

    async def sync(self) -> None:
        """What was appended so far outlasts a crash of the machine. Raises OSError."""
        async with self._syncing:
            if self._sealing is not None:
                await asyncio.wait([self._sealing])
            while self._unsynced:
                segment = self._unsynced.pop(0)
                try:
                    await self._sync(segment)
                except OSError:
                    self._abandon(segment)
                    raise

    async def _sync(self, segment: Segment) -> None:
        """One segment, which is tried again where this fails: what is lost for good is found out when it is read."""
        if not self._holdings.catalogue.holds(segment):
            return
        try:
            await self._in_time(self._files.sync(segment.path))
        except FileNotFoundError:
            self._holdings.drop_segment(segment, "lost", file_is_there=False)
        except BaseException:
            self._unsynced.append(segment)
            raise

    async def delete_given_up(self) -> None:
        """Raises OSError."""
        async with self._changing:
            await self._in_time(self._room.delete_given_up())

    async def shrink(self) -> None:
        """Takes no more room than is allowed. Raises OSError and NoCapacity."""
        async with self._changing:
            await self._in_time(self._room.shrink(self._settings.size_bytes))

    async def compact(self, segment: Segment) -> None:
        """Gives up a segment; its pinned blocks stay. Raises OSError and NoCapacity: then it stays."""
        async with self._changing:
            if segment is self._active:
                self._active = None
            await self._settle(segment)
            if not self._holdings.catalogue.holds(segment):
                return
            if segment.pinned_bytes:
                active = await self._segment_for(whole_pages(segment.pinned_bytes))
                await self._move(segment, active, budget_bytes=0, reason="cleared")
            else:
                self._holdings.drop_segment(segment, "cleared")
            await self._in_time(self._room.delete_given_up())

    def forget_active(self) -> None:
        """The next record begins a new segment."""
        self._active = None

    async def close(self, wait_s: float) -> None:
        """Waits for calls that nobody waits for any more."""
        left: set[asyncio.Task[Any]] = {*self._stuck}
        left.update(task for task in (self._sealing, self._making) if task is not None)
        if self._last_put is not None:
            left.add(self._last_put.writing)
        if left:
            await asyncio.wait(left, timeout=wait_s)

    async def _append(self, record: Record) -> None:
        async with self._changing:
            put = self._begin(await self._segment_for(record.num_bytes), record)
        await self._finish(put, lambda: record.rows)
        self._holdings.bytes_written += int(record.rows["length"].sum())

    # --- inside, while changing -------------------------------------------------------------------

    async def _segment_for(self, num_bytes: int) -> Segment:
        for _ in range(_MAX_SEGMENTS_TRIED):
            active = self._active
            if active is not None and self._holdings.catalogue.holds(active):
                if active.tail + num_bytes <= active.num_bytes:
                    return active
                await self._seal(active)
            active = self._active = await self._take_spare()
            if self._room.needs_reserve:
                # Ahead of need, while there is room for what is moved.
                with suppress(NoCapacity, OSError):
                    await self._reclaim(active)
            if not self._room.needs_reserve:
                self._making = asyncio.ensure_future(self._make_spare())
        raise NoCapacity("no room on disk: pinned blocks fill each new segment")

    async def _take_spare(self) -> Segment:
        """The next segment: as a rule it was made while the one before it filled. Raises OSError and NoCapacity."""
        if self._making is not None:
            await asyncio.wait([self._making])
        spare, self._spare, self._making = self._spare, None, None
        if spare is not None and self._holdings.catalogue.holds(spare):
            return spare
        return await self._in_time(self._room.make_segment())

    async def _make_spare(self) -> None:
        # Where this fails it is tried again when the segment is needed.
        with suppress(OSError, NoCapacity):
            self._spare = await self._in_time(self._room.make_segment())

    async def _seal(self, segment: Segment) -> None:
        """Makes it safe while the next one fills; at most two segments are unsafe at a time."""
        self._active = None
        if self._sealing is not None:
            await asyncio.wait([self._sealing])
        self._sealing = asyncio.ensure_future(self._make_safe(segment))

    async def _make_safe(self, segment: Segment) -> None:
        await self._settle(segment)
        if segment in self._unsynced:
            self._unsynced.remove(segment)
            with suppress(OSError):
                await self._sync(segment)

    def _begin(self, segment: Segment, record: Record) -> _Put:
        """Begins to write a record behind the last one."""
        offset = segment.tail
        data = record.seal(
            sequence=segment.sequence, offset=offset, identity=self._identity, wall_s=self._clock.wall_s()
        )
        segment.tail = offset + record.num_bytes
        before = self._last_put if self._last_put is not None and self._last_put.segment is segment else None
        writing = asyncio.ensure_future(self._in_time(self._files.write(segment.path, offset, data)))
        writing.add_done_callback(_retrieve)
        self._last_put = put = _Put(segment, offset, writing, before, asyncio.get_running_loop().create_future())
        self._puts[put] = None
        segment.num_writing += 1
        return put

    async def _finish(self, put: _Put, rows: Callable[[], NDArray[np.void]]) -> None:
        """Enters blocks in the catalogue when their record is written, and all those before it are. To be called right
        after `_begin`; `rows` is called when they are to be entered. Raises OSError."""
        try:
            await self._enter(put, rows)
        finally:
            del self._puts[put]
            put.segment.num_writing -= 1
            put.is_over.set_result(None)

    async def _enter(self, put: _Put, rows: Callable[[], NDArray[np.void]]) -> None:
        segment = put.segment
        try:
            await put.written()
        except FileNotFoundError:
            self._holdings.drop_segment(segment, "lost", file_is_there=False)
            self._abandon(segment)
            raise
        except BaseException:
            # Any part of it may be there: nothing is written behind it.
            self._abandon(segment)
            raise
        if not self._holdings.catalogue.holds(segment):
            raise OSError(errno.ECANCELED, "the segment was given up meanwhile", segment.path)
        if len(entered := rows()):
            self._holdings.catalogue.record(segment, put.offset, entered, self._clock.now_s())
        if segment not in self._unsynced:
            self._unsynced.append(segment)

    async def _settle(self, segment: Segment) -> None:
        """Waits for what is being written to the segment."""
        if under_way := [put.is_over for put in self._puts if put.segment is segment]:
            await asyncio.wait(under_way)

    def _abandon(self, segment: Segment) -> None:
        if self._active is segment:
            self._active = None

    async def _reclaim(self, active: Segment) -> None:
        """Frees the room of one segment. Raises OSError and NoCapacity."""
        if await self._in_time(self._room.give_up_other()):
            return
        victim = self._room.victim(active)
        if victim is None:
            return
        budget_bytes = int(self._settings.kept_share * active.num_bytes)
        await self._move(victim, active, budget_bytes=budget_bytes, reason="capacity")
        await self._in_time(self._room.delete_given_up())

    async def _move(self, victim: Segment, active: Segment, *, budget_bytes: int, reason: str) -> None:
        """Gives up a segment when what is to be kept of it stands in the active one, safe from a crash."""
        catalogue = self._holdings.catalogue
        standing = catalogue.blocks_of(victim)
        chosen = choose_kept(
            catalogue.block_columns(victim), mean_log_worth=catalogue.mean_log_worth(), budget_bytes=budget_bytes
        )
        kept = [standing[int(index)] for index in chosen]
        for start in range(0, len(kept), self._blocks_per_record):
            await self._move_some(kept[start : start + self._blocks_per_record], active)
        if kept:
            await self._in_time(self._files.sync(active.path))
        if victim.pinned_bytes:
            raise NoCapacity(f"{victim.path} has pinned blocks that were not moved")
        self._holdings.drop_segment(victim, reason)

    async def _move_some(self, locations: Sequence[Location], active: Segment) -> None:
        found = await self._reader.fetch(locations)
        sources = [location for location, data in zip(locations, found, strict=True) if data is not None]
        blocks = [
            EncodedBlock(key=location.key, position=location.position, codec=location.codec, data=data)
            for location, data in zip(locations, found, strict=True)
            if data is not None
        ]
        if not blocks:
            return
        buffer = self._files.buffer(self._buffer_bytes)
        record = await self._files.work(partial(make_record, buffer, iter(blocks), len(blocks)))
        if active.tail + record.num_bytes > active.num_bytes:
            return

        def still_standing() -> NDArray[np.void]:
            # What went meanwhile does not come back.
            rows: NDArray[np.void] = record.rows[[self._holdings.catalogue.stands_at(source) for source in sources]]
            return rows

        await self._finish(self._begin(active, record), still_standing)

    async def _in_time(self, call: Coroutine[None, None, T]) -> T:
        """Raises TimeoutError where the disk does not answer; what it does then is ignored."""
        if len(self._stuck) >= MAX_STUCK:
            call.close()
            raise TimeoutError(errno.ETIMEDOUT, f"{len(self._stuck)} calls have no answer yet")
        calling = asyncio.ensure_future(call)
        calling.add_done_callback(self._forget)
        try:
            await asyncio.wait([calling], timeout=self._settings.write_timeout_s)
        finally:
            if not calling.done():
                self._stuck.add(calling)
        if calling.done():
            return calling.result()
        raise TimeoutError(errno.ETIMEDOUT, "the disk did not answer in time")

    def _forget(self, calling: asyncio.Task[object]) -> None:
        self._stuck.discard(calling)
        _retrieve(calling)


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Nobody may wait for it any more."""
    if not task.cancelled():
        task.exception()
