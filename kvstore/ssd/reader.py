"""Reads blocks: verified bytes at their target, or a miss that says why."""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.ssd.format import PAGE_BYTES, block_checksum, whole_pages
from kvstore.ssd.handover import Handover

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from contracts.clock import Clock
    from kvstore.ssd.catalogue import Location, Segment
    from kvstore.ssd.codec import BlockCodec
    from kvstore.ssd.files import BlockFiles
    from kvstore.ssd.health import Health
    from kvstore.ssd.holdings import Holdings
    from kvstore.ssd.settings import SsdSettings

#: Blocks with less than this between them are read as one: the header of the next record lies there.
_LARGEST_GAP_BYTES = 4 * PAGE_BYTES


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks that are read at once."""

    #: Places in what was asked for, and where they stand, parallel.
    indices: list[int]
    locations: list[Location]

    @property
    def segment(self) -> Segment:
        return self.locations[0].segment

    @property
    def offset(self) -> int:
        return self.locations[0].offset // PAGE_BYTES * PAGE_BYTES

    @property
    def num_bytes(self) -> int:
        return whole_pages(self.locations[-1].end) - self.offset


def plan_runs(locations: Sequence[Location | None], read_bytes: int) -> list[Run]:
    """Joins blocks that are asked for one after another and lie so on disk, up to about `read_bytes`; in the order
    asked. Those that stand nowhere are passed over."""
    runs: list[Run] = []
    for index, location in enumerate(locations):
        if location is None:
            continue
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.segment is location.segment
            and 0 <= location.offset - last.locations[-1].end <= _LARGEST_GAP_BYTES
            and location.end - last.offset <= read_bytes
        ):
            last.indices.append(index)
            last.locations.append(location)
        else:
            runs.append(Run([index], [location]))
    return runs


def verify(location: Location, data: memoryview) -> str:
    """Empty: these are the bytes that were written for this key."""
    if len(data) < location.length:
        return "truncated"
    return "" if block_checksum(location.key, data) == location.checksum else "corrupt"


class Reader:
    """All reads of one tier. On the store's loop."""

    def __init__(
        self,
        *,
        files: BlockFiles,
        clock: Clock,
        holdings: Holdings,
        health: Health,
        codecs: Mapping[int, BlockCodec],
        settings: SsdSettings,
    ) -> None:
        self._files = files
        self._clock = clock
        self._holdings = holdings
        self._health = health
        self._codecs = codecs
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.num_reads)
        self._queued_bytes = 0
        #: Reads that were given up; their threads still hang.
        self._stuck: set[asyncio.Task[list[str] | None]] = set()

    @property
    def num_stuck(self) -> int:
        return len(self._stuck)

    async def read(
        self, keys: Sequence[bytes], into: Sequence[memoryview], on_ready: Callable[[int, bool], None]
    ) -> list[bool]:
        """Whether each key's whole block is at its target now; a target whose block is not holds anything.

        `on_ready(index, is_there)` is called once for each in their order, as soon as nothing is written to that target
        any more. A cancelled call, too, ends only when nothing is.
        """
        outcomes: list[str | None] = [None] * len(keys)
        num_told = 0

        def settle(indices: Sequence[int], reasons: Sequence[str]) -> None:
            nonlocal num_told
            for index, reason in zip(indices, reasons, strict=True):
                outcomes[index] = reason
            while num_told < len(outcomes) and (outcome := outcomes[num_told]) is not None:
                self._count(outcome)
                num_told += 1
                on_ready(num_told - 1, not outcome)

        def decode(index: int, location: Location, data: memoryview) -> str:
            return self._decode(location, data, into[index])

        locations = self._holdings.catalogue.locate(keys)
        if (refusal := self._refusal(locations)) and any(location is not None for location in locations):
            settle(range(len(keys)), ["absent" if location is None else refusal for location in locations])
            return [False] * len(keys)
        absent = [index for index, location in enumerate(locations) if location is None]
        settle(absent, ["absent"] * len(absent))
        await self._all_runs(plan_runs(locations, self._settings.read_bytes), decode, settle)
        return [outcome == "" for outcome in outcomes]

    async def fetch(self, locations: Sequence[Location]) -> list[bytes | None]:
        """Verified bytes as they lie on disk; None: they could not be had."""
        found: list[bytes | None] = [None] * len(locations)

        def keep(index: int, location: Location, data: memoryview) -> str:
            if not (reason := verify(location, data)):
                found[index] = bytes(data)
            return reason

        await self._all_runs(plan_runs(locations, self._settings.read_bytes), keep, lambda _indices, _reasons: None)
        return found

    async def check(self, locations: Sequence[Location]) -> None:
        """Reads blocks to drop those that are damaged."""
        runs = plan_runs(locations, self._settings.read_bytes)
        await self._all_runs(
            runs, lambda _index, location, data: verify(location, data), lambda _indices, _reasons: None
        )

    def _refusal(self, locations: Sequence[Location | None]) -> str:
        if not any(location is not None for location in locations):
            return ""
        wanted = sum(location.length for location in locations if location is not None)
        if self._queued_bytes and self._queued_bytes + wanted > self._settings.max_read_queue_bytes:
            return "too many reads wait"
        return "" if self._health.may_read(self._clock.now_s()) else "disk failure"

    async def _all_runs(
        self,
        runs: Sequence[Run],
        use: Callable[[int, Location, memoryview], str],
        settle: Callable[[Sequence[int], Sequence[str]], None],
    ) -> None:
        deadline_s = self._clock.now_s() + self._settings.read_timeout_s
        num_bytes = sum(run.num_bytes for run in runs)
        self._queued_bytes += num_bytes

        async def one(run: Run) -> None:
            settle(run.indices, await self._one_run(run, use, deadline_s))

        try:
            async with asyncio.TaskGroup() as group:
                for run in runs:
                    group.create_task(one(run))
        finally:
            self._queued_bytes -= num_bytes

    async def _one_run(
        self, run: Run, use: Callable[[int, Location, memoryview], str], deadline_s: float
    ) -> Sequence[str]:
        """Why each block is a miss, or empty."""
        try:
            async with asyncio.timeout(max(deadline_s - self._clock.now_s(), 0.0)):
                await self._slots.acquire()
        except TimeoutError:
            return ["too slow"] * len(run.indices)
        try:
            reasons = await self._transfer(run, use, deadline_s)
        except FileNotFoundError:
            self._holdings.drop_segment(run.segment, "lost", file_is_there=False)
            return ["lost"] * len(run.indices)
        except TimeoutError as error:
            self._health.read_failed(error, self._clock.now_s())
            return ["too slow"] * len(run.indices)
        except OSError as error:
            self._health.read_failed(error, self._clock.now_s())
            return ["disk failure"] * len(run.indices)
        finally:
            self._slots.release()
        self._health.read_worked()
        for location, reason in zip(run.locations, reasons, strict=True):
            if not reason:
                self._holdings.bytes_read += location.length
            elif self._holdings.catalogue.stands_at(location):
                self._holdings.drop([location.key], reason)
        return reasons

    async def _transfer(
        self, run: Run, use: Callable[[int, Location, memoryview], str], deadline_s: float
    ) -> Sequence[str]:
        """Raises OSError; TimeoutError where the disk did not answer: what it may still say is ignored."""
        handover = Handover()

        def use_all(data: memoryview) -> list[str] | None:
            if not handover.begin():
                return None
            return [
                use(index, location, data[location.offset - run.offset : location.end - run.offset])
                for index, location in zip(run.indices, run.locations, strict=True)
            ]

        reading = asyncio.ensure_future(self._files.read(run.segment.path, run.offset, run.num_bytes, use_all))
        try:
            await asyncio.wait([reading], timeout=max(deadline_s - self._clock.now_s(), 0.0))
        except asyncio.CancelledError:
            await self._let_go(reading, handover)
            raise
        if not reading.done() and await self._let_go(reading, handover):
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time", run.segment.path)
        reasons = await reading
        if reasons is None:
            raise OSError(errno.ECANCELED, "the read was given up", run.segment.path)
        return reasons

    async def _let_go(self, reading: asyncio.Task[list[str] | None], handover: Handover) -> bool:
        """Ends the use of targets: whether it never began. Else the copies that it is about are waited for."""
        if handover.take_back():
            self._stuck.add(reading)
            reading.add_done_callback(self._forget)
            return True
        while not reading.done():
            try:
                await asyncio.wait([reading])
            except asyncio.CancelledError:
                continue
        return False

    def _forget(self, reading: asyncio.Task[list[str] | None]) -> None:
        self._stuck.discard(reading)
        if not reading.cancelled():
            reading.exception()

    def _decode(self, location: Location, data: memoryview, into: memoryview) -> str:
        """In a thread."""
        if reason := verify(location, data):
            return reason
        codec = self._codecs.get(location.codec)
        if codec is None:
            return "unknown codec"
        try:
            codec.decode(data, into)
        except Exception:
            # The bytes are what was written, so it is the codec that fails on them: a miss like any other.
            return "undecodable"
        return ""

    def _count(self, outcome: str) -> None:
        if outcome:
            self._holdings.missed[outcome] += 1
        else:
            self._holdings.num_hits += 1
