"""Blocks that wait to be written: one record is made while the one before it is written."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity
from kvstore.ssd.handover import Handover
from kvstore.ssd.records import blocks_per_record, buffer_bytes_for, encode_blocks, make_record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.clock import Clock
    from kvstore.ssd.appender import Appender
    from kvstore.ssd.codec import BlockCodec
    from kvstore.ssd.codec_failures import CodecFailures
    from kvstore.ssd.files import BlockFiles
    from kvstore.ssd.health import Health
    from kvstore.ssd.holdings import Holdings
    from kvstore.ssd.records import Record, StoredBlock
    from kvstore.ssd.settings import SsdSettings

#: Records that are written, or wait for that behind another: the disk goes from one to the next without waiting for us.
_NUM_WRITERS = 2
#: Of the records being written, one that waits, and one that is filled.
_NUM_BUFFERS = _NUM_WRITERS + 2


@dataclass(slots=True, eq=False, kw_only=True)
class _Batch:
    """What becomes one record."""

    blocks: list[StoredBlock]
    #: Those of another generation are not written any more.
    generation: int
    handover: Handover = field(default_factory=Handover)
    #: The blocks' memory is not looked at any more.
    copied: asyncio.Event = field(default_factory=asyncio.Event)
    #: Empty where it is stored, else why not.
    done: asyncio.Future[str]


class WriteQueue:
    """On the store's loop. `run` is a task of its owner."""

    def __init__(
        self,
        *,
        files: BlockFiles,
        clock: Clock,
        holdings: Holdings,
        health: Health,
        appender: Appender,
        exact: BlockCodec,
        lossy: BlockCodec,
        failures: CodecFailures,
        block_bytes: int,
        settings: SsdSettings,
    ) -> None:
        self._files = files
        self._clock = clock
        self._holdings = holdings
        self._health = health
        self._appender = appender
        self._exact = exact
        self._lossy = lossy
        self._failures = failures
        self._block_bytes = block_bytes
        self._settings = settings
        payload_bytes = settings.record_bytes_for(block_bytes)
        self._blocks_per_record = blocks_per_record(block_bytes, payload_bytes)
        self._buffer_bytes = buffer_bytes_for(block_bytes, payload_bytes)
        self._waiting: asyncio.Queue[_Batch] = asyncio.Queue()
        self._made: asyncio.Queue[tuple[_Batch, Record]] = asyncio.Queue(1)
        self._buffers: asyncio.Queue[memoryview] = asyncio.Queue()
        #: All that are not done, in the order asked.
        self._open: dict[_Batch, None] = {}
        self._queued_bytes = 0
        self._generation = 0

    async def write(self, blocks: Sequence[StoredBlock]) -> list[bool]:
        """Whether each stands on disk now; it outlasts a crash of the machine a little later. Its payload is not looked
        at any more then, also where this was cancelled. Raises ValueError for a payload that is no block."""
        for block in blocks:
            if block.payload.nbytes != self._block_bytes:
                raise ValueError(f"a block has {self._block_bytes} bytes, not {block.payload.nbytes}")
        keys = [block.key for block in blocks]
        known = self._holdings.catalogue.has(keys).tolist()
        # Each key once.
        fresh = list({block.key: block for block, is_known in zip(blocks, known, strict=True) if not is_known}.values())
        if fresh:
            batches = self._enqueue(fresh)
            try:
                await self._wait(batches)
            finally:
                for batch in batches:
                    await self._let_go(batch)
        return [bool(is_here) for is_here in self._holdings.catalogue.has(keys)]

    def give_up(self) -> None:
        """What waits is not written any more."""
        self._generation += 1

    async def drain(self, wait_s: float) -> None:
        """Waits for what was taken to be written, or not."""
        if self._open:
            await asyncio.wait([batch.done for batch in self._open], timeout=wait_s)

    async def run(self) -> None:
        """Until it is cancelled; then everybody who waits is told."""
        for _ in range(_NUM_BUFFERS - self._buffers.qsize()):
            self._buffers.put_nowait(self._files.buffer(self._buffer_bytes))
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._make_records())
                for _ in range(_NUM_WRITERS):
                    group.create_task(self._append_records())
        finally:
            self.give_up()
            for batch in list(self._open):
                batch.copied.set()
                self._finish(batch, "closed")

    def _enqueue(self, blocks: list[StoredBlock]) -> list[_Batch]:
        if not self._health.may_write(self._clock.now_s()):
            self._holdings.refused["closed"] += len(blocks)
            return []
        room_bytes = self._settings.max_write_queue_bytes - self._queued_bytes
        if len(taken := blocks[: max(room_bytes // self._block_bytes, 0)]) < len(blocks):
            self._holdings.refused["too many writes wait"] += len(blocks) - len(taken)
        self._queued_bytes += len(taken) * self._block_bytes
        loop = asyncio.get_running_loop()
        batches = [
            _Batch(
                blocks=taken[start : start + self._blocks_per_record],
                generation=self._generation,
                done=loop.create_future(),
            )
            for start in range(0, len(taken), self._blocks_per_record)
        ]
        for batch in batches:
            self._open[batch] = None
            self._waiting.put_nowait(batch)
        return batches

    async def _wait(self, batches: Sequence[_Batch]) -> None:
        if batches:
            await asyncio.wait([batch.done for batch in batches], timeout=self._settings.write_timeout_s)

    async def _let_go(self, batch: _Batch) -> None:
        """Nobody looks at the blocks' memory after this."""
        if batch.done.done() or batch.handover.take_back():
            return
        while not batch.copied.is_set():
            try:
                await batch.copied.wait()
            except asyncio.CancelledError:
                # It is a matter of copying some blocks.
                continue

    async def _make_records(self) -> None:
        while True:
            batch = await self._waiting.get()
            buffer = await self._buffers.get()
            record: Record | None = None
            try:
                if batch.generation == self._generation:
                    record = await self._files.work(partial(self._make_record, batch, buffer))
            except OSError:
                # The files are closed.
                pass
            finally:
                batch.copied.set()
            if record is None:
                self._buffers.put_nowait(buffer)
                self._finish(batch, "given up")
            else:
                await self._made.put((batch, record))

    def _make_record(self, batch: _Batch, buffer: memoryview) -> Record | None:
        """In a thread. None: the blocks' memory is not ours any more."""
        if not batch.handover.begin():
            return None
        encoded = encode_blocks(batch.blocks, self._exact, self._lossy, self._failures.add)
        return make_record(buffer, encoded, len(batch.blocks))

    async def _append_records(self) -> None:
        while True:
            batch, record = await self._made.get()
            buffer = record.buffer
            try:
                reason = await self._append(batch, record)
            except TimeoutError as error:
                # The hanging thread may still read from it.
                buffer = self._files.buffer(self._buffer_bytes)
                reason = self._failed(batch, error)
            except NoCapacity as error:
                self._health.no_room(error.message, self._clock.now_s())
                reason = "no room"
            except OSError as error:
                reason = self._failed(batch, error)
            self._finish(batch, reason)
            self._buffers.put_nowait(buffer)

    async def _append(self, batch: _Batch, record: Record) -> str:
        if batch.generation != self._generation:
            return "given up"
        await self._appender.append(record)
        self._health.write_worked()
        if batch.generation != self._generation:
            # The tier was cleared while this was written.
            self._holdings.drop([block.key for block in batch.blocks], "cleared")
            return "given up"
        return ""

    def _failed(self, batch: _Batch, error: OSError) -> str:
        if batch.generation != self._generation:
            # With one before it, or because the tier was cleared.
            return "given up"
        self._health.write_failed(error, self._clock.now_s())
        self.give_up()
        return "disk failure"

    def _finish(self, batch: _Batch, reason: str) -> None:
        del self._open[batch]
        self._queued_bytes -= len(batch.blocks) * self._block_bytes
        if reason:
            self._holdings.refused[reason] += len(batch.blocks)
        batch.done.set_result(reason)
