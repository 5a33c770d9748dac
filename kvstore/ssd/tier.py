"""The disk tier of the store: blocks by key, in segment files that outlast a restart of everything.

Whatever the disk does, callers see blocks that are whole and verified, or a miss; blocks that are stored, or not. Where
the folder cannot be used, is another build's or another process's, the tier is empty and says so in `problem`, and the
folder is tried again from time to time.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from msgspec.structs import replace

from contracts.errors import ConfigError, NoCapacity
from kvstore.ssd.appender import Appender
from kvstore.ssd.catalogue import Catalogue
from kvstore.ssd.codec import RAW
from kvstore.ssd.codec_failures import CodecFailures
from kvstore.ssd.format import identity_digest
from kvstore.ssd.health import Breaker, Health, describe
from kvstore.ssd.holdings import Holdings
from kvstore.ssd.reader import Reader
from kvstore.ssd.recovery import open_folder, recover
from kvstore.ssd.room import Room
from kvstore.ssd.write_queue import WriteQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from contracts.clock import Clock
    from contracts.layout import KvIdentity
    from contracts.store_messages import TierFigures
    from kvstore.ssd.catalogue import Description, Segment
    from kvstore.ssd.codec import BlockCodec
    from kvstore.ssd.files import BlockFiles
    from kvstore.ssd.records import StoredBlock
    from kvstore.ssd.settings import SsdSettings

#: The segments that a crash may have torn are looked through before anything is read from them.
_NUM_CHECKED = 2
#: What closing waits for the disk.
CLOSE_WAIT_S = 5.0


def _ignore(_keys: Sequence[bytes], _reason: str) -> None:
    return


class SsdTier:
    """On one loop; made by `open`. An async context manager, which closes it."""

    def __init__(
        self,
        *,
        files: BlockFiles,
        clock: Clock,
        identity: KvIdentity,
        settings: SsdSettings,
        name: str = "the disk tier's folder",
        block_bytes: int | None = None,
        seed: int = 0,
        codecs: Iterable[BlockCodec] = (),
        exact: BlockCodec = RAW,
        lossy: BlockCodec = RAW,
        on_removed: Callable[[Sequence[bytes], str], None] = _ignore,
        on_found: Callable[[Sequence[bytes]], None] | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`name`: of the folder, in messages. `block_bytes`: default the identity's. `seed`: of the index, unknown to
        clients. `codecs`: which can be read, beside `exact` and `lossy`, with which blocks are written. `on_removed` is
        called for blocks that went, `on_found` for those in a folder that could be opened only later; `log(line)`, from
        any thread, for codecs that fail.

        Raises ConfigError where the tier is too small for a few segments of blocks."""
        self._files = files
        self._clock = clock
        self._name = name
        self._settings = settings
        self._on_found = on_found
        block_bytes = block_bytes or identity.layout.block_bytes
        self._identity = identity_digest(identity, block_bytes)
        catalogue = Catalogue(
            settings.max_blocks_for(block_bytes),
            self._identity,
            half_life_bytes=max(int(settings.half_life_share * settings.size_bytes), 1),
            now_s=clock.now_s(),
            seed=seed,
        )
        self._holdings = Holdings(catalogue, clock, on_removed)
        self._health = Health()
        self._opening = Breaker(1)
        self._is_ready = False
        self._is_closed = False
        readable = {codec.codec_id: codec for codec in (RAW, *codecs, exact, lossy)}
        self._reader = Reader(
            files=files, clock=clock, holdings=self._holdings, health=self._health, codecs=readable, settings=settings
        )
        self._room = Room(
            files=files,
            holdings=self._holdings,
            identity=self._identity,
            segment_bytes=settings.segment_bytes_for(block_bytes),
            settings=settings,
        )
        self._appender = Appender(
            files=files,
            clock=clock,
            holdings=self._holdings,
            room=self._room,
            reader=self._reader,
            identity=self._identity,
            block_bytes=block_bytes,
            settings=settings,
        )
        self._codec_failures = CodecFailures(clock, log)
        self._queue = WriteQueue(
            files=files,
            clock=clock,
            holdings=self._holdings,
            health=self._health,
            appender=self._appender,
            exact=exact,
            lossy=lossy,
            failures=self._codec_failures,
            block_bytes=block_bytes,
            settings=settings,
        )
        self._tasks: list[asyncio.Task[None]] = []
        #: Found at the start, and not looked through yet.
        self._unchecked: list[Segment] = []
        #: Cleared ones with pinned blocks: these are moved out, then they go.
        self._condemned: list[Segment] = []
        self._has_work = asyncio.Event()
        #: Why a background task ended: a bug.
        self._bug = ""

    def __repr__(self) -> str:
        return f"<SsdTier {self._holdings.catalogue.num_blocks} blocks, {self.problem or 'in order'}>"

    async def start(self) -> None:
        """Finds what stands in the folder. Never fails for what the disk does: see `problem`."""
        await self._try_to_open()
        for task in (self._queue.run(), self._care(), self._scrub()):
            self._tasks.append(asyncio.ensure_future(task))
            self._tasks[-1].add_done_callback(self._task_ended)

    async def close(self) -> None:
        """Makes safe what was written, and gives the folder back. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        await self._queue.drain(CLOSE_WAIT_S)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if self._is_ready:
            with suppress(OSError):
                await self._appender.sync()
        await self._appender.close(CLOSE_WAIT_S)
        self._is_ready = False
        await self._files.close(CLOSE_WAIT_S)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --- what stands here -------------------------------------------------------------------------

    @property
    def problem(self) -> str:
        """Why nothing is taken, or given, at the moment; empty: both are."""
        if self._is_closed:
            return "closed"
        return self._bug or self._opening.problem or self._health.problem

    def has(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """Whether each is believed to stand here; no I/O."""
        return self._holdings.catalogue.has(keys)

    def all_keys(self) -> Iterable[bytes]:
        return self._holdings.catalogue.keys()

    def describe(self, keys: Sequence[bytes]) -> list[Description | None]:
        """What is known of single blocks, for people."""
        return self._holdings.catalogue.describe(keys, self._clock.now_s())

    def figures(self) -> TierFigures:
        figures = self._holdings.figures(size_bytes=self._settings.size_bytes, problem=self.problem)
        return replace(figures, unencoded_blocks=self._codec_failures.num_blocks)

    @property
    def holdings(self) -> Holdings:
        """For its counters."""
        return self._holdings

    # --- in and out -------------------------------------------------------------------------------

    async def read(
        self,
        keys: Sequence[bytes],
        into: Sequence[memoryview],
        on_ready: Callable[[int, bool], None] = lambda _index, _is_there: None,
    ) -> list[bool]:
        """Copies whole, verified blocks to their targets; whether each is there. See `Reader.read`."""
        return await self._reader.read(keys, into, on_ready)

    async def write(self, blocks: Sequence[StoredBlock]) -> list[bool]:
        """Stores blocks of one sequence; whether each stands here now. See `WriteQueue.write`."""
        if not self._is_ready or self._is_closed or self._bug:
            self._holdings.refused["closed"] += len(blocks)
            return [False] * len(blocks)
        return await self._queue.write(blocks)

    async def sync(self) -> bool:
        """What is stored so far outlasts a crash of the machine; False: the disk failed."""
        try:
            await self._appender.sync()
        except OSError as error:
            self._health.write_failed(error, self._clock.now_s())
            return False
        return True

    # --- what is known of blocks ------------------------------------------------------------------

    def touch(self, keys: Sequence[bytes]) -> None:
        """Somebody asked for these: they are worth more."""
        self._holdings.catalogue.touch(keys, self._clock.now_s())

    def pin(self, keys: Sequence[bytes]) -> None:
        """What of it stands here is not given up for room until `unpin`, or a restart."""
        self._holdings.catalogue.pin(keys, pinned=True)

    def unpin(self, keys: Sequence[bytes]) -> None:
        self._holdings.catalogue.pin(keys, pinned=False)

    def drop(self, keys: Sequence[bytes], reason: str) -> int:
        """Forgets blocks; how many stood here. Until their segment goes, a restart may find them again."""
        return self._holdings.drop(keys, reason)

    def clear(self, *, with_pinned: bool) -> int:
        """Drops everything, or all but pinned blocks; how many. Also what is being written. The files go soon after:
        what was cleared is not found again by a restart."""
        self._queue.give_up()
        self._appender.forget_active()
        num_before = self._holdings.catalogue.num_blocks
        for segment in list(self._holdings.catalogue.segments):
            if with_pinned or not segment.pinned_bytes:
                self._holdings.drop_segment(segment, "cleared")
            else:
                self._holdings.drop(self._loose_keys(segment), "cleared")
                self._condemned.append(segment)
        self._has_work.set()
        return num_before - self._holdings.catalogue.num_blocks

    def _loose_keys(self, segment: Segment) -> list[bytes]:
        keys = [location.key for location in self._holdings.catalogue.blocks_of(segment)]
        pinned = self._holdings.catalogue.is_pinned(keys)
        return [key for key, is_pinned in zip(keys, pinned.tolist(), strict=True) if not is_pinned]

    # --- beside -----------------------------------------------------------------------------------

    async def _try_to_open(self) -> None:
        now_s = self._clock.now_s()
        try:
            async with asyncio.timeout(self._settings.open_timeout_s):
                await open_folder(self._files, self._name)
                found = await recover(self._files, self._holdings, self._identity, self._clock)
        except OSError as error:
            if isinstance(error, BlockingIOError):
                problem = f"in use: {error}"
            else:
                problem = f"{describe(error)}: mend {self._name}, or give store.ssd.path another folder"
            self._opening.failed(problem, now_s)
            return
        except ConfigError as error:
            self._opening.failed(error.message, now_s)
            return
        self._room.recovered(found.next_sequence, found.others)
        suspects = found.segments[-_NUM_CHECKED:]
        for segment in suspects:
            await self._reader.check(self._holdings.catalogue.blocks_of(segment))
        self._unchecked = list(found.segments[:-_NUM_CHECKED])
        with suppress(OSError, NoCapacity):
            await self._appender.shrink()
        self._opening.worked()
        self._is_ready = True

    async def _care(self) -> None:
        """Opens the folder where that failed, makes safe what was written, deletes what was given up."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.sync_interval_s):
                    await self._has_work.wait()
            self._has_work.clear()
            if not self._is_ready:
                if self._opening.may_try(self._clock.now_s()):
                    await self._try_to_open()
                    if self._is_ready and self._on_found is not None:
                        self._on_found(list(self.all_keys()))
                continue
            await self.sync()
            # Both are tried again next time.
            with suppress(OSError):
                await self._appender.delete_given_up()
            with suppress(OSError, NoCapacity):
                while self._condemned:
                    await self._appender.compact(self._condemned[0])
                    self._condemned.pop(0)

    async def _scrub(self) -> None:
        """Looks through old segments, slowly: what is damaged is better known before somebody waits for it."""
        rate = self._settings.scrub_bytes_per_s
        while rate > 0:
            await self._clock.sleep(self._settings.sync_interval_s)
            while self._unchecked:
                segment = self._unchecked.pop()
                if not self._holdings.catalogue.holds(segment):
                    continue
                standing = self._holdings.catalogue.blocks_of(segment)
                while standing:
                    part = standing[: max(self._settings.read_bytes // max(standing[0].length, 1), 1)]
                    standing = standing[len(part) :]
                    await self._reader.check([each for each in part if self._holdings.catalogue.stands_at(each)])
                    await self._clock.sleep(sum(each.length for each in part) / rate)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bug = f"a bug: {error!r}"
