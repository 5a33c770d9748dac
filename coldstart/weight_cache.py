"""The DRAM tier of a node agent: the shell around `Residence`.

It listens at the door, holds the memory, and has a loader fill it (a process of its own, so that whatever happens to
it, nothing here is half full). Memory that a loader filled is sealed before anybody gets it. Copies gone cold are
compressed by such a process too, where that is a gain (`coldstart.cold_copies`).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hmac
import os
import secrets
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from coldstart.cold_copies import RawMemory
from coldstart.handing import LENGTH, MAX_MESSAGE_BYTES, Coming, Given, Refused, WeightsDoor, Wish, framed
from coldstart.residence import (
    Abort,
    Advanced,
    Asked,
    Begin,
    Compress,
    Compressed,
    CompressionFailed,
    CompressionSized,
    Cooled,
    CopyState,
    DropCompressed,
    DropRaw,
    Evict,
    Fill,
    Gone,
    Hand,
    Loaded,
    LoadFailed,
    Refuse,
    Residence,
    Sized,
    Ticked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from coldstart.cold_copies import ColdCopies, Compressing
    from coldstart.handing import Answer
    from coldstart.residence import Copy, ResidenceEvent, ResidenceInstruction, WeightsKey
    from contracts.clock import Clock

#: A caller may take so long to say what it wants.
WISH_TIMEOUT_S = 2.0
#: Callers that were accepted and have not said what they want; one more waits in the kernel's queue.
_BACKLOG = 64
_LOOK_INTERVAL_S = 1.0
_PEER_CREDENTIALS_BYTES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What a loader put into its memory."""

    num_bytes: int
    index_bytes: int
    #: "original" (it was fused there), "ssd", "remote", "compressed".
    tier: str
    #: Where the same weights would come from next time if they were not in memory.
    next_tier: str


@dataclass(frozen=True, slots=True)
class LoadPoint:
    """How far a load is."""

    #: "weights", "conversion: written", ...
    what: str = "weights"
    #: 0 to 1; None where there is no telling.
    fraction: float | None = None


class Load(Protocol):
    """One load under way, over a descriptor of empty memory."""

    @property
    def point(self) -> LoadPoint: ...

    async def sized(self) -> int:
        """Bytes of memory that it needs. Raises LoadError or ConfigError."""
        ...

    async def filled(self) -> Filled:
        """Lets it take the memory, which has that size now; returns when all is there, verified, and the loader holds
        no mapping of it any more. Raises LoadError or ConfigError."""
        ...

    async def abort(self) -> None:
        """Ends it; returns when it holds nothing any more. Idempotent, also after its end."""
        ...


@dataclass(slots=True, kw_only=True)
class _Memory:
    """A resident copy."""

    descriptor: int
    filled: Filled
    #: Where it would have to come from if it were not here in any form.
    next_tier: str


class WeightCache:
    """Use `run` as a task between `open` and `close`."""

    def __init__(
        self,
        budget_bytes: int,
        start_load: Callable[[WeightsKey, int, int | None], Load],
        clock: Clock,
        log: Callable[[str], None],
        *,
        cold: ColdCopies | None = None,
    ) -> None:
        """`start_load(key, descriptor, compressed)` begins to fill a memfd, which stays this object's own, with what a
        read-only one holds compressed, or (None) from the next tier. `cold`: None where nothing is compressed."""
        self._cold = cold
        self._machine = Residence(budget_bytes)
        self._start_load = start_load
        self._clock = clock
        self._log = log
        self.door = WeightsDoor(
            socket_name=f"tandem-weights-{os.getpid()}-{secrets.token_hex(8)}", secret=secrets.token_hex(32)
        )
        self._listener: socket.socket | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: Present while a load runs.
        self._loading: dict[int, asyncio.Task[None]] = {}
        self._points: dict[int, Callable[[], LoadPoint]] = {}
        self._room: dict[int, asyncio.Future[int]] = {}
        self._memory: dict[WeightsKey, _Memory] = {}
        #: Who waits for an answer.
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._next_client = 1

    def copies(self) -> tuple[Copy, ...]:
        return self._machine.copies()

    @property
    def budget_bytes(self) -> int:
        return self._machine.budget_bytes

    def open(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.door.socket_name)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)

    async def close(self) -> None:
        """Ends loads, hangs up, and gives all memory back that no worker maps."""
        for task in (*self._tasks, *self._loading.values()):
            task.cancel()
        await asyncio.gather(*self._tasks, *self._loading.values(), return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        for memory in self._memory.values():
            os.close(memory.descriptor)
        self._memory.clear()
        if self._cold is not None:
            self._cold.close()

    def want(self, key: WeightsKey) -> None:
        """Somebody is about to ask for it: the load may begin."""
        self._take(Asked(None, key))

    async def run(self) -> None:
        """Serves callers until it is cancelled."""
        assert self._listener is not None, "opened before"
        ticking = asyncio.create_task(self._tick(), name="weights-clock")
        self._tasks.add(ticking)
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError:
                # The caller left again, or no descriptor is free.
                await self._clock.sleep(0.05)
                continue
            task = asyncio.create_task(self._serve(connection), name="weights-caller")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tick(self) -> None:
        told = dict[int, LoadPoint]()
        while True:
            await self._clock.sleep(_LOOK_INTERVAL_S)
            points = {load: point() for load, point in self._points.items()}
            for load in [load for load, point in points.items() if point != told.get(load, LoadPoint())]:
                self._take(Advanced(load))
            told = points
            deadline_s = self._machine.deadline_s
            if deadline_s is not None and self._clock.now_s() >= deadline_s:
                self._take(Ticked())
            self._look_at_cold()

    # --- callers --------------------------------------------------------------------------------------

    async def _serve(self, connection: socket.socket) -> None:
        client, self._next_client = self._next_client, self._next_client + 1
        try:
            connection.setblocking(False)
            wish = await self._wish(connection)
            if wish is None:
                return
            loop = asyncio.get_running_loop()
            answer = self._answers[client] = loop.create_future()
            hung_up = asyncio.ensure_future(loop.sock_recv(connection, 1))
            try:
                self._take(Asked(client, wish.key))
                await self._until_answered(connection, wish, answer, hung_up)
                if answer.done() and not hung_up.done() and self._send(connection, answer.result(), wish.key):
                    # It has nothing more to say: whatever comes is the end.
                    await asyncio.wait([hung_up])
            finally:
                hung_up.cancel()
                await asyncio.gather(hung_up, return_exceptions=True)
        except OSError:
            return
        finally:
            self._answers.pop(client, None)
            self._take(Gone(client))
            connection.close()

    async def _until_answered(
        self, connection: socket.socket, wish: Wish, answer: asyncio.Future[Answer], hung_up: asyncio.Future[bytes]
    ) -> None:
        """Or the caller has left. Meanwhile it is told how its load gets on."""
        told = self._coming(wish.key)
        news: tuple[asyncio.Future[Any], ...] = (answer, hung_up)
        while not any(each.done() for each in news):
            await asyncio.wait(news, timeout=_LOOK_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED)
            coming = self._coming(wish.key)
            if wish.hears_progress and coming != told and not answer.done():
                told = coming
                with contextlib.suppress(BlockingIOError):
                    # One that takes nothing misses it.
                    connection.send(framed(coming))

    def _coming(self, key: WeightsKey) -> Coming:
        """Where the line stands, from where this key is."""
        point = next((point() for point in self._points.values()), LoadPoint())
        return Coming(num_ahead=self._machine.num_ahead(key), what=point.what, fraction=point.fraction)

    async def _wish(self, connection: socket.socket) -> Wish | None:
        """None for somebody who is not to be answered."""
        loop = asyncio.get_running_loop()
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS_BYTES)
        if int.from_bytes(raw[4:8], "little") != os.getuid():
            return None
        try:
            async with asyncio.timeout(WISH_TIMEOUT_S):
                data = b""
                while len(data) < LENGTH.size or len(data) < LENGTH.size + LENGTH.unpack(data[: LENGTH.size])[0]:
                    piece = await loop.sock_recv(connection, MAX_MESSAGE_BYTES)
                    data += piece
                    if not piece or len(data) > MAX_MESSAGE_BYTES:
                        return None
            wish = msgspec.json.decode(data[LENGTH.size :], type=Wish)
        except (TimeoutError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        return wish if hmac.compare_digest(wish.secret.encode(), self.door.secret.encode()) else None

    def _send(self, connection: socket.socket, answer: Answer, key: WeightsKey) -> bool:
        """An answer fits into the buffer of its socket, which its reader has emptied: it never waits. Raises OSError
        where the reader takes nothing."""
        if isinstance(answer, Refused):
            connection.send(framed(answer))
            return False
        socket.send_fds(connection, [framed(answer)], [self._memory[key].descriptor])
        return True

    # --- the machine ----------------------------------------------------------------------------------

    def _take(self, event: ResidenceEvent) -> None:
        for instruction in self._machine.handle(event, self._clock.now_s()):
            self._carry_out(instruction)

    def _carry_out(self, instruction: ResidenceInstruction) -> None:
        match instruction:
            case Begin(load, key, is_decoding):
                self._run(load, self._load(load, key, is_decoding))
            case Compress(load, key):
                self._run(load, self._compress(load, key))
            case Fill(load, num_bytes):
                self._room[load].set_result(num_bytes)
            case Abort(load):
                self._loading[load].cancel()
            case Hand(client, key):
                memory = self._memory[key]
                filled = memory.filled
                self._answer(client, Given(num_bytes=filled.num_bytes, index_bytes=filled.index_bytes))
            case Refuse(client, _, reason):
                self._answer(client, Refused(reason=reason))
            case Evict(key, reason):
                self._drop_raw(key)
                if self._cold is not None:
                    self._cold.forget(key)
                self._log(f"weights of {key.folder} leave memory: {reason}")
            case DropRaw(key):
                self._drop_raw(key)
            case DropCompressed(key, reason):
                if self._cold is not None and self._cold.drop(key):
                    self._log(f"compressed weights of {key.folder} leave memory: {reason}")

    def _run(self, load: int, work: Coroutine[object, object, None]) -> None:
        task = self._loading[load] = asyncio.create_task(work, name=f"load-{load}")
        task.add_done_callback(lambda _: self._loading.pop(load, None))

    def _drop_raw(self, key: WeightsKey) -> None:
        memory = self._memory.pop(key, None)
        if memory is not None:
            os.close(memory.descriptor)

    def _answer(self, client: int, answer: Answer) -> None:
        waiting = self._answers.get(client)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    async def _load(self, load: int, key: WeightsKey, is_decoding: bool) -> None:
        writable = -1
        room = self._room[load] = asyncio.get_running_loop().create_future()
        started_s = self._clock.now_s()
        under_way: Load | None = None
        event: ResidenceEvent
        try:
            writable = os.memfd_create("tandem-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            compressed = self._cold.descriptor(key) if self._cold is not None and is_decoding else None
            under_way = started = self._start_load(key, writable, compressed)
            self._points[load] = lambda: started.point
            self._take(Sized(load, await under_way.sized()))
            num_bytes = await room
            os.ftruncate(writable, num_bytes)
            filling_s = self._clock.now_s()
            filled = await under_way.filled()
            next_tier = None if self._cold is None else self._cold.next_tier(key)
            memory = _Memory(descriptor=_sealed(writable), filled=filled, next_tier=next_tier or filled.next_tier)
            now_s = self._clock.now_s()
            seconds = now_s - started_s
            self._log(f"weights of {key.folder}: {num_bytes} bytes in memory from {filled.tier} in {seconds:.2f} s")
            if self._cold is not None:
                self._cold.observe_load(filled.tier, num_bytes, now_s - filling_s, now_s)
            self._memory[key] = memory
            event = Loaded(load)
        except asyncio.CancelledError:
            return
        except Exception as error:
            # Whatever it was, its clients wait: they are told, and read their weights themselves.
            message = str(error) or type(error).__name__
            self._log(f"weights of {key.folder} are not loaded: {message}")
            event = LoadFailed(load, message)
        finally:
            await self._see_out(load, under_way, writable)
        self._take(event)

    async def _see_out(self, load: int, under_way: Load | Compressing | None, writable: int) -> None:
        self._room.pop(load, None)
        self._points.pop(load, None)
        if under_way is not None:
            with contextlib.suppress(Exception):
                await asyncio.shield(under_way.abort())
        if writable >= 0:
            os.close(writable)

    # --- copies gone cold -----------------------------------------------------------------------------

    def _look_at_cold(self) -> None:
        if self._cold is None:
            return
        key = self._cold.coldest(
            self._machine.copies(),
            self._machine.budget_bytes,
            lambda key: self._memory[key].next_tier,
            self._clock.now_s(),
        )
        if key is not None:
            self._take(Cooled(key))

    async def _compress(self, load: int, key: WeightsKey) -> None:
        assert self._cold is not None, "nothing else begins it"
        writable = -1
        room = self._room[load] = asyncio.get_running_loop().create_future()
        started_s = self._clock.now_s()
        under_way: Compressing | None = None
        memory = self._memory[key]
        copy = next(copy for copy in self._machine.copies() if copy.key == key)
        try:
            writable = os.memfd_create("tandem-cold-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            raw = RawMemory(
                descriptor=memory.descriptor,
                weight_bytes=memory.filled.num_bytes,
                index_bytes=memory.filled.index_bytes,
            )
            under_way = self._cold.start(key, raw, writable)
            trial = await under_way.tried()
            verdict = self._cold.judge_trial(
                copy,
                trial,
                self._machine.copies(),
                self._machine.budget_bytes,
                memory.next_tier,
                self._clock.now_s(),
            )
            if verdict.action == "compress":
                self._take(CompressionSized(load, trial.bound_bytes))
                os.ftruncate(writable, await room)
                num_bytes = await under_way.compressed()
                os.ftruncate(writable, num_bytes)
                sealed = _sealed(writable)
                # From here on without a wait: nobody may ask for it in between.
                self._cold.keep(key, sealed, memory.next_tier)
                now_s = self._clock.now_s()
                self._log(
                    f"weights of {key.folder}: {copy.num_bytes} bytes compressed to {num_bytes} in "
                    f"{now_s - started_s:.2f} s, not used for {now_s - copy.used_s:.0f} s: {verdict.reason}"
                )
                self._take(Compressed(load, num_bytes))
                return
        except asyncio.CancelledError:
            if copy.state is CopyState.RESIDENT:
                self._log(f"weights of {key.folder} stay as they are: wanted, or room was, while being compressed")
            return
        except Exception as error:
            # The copy is there as before.
            self._log(f"weights of {key.folder} are not compressed: {str(error) or type(error).__name__}")
            self._cold.give_up(copy)
        finally:
            await self._see_out(load, under_way, writable)
        self._take(CompressionFailed(load))


def _sealed(writable: int) -> int:
    """A descriptor of the same memory that nobody can write to, now or ever. Raises OSError while it is mapped writable
    somewhere."""
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    fcntl.fcntl(writable, fcntl.F_ADD_SEALS, seals)
    return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
