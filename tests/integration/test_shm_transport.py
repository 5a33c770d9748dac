"""The shared-memory transport between real processes: bytes, refusals, deaths, and nothing left behind."""

from __future__ import annotations

import asyncio
import fcntl
import gc
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
import torch

from contracts.errors import (
    BadRequest,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    StaleIncarnation,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from contracts.ids import BlockId, Incarnation
from kvtransfer import HostPool, ShmTransport, shm_door, shm_link, shm_thread
from kvtransfer.host_pool import SEALS
from kvtransfer.shm_door import HELLO, WELCOME, Endpoint, decode_endpoint, encode_endpoint
from rpc import LiveClock
from tests.support.pools import register_pool
from tests.unit.kvtransfer.shm_holder import pattern

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from kvtransfer import BlockPair, PullResult

NUM_BLOCKS = 48
BLOCK_BYTES = 3 * 4096 + 8
CHILD_TIMEOUT_S = 60.0


def open_descriptors() -> list[str]:
    found: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return sorted(each for each in found if "/proc/" not in each)


def mapped_pools() -> int:
    with open("/proc/self/maps") as maps:
        return sum("tandem-kv" in line for line in maps)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Generator[None, None, None]:
    """Descriptors, mappings and threads are what they were before the test."""
    gc.collect()
    # The kinds; numbers of sockets and event loops differ from test to test.
    descriptors, threads = len(open_descriptors()), threading.active_count()
    assert mapped_pools() == 0
    yield
    gc.collect()
    assert mapped_pools() == 0
    assert len(open_descriptors()) == descriptors
    assert threading.active_count() == threads


@pytest.fixture
def on_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pull goes by way of the transfer thread, however small."""
    monkeypatch.setattr(shm_thread, "MAX_INLINE_BYTES", -1)


class Child:
    """A holder's process."""

    def __init__(self, process: subprocess.Popen[str], endpoint: bytes) -> None:
        self.process = process
        self.endpoint = endpoint

    def kill(self) -> None:
        """Returns when the process is gone, and with it its end of every connection."""
        self.process.kill()
        self.process.wait(CHILD_TIMEOUT_S)


@contextmanager
def holder(num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES) -> Generator[Child, None, None]:
    command = [sys.executable, "-m", "tests.unit.kvtransfer.shm_holder", str(num_blocks), str(block_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Child(process, bytes.fromhex(process.stdout.readline().strip()))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def child() -> Generator[Child, None, None]:
    """A holder that every test may read and none may end."""
    with holder() as process:
        yield process


class HookedClock(LiveClock):
    """Live time that calls a hook, once, when the transfer thread next looks at it.

    Where the holder is attached, it does so when a pull's first byte is about to be copied, and after the last.
    """

    def __init__(self) -> None:
        self.hook: Callable[[], None] | None = None

    def now_s(self) -> float:
        if self.hook is not None and threading.current_thread().name == "kv-transfer":
            hook, self.hook = self.hook, None
            hook()
        return super().now_s()


@asynccontextmanager
async def reader(
    num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES, clock: LiveClock | None = None
) -> AsyncGenerator[tuple[ShmTransport, memoryview], None]:
    transport = ShmTransport(clock=clock or LiveClock(), incarnation=Incarnation(1))
    pool = register_pool(transport, num_blocks, block_bytes)
    try:
        yield transport, pool
    finally:
        pool.release()
        await transport.close()


def expect(condition: bool) -> None:
    assert condition


def pair(source: int, target: int) -> BlockPair:
    return (BlockId(source), BlockId(target))


async def pull(transport: ShmTransport, endpoint: bytes, *pairs: BlockPair) -> PullResult:
    async with asyncio.timeout(CHILD_TIMEOUT_S):
        return await transport.pull(endpoint, pairs).wait()


def block(pool: memoryview, index: int) -> bytes:
    return bytes(pool[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES])


@pytest.mark.parametrize("max_inline_bytes", [-1, 1 << 20])
async def test_bytes_arrive_where_they_belong_and_nowhere_else(
    child: Child, max_inline_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_thread, "MAX_INLINE_BYTES", max_inline_bytes)
    rng = random.Random(1)
    sources = rng.sample(range(NUM_BLOCKS), 30)
    targets = rng.sample(range(NUM_BLOCKS), 30)
    async with reader() as (transport, pool):
        scattered = [pair(*each) for each in zip(sources, targets, strict=True)]
        result = await pull(transport, child.endpoint, *scattered)
        assert result.error is None
        assert result.num_bytes == 30 * BLOCK_BYTES
        expected = dict(zip(targets, sources, strict=True))
        for index in range(NUM_BLOCKS):
            source = expected.get(index)
            content = bytes(BLOCK_BYTES) if source is None else pattern(source, BLOCK_BYTES)
            assert block(pool, index) == content, index
        result = await pull(transport, child.endpoint, *(pair(n, n) for n in range(NUM_BLOCKS)))
        assert result.error is None
        assert all(block(pool, n) == pattern(n, BLOCK_BYTES) for n in range(NUM_BLOCKS))


async def test_pool_is_memory_for_tensors_and_aligned() -> None:
    async with reader() as (_, pool):
        tensor = torch.frombuffer(pool, dtype=torch.uint8)
        assert tensor.numel() == NUM_BLOCKS * BLOCK_BYTES
        assert tensor.data_ptr() % 4096 == 0
        tensor[5] = 9
        assert pool[5] == 9
        del tensor
        gc.collect()


async def test_tensors_may_outlive_the_transport() -> None:
    transport = ShmTransport(clock=LiveClock(), incarnation=Incarnation(1))
    array = np.frombuffer(register_pool(transport, 2, 4096), np.uint8)
    await transport.close()
    assert array.sum() == 0
    del array


async def test_one_link_serves_many_pulls(child: Child) -> None:
    async with reader() as (transport, pool):
        await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
        assert mapped_pools() == 2
        before = len(open_descriptors())
        pulls = [transport.pull(child.endpoint, [pair(n, n)]) for n in range(20)]
        results = [await each.wait() for each in pulls]
        assert [each.error for each in results] == [None] * 20
        assert [await each.wait() for each in pulls] == results
        assert (mapped_pools(), len(open_descriptors())) == (2, before)
        assert block(pool, 19) == pattern(19, BLOCK_BYTES)


async def test_small_pull_is_over_when_it_is_asked_for(child: Child) -> None:
    async with reader() as (transport, pool):
        await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
        threads = threading.active_count()
        running = transport.pull(child.endpoint, [pair(7, 3)])
        assert block(pool, 3) == pattern(7, BLOCK_BYTES)
        result = await running.wait()
        assert (result.error, result.num_bytes) == (None, BLOCK_BYTES)
        assert isinstance(await failed(transport, child.endpoint, pair(0, NUM_BLOCKS)), BadRequest)
        assert threading.active_count() == threads


async def test_links_come_and_go_under_small_pulls(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread unmaps what the loop has just copied from, all the time."""
    monkeypatch.setattr(shm_thread, "MAX_LINKS", 1)
    async with reader() as (other, _), reader() as (transport, pool):
        for count in range(200):
            source = count % NUM_BLOCKS
            first = transport.pull(child.endpoint, [pair(source, 0)])
            second = transport.pull(other.endpoint(), [pair(1, 1)])
            third = transport.pull(child.endpoint, [pair(source, 2)])
            if count % 5 == 0:
                transport.forget(child.endpoint)
            for each in (first, second, third):
                error = (await each.wait()).error
                assert error is None or (count % 5 == 0 and isinstance(error, Cancelled))
            if count % 5:
                assert block(pool, 0) == block(pool, 2) == pattern(source, BLOCK_BYTES)


async def test_two_transports_of_one_process_and_both_ways() -> None:
    async with reader() as (one, one_pool), reader() as (two, two_pool):
        one_pool[:4] = b"onto"
        assert (await pull(two, one.endpoint(), pair(0, 3))).error is None
        assert block(two_pool, 3)[:4] == b"onto"
        assert (await pull(one, two.endpoint(), pair(3, 5))).error is None
        assert block(one_pool, 5)[:4] == b"onto"


async def failed(transport: ShmTransport, endpoint: bytes, *pairs: BlockPair) -> TandemError:
    """The error of a pull that must fail; `connect` must fail the same way where no pair is at fault."""
    error = (await pull(transport, endpoint, *(pairs or (pair(0, 0),)))).error
    assert error is not None
    if not pairs:
        with pytest.raises(type(error)):
            await transport.connect(endpoint, CHILD_TIMEOUT_S)
    return error


async def test_refusals(child: Child) -> None:
    endpoint = decode_endpoint(child.endpoint)

    def but(**changes: object) -> bytes:
        return encode_endpoint(msgspec.structs.replace(endpoint, **changes))

    async with reader() as (transport, pool):
        assert isinstance(await failed(transport, but(secret=bytes(32))), Unauthorized)
        assert isinstance(await failed(transport, but(incarnation=6)), StaleIncarnation)
        assert isinstance(await failed(transport, but(socket_name="nobody")), WorkerUnavailable)
        assert isinstance(await failed(transport, but(num_blocks=NUM_BLOCKS + 1)), IncompatiblePeer)
        assert isinstance(await failed(transport, but(block_bytes=4096)), IncompatiblePeer)
        assert isinstance(await failed(transport, but(secret=b"short")), BadRequest)
        assert isinstance(await failed(transport, b"\xc1"), BadRequest)
        assert mapped_pools() == 1
        outside = await failed(transport, child.endpoint, pair(0, 0), pair(NUM_BLOCKS, 1))
        assert isinstance(outside, BadRequest)
        assert f"block {NUM_BLOCKS} of a holder that has {NUM_BLOCKS}" in outside.message
        assert isinstance(await failed(transport, child.endpoint, pair(0, NUM_BLOCKS)), BadRequest)
        assert isinstance(await failed(transport, child.endpoint, pair(-1, 0)), BadRequest)
        assert bytes(pool) == bytes(len(pool))
        assert (await pull(transport, child.endpoint, pair(3, 0))).error is None


async def test_secrets_stay_out_of_messages(child: Child) -> None:
    endpoint = decode_endpoint(child.endpoint)
    async with reader() as (transport, _):
        wrong = msgspec.structs.replace(endpoint, secret=bytes(32))
        error = await failed(transport, encode_endpoint(wrong))
        assert repr(bytes(32)) not in error.message
        assert repr(endpoint.secret) not in repr(endpoint)


@contextmanager
def false_door(descriptor: int, **changes: object) -> Generator[bytes, None, None]:
    """A door that hands out whatever descriptor it was given; yields its endpoint."""
    name = f"tandem-test-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind("\0" + name)
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(HELLO.size)
                socket.send_fds(connection, [WELCOME], [descriptor])

    thread = threading.Thread(target=serve)
    thread.start()
    endpoint = Endpoint(
        socket_name=name,
        secret=bytes(32),
        incarnation=Incarnation(1),
        num_blocks=NUM_BLOCKS,
        block_bytes=BLOCK_BYTES,
    )
    try:
        yield encode_endpoint(msgspec.structs.replace(endpoint, **changes))
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()
        os.close(descriptor)


async def test_memory_that_could_vanish_is_not_mapped() -> None:
    unsealed = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, NUM_BLOCKS * BLOCK_BYTES)
    short = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(short, NUM_BLOCKS * BLOCK_BYTES - 1)
    fcntl.fcntl(short, fcntl.F_ADD_SEALS, SEALS)
    plain = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    async with reader() as (transport, _):
        for descriptor, words in ((unsealed, "may shrink"), (short, "were announced"), (plain, "not sealed")):
            with false_door(descriptor) as endpoint:
                error = await failed(transport, endpoint)
                assert isinstance(error, IncompatiblePeer)
                assert words in error.message


def another_uid(connection: socket.socket) -> int:
    return os.getuid() + 1


async def test_other_users_are_turned_away(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    async with reader() as (transport, _):
        monkeypatch.setattr(shm_link, "peer_uid", another_uid)
        assert isinstance(await failed(transport, child.endpoint), Unauthorized)
        monkeypatch.undo()
        monkeypatch.setattr(shm_door, "peer_uid", another_uid)
        async with reader() as (other, _):
            assert isinstance(await failed(transport, other.endpoint()), WorkerUnavailable)


async def test_holder_killed_before_a_pull() -> None:
    with holder() as child:
        async with reader() as (transport, _):
            await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
            child.kill()
            assert isinstance(await failed(transport, child.endpoint), WorkerUnavailable)
            assert mapped_pools() == 1


@pytest.mark.usefixtures("on_thread")
async def test_holder_killed_during_a_pull() -> None:
    clock = HookedClock()
    with holder() as child:
        async with reader(clock=clock) as (transport, pool):
            await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
            clock.hook = child.kill
            result = await pull(transport, child.endpoint, pair(2, 2))
            assert isinstance(result.error, WorkerUnavailable)
            assert "ended during the pull" in result.error.message
            # The mapping outlived its owner until the copy was over: no bus error, the very bytes.
            assert block(pool, 2) == pattern(2, BLOCK_BYTES)


async def test_memory_of_a_dead_holder_is_let_go_without_another_pull() -> None:
    with holder() as child, holder() as other:
        async with reader() as (transport, _):
            await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
            assert mapped_pools() == 2
            child.kill()
            await transport.connect(other.endpoint, CHILD_TIMEOUT_S)
            assert mapped_pools() == 2


async def test_least_recently_used_link_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_thread, "MAX_LINKS", 2)
    async with reader() as (a, _), reader() as (b, _), reader() as (c, _), reader() as (transport, _):
        own = mapped_pools()
        for each in (a, b, a, c, a):
            assert (await pull(transport, each.endpoint(), pair(0, 0))).error is None
        assert mapped_pools() == own + 2


@pytest.mark.usefixtures("on_thread")
async def test_stop_is_heard_before_the_next_piece(child: Child) -> None:
    clock = HookedClock()
    async with reader(clock=clock) as (transport, pool):
        begun, stopped = threading.Event(), threading.Event()

        def at_first_byte() -> None:
            begun.set()
            assert stopped.wait(CHILD_TIMEOUT_S)

        await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
        clock.hook = at_first_byte
        running = transport.pull(child.endpoint, [pair(n, n) for n in range(NUM_BLOCKS)])
        assert begun.wait(CHILD_TIMEOUT_S)
        running.request_stop()
        stopped.set()
        result = await running.wait()
        assert isinstance(result.error, Cancelled)
        assert result.num_bytes == 0
        assert bytes(pool) == bytes(len(pool))
        running.request_stop()
        assert (await pull(transport, child.endpoint, pair(1, 1))).error is None


@pytest.mark.usefixtures("on_thread")
async def test_closing_ends_the_pull_in_hand_and_those_that_have_not_begun(child: Child) -> None:
    clock = HookedClock()
    async with reader(clock=clock) as (transport, _):
        await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
        begun, closing = threading.Event(), threading.Event()

        def at_first_byte() -> None:
            begun.set()
            expect(closing.wait(CHILD_TIMEOUT_S))

        clock.hook = at_first_byte
        pulls = [transport.pull(child.endpoint, [pair(n, n)]) for n in range(50)]
        assert begun.wait(CHILD_TIMEOUT_S)
        # Not before `close` has asked for the end.
        asyncio.get_running_loop().call_soon(closing.set)
    results = [await each.wait() for each in pulls]
    assert [type(each.error) for each in results] == [Cancelled] * 50
    assert sum(each.num_bytes for each in results) == 0


@contextmanager
def hung_door() -> Generator[bytes, None, None]:
    """The door of a holder that is stopped: callers connect, and nobody answers them."""
    name = f"tandem-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind("\0" + name)
        listener.listen()
        yield encode_endpoint(
            Endpoint(
                socket_name=name,
                secret=bytes(32),
                incarnation=Incarnation(1),
                num_blocks=NUM_BLOCKS,
                block_bytes=BLOCK_BYTES,
            )
        )


async def test_holder_that_hangs_keeps_nobody_else_waiting(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_thread, "CONNECT_TIMEOUT_S", CHILD_TIMEOUT_S)
    async with reader() as (transport, pool):
        with hung_door() as hung:
            waiting = [transport.pull(hung, [pair(0, 0)]) for _ in range(3)]
            assert (await pull(transport, child.endpoint, pair(2, 1))).error is None
            assert block(pool, 1) == pattern(2, BLOCK_BYTES)
            # A pull that waits for its holder hears a stop, and its neighbours go on waiting.
            waiting[1].request_stop()
            stopped = await waiting[1].wait()
            assert isinstance(stopped.error, Cancelled)
            with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
                await transport.connect(hung, 0.05)
            # The holder's life is declared over: all that waits for it ends.
            transport.forget(hung)
            assert isinstance((await waiting[0].wait()).error, Cancelled)
            assert isinstance((await waiting[2].wait()).error, Cancelled)
            assert not block(pool, 0).strip(b"\0")


async def test_holder_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm_thread, "CONNECT_TIMEOUT_S", 0.05)
    async with reader() as (transport, _):
        with hung_door() as hung:
            first, second = transport.pull(hung, [pair(0, 0)]), transport.pull(hung, [pair(1, 1)])
            for each in (first, second):
                error = (await each.wait()).error
                assert isinstance(error, WorkerUnavailable)
                assert "0.05 s" in error.message


async def test_closing_ends_pulls_that_wait_for_a_holder() -> None:
    with hung_door() as hung:
        async with reader() as (transport, _):
            waiting = transport.pull(hung, [pair(0, 0)])
            await asyncio.sleep(0)
        assert isinstance((await waiting.wait()).error, Cancelled)


async def test_forgotten_holder_is_unmapped_and_may_come_back(child: Child) -> None:
    async with reader() as (transport, _):
        await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
        assert mapped_pools() == 2
        transport.forget(child.endpoint)
        async with reader() as (other, _):
            # One job later the pool is gone.
            await transport.connect(other.endpoint(), CHILD_TIMEOUT_S)
            assert mapped_pools() == 3
        assert (await pull(transport, child.endpoint, pair(1, 1))).error is None
        transport.forget(b"never seen")


def test_populated_pool_has_its_pages() -> None:
    num_bytes = 24 << 20
    pool = HostPool(num_bytes // 4096, 4096)
    pool.populate()
    pool.populate()
    give_up_s = time.monotonic() + CHILD_TIMEOUT_S
    while os.fstat(pool.read_only).st_blocks * 512 < num_bytes:
        assert time.monotonic() < give_up_s
        time.sleep(0.01)
    view = pool.view()
    assert not any(view[::4096])
    view.release()
    pool.close()


def test_pool_may_close_while_it_is_populated() -> None:
    pool = HostPool(1 << 18, 4096)
    pool.populate()
    pool.close()


@pytest.mark.usefixtures("on_thread")
async def test_cancelled_wait_leaves_the_pull_alone(child: Child) -> None:
    clock = HookedClock()
    async with reader(clock=clock) as (transport, pool):
        await transport.connect(child.endpoint, CHILD_TIMEOUT_S)
        cancelled = threading.Event()
        clock.hook = lambda: expect(cancelled.wait(CHILD_TIMEOUT_S))
        running = transport.pull(child.endpoint, [pair(4, 4)])
        waiting = asyncio.ensure_future(running.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        cancelled.set()
        assert (await running.wait()).error is None
        assert block(pool, 4) == pattern(4, BLOCK_BYTES)


async def test_readers_cannot_write(child: Child) -> None:
    endpoint = decode_endpoint(child.endpoint)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(CHILD_TIMEOUT_S)
        connection.connect("\0" + endpoint.socket_name)
        connection.sendall(HELLO.pack(endpoint.secret, endpoint.incarnation))
        answer, (descriptor,), _, _ = socket.recv_fds(connection, 1, 1)
    assert answer == WELCOME
    with pytest.raises(PermissionError):
        mmap.mmap(descriptor, endpoint.num_bytes)
    with pytest.raises(OSError, match="Invalid argument"):
        os.ftruncate(descriptor, 0)
    os.close(descriptor)


async def test_pool_that_cannot_be_had_is_a_configuration_error() -> None:
    for num_blocks in (0, 1 << 61):
        transport = ShmTransport(clock=LiveClock(), incarnation=Incarnation(1))
        with pytest.raises(ConfigError, match="cannot map a KV pool"):
            register_pool(transport, num_blocks, 4096)
        await transport.close()


async def test_door_drops_callers_that_say_nothing() -> None:
    async with reader() as (transport, _):
        name = decode_endpoint(transport.endpoint()).socket_name
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
            silent.settimeout(CHILD_TIMEOUT_S)
            silent.connect("\0" + name)
            silent.send(b"x")
            assert await asyncio.to_thread(silent.recv, 1) == b""
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_misuse_is_a_bug() -> None:
    transport = ShmTransport(clock=LiveClock(), incarnation=Incarnation(1))
    for use in (transport.endpoint, lambda: transport.pull(b"", [])):
        with pytest.raises(InvariantBroken, match="no pool"):
            use()
    register_pool(transport, 1, 4096)
    second = HostPool(1, 4096)
    with pytest.raises(InvariantBroken, match="second pool"):
        transport.register(second)
    second.close()
    await transport.close()
    await transport.close()
    with pytest.raises(InvariantBroken, match="no pool"):
        transport.pull(b"", [])
