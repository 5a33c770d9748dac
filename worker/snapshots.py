"""A worker's snapshots: what it warmed up is written when it leaves, and stands again soon after its next life began.

Thin: what is worth keeping and in which order is `coldstart.snapshot.recorder`'s, how it is kept that of the modules
beside it; here blocks of the pool become sections of a file and back. Reading begins with the process, while it loads
its weights. Nobody waits for a restored block: what stands when a prompt comes is found, the rest is computed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from coldstart.snapshot.codecs import CodecRegistry
from coldstart.snapshot.format import MAX_SECTION_BYTES, Owner
from coldstart.snapshot.reading import Prefetch
from coldstart.snapshot.recorder import UseRecorder
from coldstart.snapshot.writing import Draft, write_snapshot
from contracts.errors import DeadlineExceeded, LoadError, TandemError
from engine.live_latency import LearnedSteps
from kvstore.ssd.codec import copy
from prefill.admission import may_fetch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

    from coldstart.snapshot.folder import SnapshotFolder
    from coldstart.snapshot.format import BlockEntry, Section
    from coldstart.snapshot.reading import Loaded
    from coldstart.snapshot.writing import Written
    from contracts.clock import Clock
    from contracts.ids import BlockId
    from contracts.layout import KvIdentity
    from engine.live_latency import LiveLatency
    from engine.room import Room
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvtransfer import Ledger

#: Names of blocks' holders in the ledger.
_RESTORES, _WRITES = "snapshot/restore", "snapshot/write"
#: Read ahead of the weights; what is decoded and not restored yet.
_AHEAD_BYTES = 64 << 20
#: Of blocks that are kept together: small beside a snapshot, large beside a disk's latency.
_SECTION_BYTES = 1 << 20
#: What a block costs in the file beside its bytes.
_ENTRY_BYTES = 96
#: A snapshot that has not come by then, counted from when there is memory for it, is left.
RESTORE_S = 30.0
#: Registering waits so long at most for what is being restored, and no longer than computing it would take.
LONGEST_HOLD_S = 0.5
_UNKNOWN_HOLD_S = 0.05
_LOOK_S = 0.01
WRITE_INTERVAL_S = 300.0
WRITE_S = 60.0
#: Of writing before the process ends: within what its node agent gives it.
LEAVE_S = 2.0
#: Of that, for sections that are begun: what is needed first is written first.
_LEAVE_WRITING_S = 1.0

_KV, _STEPS = "kv", "steps"


class _Steps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    #: Other machines, thread counts and kernels take other times.
    machine: str
    learned: LearnedSteps


_STEPS_DECODER = msgspec.msgpack.Decoder(_Steps)


class Warmed(Protocol):
    """What of a worker is kept: `worker.shell.WorkerShell`."""

    @property
    def ledger(self) -> Ledger: ...
    @property
    def prefixes(self) -> PrefixCache: ...
    @property
    def room(self) -> Room: ...


class WorkerSnapshots:
    """Of one life. Use: construct as early as can be, then `serve` and `async with` what it returns around the worker's
    service; `close` where it does not come to that."""

    def __init__(
        self,
        folder: SnapshotFolder,
        *,
        model: tuple[str, ...],
        worker_id: str,
        build: str,
        clock: Clock,
        log: Callable[[str], None],
        codecs: CodecRegistry | None = None,
    ) -> None:
        """`model`: as `SnapshotFolder.path_of`. Needs a running loop."""
        self.folder = folder
        self.path = folder.path_of(model, worker_id)
        self.worker_id = worker_id
        self.build = build
        self.clock = clock
        self.log = log
        self.codecs = codecs or CodecRegistry()
        self.news = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_news() -> None:
            # Where the loop is closed nobody waits any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self.news.set)

        self.prefetch = Prefetch(
            lambda: folder.find(model, worker_id), self.codecs, ahead_bytes=_AHEAD_BYTES, on_news=on_news
        )

    def close(self) -> None:
        self.prefetch.close()

    def serve(
        self,
        worker: Warmed,
        latency: LiveLatency,
        pool: memoryview,
        *,
        identity: KvIdentity,
        machine: str,
        max_batch_tokens: int,
    ) -> SnapshotService:
        """`pool` holds the blocks of the worker's ledger; `machine`: whatever step times depend on."""
        return SnapshotService(
            self, worker, latency, pool, identity=identity, machine=machine, max_batch_tokens=max_batch_tokens
        )


class SnapshotService:
    """Restores within its context, writes now and then, and once more where that is left by cancellation: the worker
    was told to go, and nothing is wrong with it."""

    def __init__(
        self,
        snapshots: WorkerSnapshots,
        worker: Warmed,
        latency: LiveLatency,
        pool: memoryview,
        *,
        identity: KvIdentity,
        machine: str,
        max_batch_tokens: int,
    ) -> None:
        self._own = snapshots
        self._prefetch = snapshots.prefetch
        self._clock = snapshots.clock
        self._ledger, self._prefixes, self._room = worker.ledger, worker.prefixes, worker.room
        self._latency = latency
        self._pool = pool
        self._layout = identity.layout
        self._owner = Owner(identity=identity, build=snapshots.build)
        self._machine = machine
        self._max_batch_tokens = max_batch_tokens
        self.recorder = UseRecorder()
        self._prefixes.on_used = self._used
        #: Standing because they were restored, in order.
        self._restored: list[bytes] = []
        self.restored_blocks_total = 0
        self._lost: list[str] = []
        self._refused: str | None = None
        self._is_full = False
        #: What the file of this worker holds, as far as this life knows.
        self._written: frozenset[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        #: The last write, which may hang in a disk.
        self._writer: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<SnapshotService {self._own.path.name}, {self.restored_blocks_total} restored, {self.recorder!r}>"

    @property
    def path(self) -> Path:
        """Of this worker's own snapshot, whether it is there or not."""
        return self._own.path

    async def restored(self) -> None:
        """Returns when no block comes any more."""
        await asyncio.wait(self._tasks[:1])

    async def __aenter__(self) -> Self:
        self._tasks = [
            asyncio.create_task(self._restore(), name="snapshot-restore"),
            asyncio.create_task(self._write_now_and_then(), name="snapshot-write"),
        ]
        try:
            await self._hold(self._tasks[0])
        except BaseException:
            for task in self._tasks:
                task.cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        self._prefixes.on_used = None
        self._prefetch.close()
        if kind is asyncio.CancelledError:
            await self._write(LEAVE_S, _LEAVE_WRITING_S)

    def _used(self, chain: KeyChain, num_blocks: int) -> None:
        # What went through a lossy codec is not kept here: it has a tier of its own.
        if chain.kv_class == "exact":
            self.recorder.note(chain.part(0, num_blocks))

    # --- coming back ------------------------------------------------------------------------------

    async def _hold(self, restoring: asyncio.Task[None]) -> None:
        """Returns when all is restored, or as soon as computing it would not have taken longer than this has."""
        begin_s = self._clock.now_s()
        while not restoring.done() and self._clock.now_s() - begin_s < self._worth_s():
            await asyncio.wait([restoring], timeout=_LOOK_S)

    def _worth_s(self) -> float:
        """What waiting for the snapshot may cost."""
        num_tokens = self._prefetch.num_blocks * self._layout.block_tokens
        if not num_tokens or self._latency.as_latency_model() is None:
            # Its table, and the step times that stand first, are a moment away or do not come.
            return _UNKNOWN_HOLD_S
        computing_s = self._latency.reading_s(tokens=num_tokens, num_computed=0, max_tokens=self._max_batch_tokens)
        return min(LONGEST_HOLD_S, computing_s)

    async def _restore(self) -> None:
        begin_s = self._clock.now_s()
        try:
            async with asyncio.timeout(RESTORE_S):
                await self._take_all()
            self._tell(self._clock.now_s() - begin_s)
        except TimeoutError:
            self._own.log(f"{self._own.worker_id}: its snapshot has not come within {RESTORE_S:g} s, and is left")
        except Exception as error:
            # Serving goes on without it.
            self._own.log(f"{self._own.worker_id}: its snapshot is left: {error!r}")
        finally:
            self._prefetch.close()
            self._settle()

    async def _take_all(self) -> None:
        checked = False
        while not self._is_full:
            self._own.news.clear()
            loaded = self._prefetch.take()
            if loaded is None:
                if self._prefetch.is_over:
                    return
                await self._own.news.wait()
                continue
            if not checked and (refusal := self._refusal()) is not None:
                self._refused = refusal
                return
            checked = True
            self._take(loaded)
            # Between two sections others have their turn.
            await asyncio.sleep(0)

    def _refusal(self) -> str | None:
        owner = self._prefetch.owner
        return None if owner is None else self._owner.mismatch(owner)

    def _take(self, loaded: Loaded) -> None:
        section, data = loaded.section, loaded.data
        if data is None:
            self._lost.append(loaded.problem)
        elif section.kind == _STEPS:
            self._take_steps(data)
        elif section.kind == _KV and self._prefixes.enabled:
            self._take_blocks(section, data)

    def _take_steps(self, data: memoryview) -> None:
        try:
            steps = _STEPS_DECODER.decode(data)
        except msgspec.MsgspecError as error:
            self._lost.append(f"step times cannot be read: {error}")
            return
        if steps.machine == self._machine:
            self._latency.recall(steps.learned)

    def _take_blocks(self, section: Section, data: memoryview) -> None:
        block_bytes = self._layout.block_bytes
        if section.num_bytes != len(section.blocks) * block_bytes:
            self._lost.append(f"section {section.name}: {section.num_bytes} bytes for {len(section.blocks)} blocks")
            return
        stand: list[BlockEntry] = []
        for number, entry in enumerate(section.blocks):
            if self._ledger.lookup(entry.key) is None:
                # Nobody finds a block behind a gap.
                if entry.parent is not None and self._ledger.lookup(entry.parent) is None:
                    continue
                if not self._has_room():
                    self._is_full = True
                    break
                self._put(entry.key, data[number * block_bytes : (number + 1) * block_bytes])
            stand.append(entry)
        self.recorder.carry(stand)

    def _has_room(self) -> bool:
        """For one block more. Only what was never used is taken: whatever is cached by now is later news."""
        return self._ledger.load()["free_blocks"] > 0 and may_fetch(1, self._room.view())

    def _put(self, key: bytes, data: memoryview) -> None:
        blocks = self._ledger.allocate(_RESTORES, 1)
        assert blocks is not None, self._ledger
        # Nobody can know of it before it has its key.
        copy(self._block(blocks[0]), data)
        self._ledger.set_key(blocks[0], key)
        self._ledger.release(_RESTORES, blocks)
        self._restored.append(key)
        self.restored_blocks_total += 1

    def _block(self, block: BlockId) -> memoryview:
        start = block * self._layout.block_bytes
        return self._pool[start : start + self._layout.block_bytes]

    def _settle(self) -> None:
        """What was needed first is given up last."""
        self._ledger.release_all(_RESTORES)
        found = [self._ledger.lookup(key) for key in self._restored]
        cached = [block for block in found if block is not None and self._ledger.is_cached(block)]
        self._ledger.share(_RESTORES, cached)
        self._ledger.release(_RESTORES, cached)
        self._restored = []

    def _tell(self, took_s: float) -> None:
        name, problem = self._own.worker_id, self._prefetch.problem
        if problem is not None:
            self._own.log(f"{name}: no snapshot: {problem}")
            return
        if self._prefetch.path is None:
            return
        if self._refused is not None:
            self._own.log(f"{name}: no snapshot: {self._prefetch.path} is of another life: {self._refused}")
            return
        self._own.folder.note_used(self._prefetch.path)
        tokens = self.restored_blocks_total * self._layout.block_tokens
        full = "; there is no room for more" if self._is_full else ""
        lost = f"; lost: {'; '.join(self._lost[:3])}" if self._lost else ""
        self._own.log(
            f"{name}: {self.restored_blocks_total} of {self._prefetch.num_blocks} blocks ({tokens} tokens) restored "
            f"from {self._prefetch.path.name} in {1e3 * took_s:.0f} ms{full}{lost}"
        )

    # --- going ------------------------------------------------------------------------------------

    async def _write_now_and_then(self) -> None:
        while True:
            await self._clock.sleep(WRITE_INTERVAL_S)
            await self._write(WRITE_S)

    async def _write(self, within_s: float, enough_s: float = WRITE_S) -> None:
        """As much as is begun within `enough_s`; nothing where nobody asked for anything in this life, or what is worth
        keeping is what was written last. Never raises but when cancelled."""
        if not self.recorder.num_prompts or (self._writer is not None and self._writer.is_alive()):
            return
        most = self._own.folder.most_bytes // (self._layout.block_bytes + _ENTRY_BYTES)
        chosen = self.recorder.chosen(most, lambda key: self._ledger.lookup(key) is not None)
        keys = frozenset(entry.key for entry in chosen)
        if keys == self._written:
            return
        blocks = [self._ledger.lookup(entry.key) for entry in chosen]
        held = [block for block in blocks if block is not None]
        cancelled = threading.Event()
        self._ledger.share(_WRITES, held)
        try:
            begin_s = self._clock.now_s()
            written = await self._in_thread(self._drafts(chosen, held), cancelled, within_s, begin_s + enough_s)
            self._written = keys
            took_ms = 1e3 * (self._clock.now_s() - begin_s)
            less = "" if written.num_blocks == len(chosen) else f", {len(chosen)} were worth it"
            self._own.log(
                f"{self._own.worker_id}: a snapshot of {written.num_blocks} blocks is written: {written.num_bytes} "
                f"bytes in {took_ms:.0f} ms{less}"
            )
        except TandemError as error:
            self._own.log(f"{self._own.worker_id}: no snapshot is written: {error.message}")
        finally:
            # Before its blocks are let go: what it reads from then on it does not put in place.
            cancelled.set()
            self._ledger.release(_WRITES, held)

    def _drafts(self, chosen: list[BlockEntry], blocks: list[BlockId]) -> list[Draft]:
        """Step times first: registering tells them, before any prompt comes."""
        steps = memoryview(msgspec.msgpack.encode(_Steps(machine=self._machine, learned=self._latency.learned())))
        drafts = [Draft(name=_STEPS, kind=_STEPS, codec="zstd", data=lambda: steps)]
        block_bytes = self._layout.block_bytes
        together = max(1, min(_SECTION_BYTES, MAX_SECTION_BYTES) // block_bytes)
        for start in range(0, len(chosen), together):
            part = tuple(blocks[start : start + together])

            def gather(part: tuple[BlockId, ...] = part) -> memoryview:
                data = memoryview(bytearray(len(part) * block_bytes))
                for number, block in enumerate(part):
                    copy(data[number * block_bytes : (number + 1) * block_bytes], self._block(block))
                return data

            entries = tuple(chosen[start : start + together])
            drafts.append(Draft(name=f"kv-{start}", kind=_KV, codec="raw", data=gather, blocks=entries))
        return drafts

    async def _in_thread(
        self, drafts: list[Draft], cancelled: threading.Event, within_s: float, enough_at_s: float
    ) -> Written:
        """Raises what `write_snapshot` raises, and DeadlineExceeded. The thread may outlast this where a
        disk hangs, and ends with the process."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Written] = loop.create_future()

        def settle(result: Written | TandemError) -> None:
            if done.done():
                return
            if isinstance(result, TandemError):
                done.set_exception(result)
            else:
                done.set_result(result)

        def work() -> None:
            result: Written | TandemError
            try:
                result = self._write_file(drafts, cancelled.is_set, enough_at_s)
            except TandemError as error:
                result = error
            except Exception as error:
                result = LoadError(f"{self._own.path}: {error!r}")
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, result)

        self._writer = threading.Thread(target=work, name="snapshot-write", daemon=True)
        self._writer.start()
        try:
            async with asyncio.timeout(within_s):
                return await done
        except TimeoutError:
            raise DeadlineExceeded(f"{self._own.path}: not written within {within_s:g} s") from None

    def _write_file(self, drafts: list[Draft], is_cancelled: Callable[[], bool], enough_at_s: float) -> Written:
        folder, path = self._own.folder, self._own.path
        folder.prepare()
        written = write_snapshot(
            path,
            self._owner,
            drafts,
            self._own.codecs,
            is_enough=lambda: self._clock.now_s() >= enough_at_s,
            is_cancelled=is_cancelled,
        )
        for name in folder.make_room(path, self._clock.wall_s()):
            self._own.log(f"{self._own.worker_id}: {name} made room for another snapshot")
        return written
