"""The collective transport between real processes: bytes, stops, deaths, freezes, strangers, and nothing left."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch

from contracts.errors import (
    BadRequest,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from contracts.ids import Incarnation
from kvtransfer import collective, collective_holder, collective_reader
from kvtransfer.collective import CollectiveTransport
from kvtransfer.collective_address import read_address, rewrite_address
from kvtransfer.collective_endpoint import Endpoint, decode_endpoint, encode_endpoint
from kvtransfer.collective_gloo import GlooGroup
from kvtransfer.collective_group import HOLDER, PROOF_BYTES, READER
from rpc import GrpcNetwork, LiveClock
from tests.support.collective_peer import content, peer, words
from tests.support.netns import two_machines
from tests.support.pools import register_pool
from tests.support.transport_contract import MakeTransport, TransportContract, pair

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from numpy.typing import NDArray

    from kvtransfer import BlockPair, PullResult
    from kvtransfer.collective_reader import CollectivePull

LOOPBACK = "127.0.0.1:0"
NUM_BLOCKS = 400
BLOCK_BYTES = 3 * 4096 + 8

#: Long enough for a machine under load; nothing waits for it when all is well.
PATIENCE_S = 60.0

#: A pull of all of it takes a twentieth of a second at least.
BIG_BLOCKS = 256
BIG_BLOCK_BYTES = 512 << 10

#: Most a pull may take to end after its holder froze or died: every deadline on the way, and a busy machine.
END_S = 30.0


class TestCollectiveContract(TransportContract):
    @pytest.fixture
    async def make(self) -> AsyncGenerator[MakeTransport]:
        async with AsyncExitStack() as stack:
            ready = [await stack.enter_async_context(peer(LOOPBACK, each + 1)) for each in range(3)]

            def transport(name: str) -> CollectiveTransport:
                return ready.pop()

            yield transport


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two CUDA devices")
class TestNcclContract(TransportContract):
    @pytest.fixture
    async def make(self) -> AsyncGenerator[MakeTransport]:
        async with AsyncExitStack() as stack:
            holders = [await stack.enter_async_context(peer(LOOPBACK, each, device="cuda:0")) for each in (1, 2)]
            readers = [await stack.enter_async_context(peer(LOOPBACK, 3, device="cuda:1"))]

            def transport(name: str) -> CollectiveTransport:
                return readers.pop() if name == "d" else holders.pop()

            yield transport


# --- processes ------------------------------------------------------------------------------------------


class Child:
    """A holder's or reader's process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def say(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line; the test's own time limit bounds the wait."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, f"the process ended: {self.process.wait(PATIENCE_S)}"
        return line

    def ask(self, line: str) -> str:
        self.say(line)
        return self.hear()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def num_gloo_threads(self) -> int:
        tasks = f"/proc/{self.process.pid}/task"
        names: list[str] = []
        for task in os.listdir(tasks):
            # One that has just ended is no thread.
            with contextlib.suppress(FileNotFoundError, ProcessLookupError), open(f"{tasks}/{task}/comm") as comm:
                names.append(comm.read().strip())
        return names.count("gloo_tcp_loop")


def command(role: str, address: str, num_blocks: int, block_bytes: int, fourth: str, *interface: str) -> list[str]:
    module = "tests.support.collective_peer"
    return [sys.executable, "-m", module, role, address, str(num_blocks), str(block_bytes), fourth, *interface]


@contextmanager
def child(role: str, num_blocks: int, block_bytes: int, fourth: str, address: str = LOOPBACK) -> Generator[Child]:
    arguments = command(role, address, num_blocks, block_bytes, fourth)
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Child(process)
        finally:
            # A stopped process dies too.
            process.kill()


@contextmanager
def holder(
    num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES, address: str = LOOPBACK, incarnation: int = 7
) -> Generator[Holder]:
    with child("hold", num_blocks, block_bytes, str(incarnation), address) as process:
        yield process, bytes.fromhex(process.hear())


Holder = tuple[Child, bytes]


@pytest.fixture(scope="module")
def small() -> Generator[Holder]:
    """A holder that every test may read and none may end."""
    with holder() as process:
        yield process


@pytest.fixture(scope="module")
def big() -> Generator[Holder]:
    """The same, with pulls that take a while. It may be frozen, if it is woken again."""
    with holder(BIG_BLOCKS, BIG_BLOCK_BYTES) as process:
        yield process


@asynccontextmanager
async def reader(
    num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES
) -> AsyncGenerator[tuple[CollectiveTransport, NDArray[np.uint64]]]:
    async with peer(LOOPBACK, 1) as transport:
        yield transport, words(register_pool(transport, num_blocks, block_bytes), block_bytes)


def straight(num_blocks: int) -> list[BlockPair]:
    return [pair(each, each) for each in range(num_blocks)]


async def result_of(pull: CollectivePull) -> PullResult:
    async with asyncio.timeout(PATIENCE_S):
        return await pull.wait()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():  # noqa: ASYNC110 - another process's state has no event
            await asyncio.sleep(0.005)


async def begun(pool: NDArray[np.uint64]) -> None:
    """Returns when the first bytes of a pull into a fresh pool have landed."""
    await until(lambda: bool(pool[0, 0]))


# --- bytes ----------------------------------------------------------------------------------------------


async def check_bytes(endpoint: bytes, num_blocks: int, block_bytes: int) -> None:
    """Pulls half of a holder's blocks in disorder, then all in order."""
    shuffle = random.Random(1)
    sources = shuffle.sample(range(num_blocks), num_blocks // 2)
    targets = shuffle.sample(range(num_blocks), num_blocks // 2)
    # Some go on for a few blocks on one side, some on both.
    stretch = range(num_blocks // 4)
    pairs = dict(zip(targets, sources, strict=True)) | {each: each for each in stretch[:8]}
    pairs |= {num_blocks - 1 - each: each for each in stretch[8:]}
    targets, sources = list(pairs.keys()), list(pairs.values())
    async with reader(num_blocks, block_bytes) as (transport, pool):
        result = await result_of(transport.pull(endpoint, [pair(pairs[each], each) for each in pairs]))
        assert result.error is None
        assert result.num_bytes == len(pairs) * block_bytes
        assert (pool[targets] == content(sources, block_bytes)).all()
        untouched = sorted({*range(num_blocks)} - {*targets})
        assert untouched
        assert not pool[untouched].any()
        assert (await result_of(transport.pull(endpoint, straight(num_blocks)))).error is None
        assert (pool == content(range(num_blocks), block_bytes)).all()
        del pool


async def test_bytes_between_processes(small: Holder) -> None:
    await check_bytes(small[1], NUM_BLOCKS, BLOCK_BYTES)


@pytest.mark.parametrize("block_bytes", [8, 600 << 10, 1 << 20, (5 << 19) + 8])
async def test_bytes_of_blocks_of_all_sizes(block_bytes: int) -> None:
    async with peer(LOOPBACK, 1) as transport:
        source = words(register_pool(transport, 40, block_bytes), block_bytes)
        source[:] = content(range(40), block_bytes)
        await check_bytes(transport.endpoint(), 40, block_bytes)
        del source


async def test_times_say_what_was_waited_for(big: Holder) -> None:
    _, endpoint = big
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        first = transport.pull(endpoint, straight(BIG_BLOCKS))
        second = transport.pull(endpoint, straight(1))
        long, short = await result_of(first), await result_of(second)
        assert long.error is None
        assert short.error is None
        # The second waited for its turn while the first was on the wire.
        assert short.wait_s > long.wire_s > short.wire_s > 0.0
        del pool


# --- stops and ends -------------------------------------------------------------------------------------


async def test_stopped_pull_ends_at_once_and_the_next_goes_on(big: Holder) -> None:
    _, endpoint = big
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        pull = transport.pull(endpoint, straight(BIG_BLOCKS))
        await begun(pool)
        pull.request_stop()
        result = await result_of(pull)
        assert isinstance(result.error, Cancelled)
        assert result.num_bytes < BIG_BLOCKS * BIG_BLOCK_BYTES
        pool[:] = 5
        pull.request_stop()
        after = await result_of(transport.pull(endpoint, [pair(1, BIG_BLOCKS - 1)]))
        assert after.error is None
        assert (pool[:-1] == 5).all()
        assert (pool[-1:] == content([1], BIG_BLOCK_BYTES)).all()
        del pool


async def test_pull_stopped_before_its_turn_moves_nothing(big: Holder) -> None:
    _, endpoint = big
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        first = transport.pull(endpoint, straight(BIG_BLOCKS - 1))
        second = transport.pull(endpoint, [pair(0, BIG_BLOCKS - 1)])
        second.request_stop()
        stopped = await result_of(second)
        assert (type(stopped.error), stopped.num_bytes) == (Cancelled, 0)
        assert (await result_of(first)).error is None
        assert not pool[-1].any()
        del pool


async def test_killed_holder_ends_the_pull() -> None:
    with holder(BIG_BLOCKS, BIG_BLOCK_BYTES) as (process, endpoint):
        async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
            pulls = [transport.pull(endpoint, straight(BIG_BLOCKS)) for _ in range(3)]
            await begun(pool)
            process.kill()
            async with asyncio.timeout(END_S):
                results = [await each.wait() for each in pulls]
            assert all(isinstance(each.error, (WorkerUnavailable, DeadlineExceeded)) for each in results)
            del pool


async def test_frozen_holder_ends_the_pull_and_lands_nothing_when_it_wakes(big: Holder) -> None:
    process, endpoint = big
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        pull = transport.pull(endpoint, straight(BIG_BLOCKS))
        await begun(pool)
        process.freeze()
        async with asyncio.timeout(END_S):
            result = await pull.wait()
        assert isinstance(result.error, (WorkerUnavailable, DeadlineExceeded))
        pool[:] = 5
        process.wake()
        assert (await result_of(transport.pull(endpoint, [pair(2, 0)]))).error is None
        assert (pool[1:] == 5).all()
        assert (pool[:1] == content([2], BIG_BLOCK_BYTES)).all()
        del pool


async def test_frozen_reader_holds_up_no_other_and_loses_its_group(big: Holder) -> None:
    process, endpoint = big
    with child("read", BIG_BLOCKS, BIG_BLOCK_BYTES, endpoint.hex()) as other:
        assert other.hear() == "ready"
        assert other.ask(f"pulls {BIG_BLOCKS}") == "begun"
        async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
            await transport.connect(endpoint, PATIENCE_S)
            other.freeze()
            results = [await result_of(transport.pull(endpoint, straight(BIG_BLOCKS))) for _ in range(3)]
            assert [each.error for each in results] == [None] * 3
            assert (pool == content(range(BIG_BLOCKS), BIG_BLOCK_BYTES)).all()
            # Ours is left.
            await until(lambda: process.num_gloo_threads() == 1)
            other.wake()
            assert other.hear() in ("WorkerUnavailable", "DeadlineExceeded")
            assert other.ask(f"pulls {BIG_BLOCKS}") == "begun"
            del pool


async def test_holder_restarted_at_its_address_is_another() -> None:
    async with reader() as (transport, pool):
        with holder() as (process, endpoint):
            address = decode_endpoint(endpoint).address
            assert (await result_of(transport.pull(endpoint, straight(4)))).error is None
            process.kill()
        for life in (8, 9):
            with holder(address=address, incarnation=life) as (_, renewed):
                pool[:] = 0
                stale = await result_of(transport.pull(endpoint, straight(4)))
                assert isinstance(stale.error, (StaleIncarnation, WorkerUnavailable))
                assert not pool.any()
                await until_reachable(transport, renewed)
                assert (await result_of(transport.pull(renewed, straight(4)))).error is None
                assert (pool[:4] == content(range(4), BLOCK_BYTES)).all()
                transport.forget(endpoint)
                endpoint = renewed
        del pool


async def until_reachable(transport: CollectiveTransport, endpoint: bytes) -> None:
    """gRPC leaves an address alone for a moment after a refusal."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                return await transport.connect(endpoint, PATIENCE_S)
            except WorkerUnavailable:
                await asyncio.sleep(0.05)


async def test_forgetting_a_holder_ends_its_pulls(big: Holder) -> None:
    process, endpoint = big
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        pulls = [transport.pull(endpoint, straight(BIG_BLOCKS)) for _ in range(2)]
        await begun(pool)
        process.freeze()
        transport.forget(endpoint)
        results = [await result_of(each) for each in pulls]
        assert [type(each.error) for each in results] == [Cancelled] * 2
        pool[:] = 5
        process.wake()
        assert (await result_of(transport.pull(endpoint, [pair(2, 0)]))).error is None
        assert (pool[1:] == 5).all()
        del pool


async def test_idle_group_goes_and_comes_again(small: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_reader, "IDLE_S", 0.05)
    process, endpoint = small
    async with reader() as (transport, pool):
        for _ in range(2):
            assert (await result_of(transport.pull(endpoint, straight(NUM_BLOCKS)))).error is None
            assert (pool == content(range(NUM_BLOCKS), BLOCK_BYTES)).all()
            await until(lambda: process.num_gloo_threads() == 0)
        del pool


async def test_group_that_the_holder_let_go_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_holder, "MAX_READERS", 1)
    async with peer(LOOPBACK, 7) as transport, peer(LOOPBACK, 1) as one, peer(LOOPBACK, 2) as two:
        register_pool(transport, 2, BLOCK_BYTES)[:8] = bytes(range(8))
        pools = [register_pool(each, 2, BLOCK_BYTES) for each in (one, two)]
        for value in range(3):
            for each, pool in zip((one, two), pools, strict=True):
                pool[:8] = bytes([value + 1]) * 8
                assert (await result_of(each.pull(transport.endpoint(), [pair(0, 0)]))).error is None
                assert bytes(pool[:8]) == bytes(range(8))
        for pool in pools:
            pool.release()


async def test_bounds_on_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with peer(LOOPBACK, 7) as one, peer(LOOPBACK, 8) as two, peer(LOOPBACK, 1) as reading:
        for each in (one, two, reading):
            register_pool(each, 1, BLOCK_BYTES).release()
        monkeypatch.setattr(collective, "MAX_COURIERS", 1)
        for _ in range(2):
            for each in (one, two):
                assert await error_of(reading, each.endpoint()) is None
        under_way = reading.pull(two.endpoint(), [pair(0, 0)])
        refused = reading.pull(one.endpoint(), [pair(0, 0)])
        assert isinstance((await result_of(refused)).error, NoCapacity)
        assert (await result_of(under_way)).error is None
        monkeypatch.setattr(collective_holder, "MAX_READERS", 0)
        reading.forget(two.endpoint())
        assert isinstance(await error_of(reading, two.endpoint()), NoCapacity)
        monkeypatch.setattr(collective_reader, "MAX_WAITING_PULLS", 2)
        reading.forget(two.endpoint())
        pulls = [reading.pull(two.endpoint(), [pair(0, 0)]) for _ in range(4)]
        assert isinstance((await result_of(pulls[3])).error, NoCapacity)
        await asyncio.gather(*(result_of(each) for each in pulls))


async def test_holder_lets_idle_groups_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective_holder, "IDLE_S", 0.05)
    async with peer(LOOPBACK, 7) as holding, peer(LOOPBACK, 1) as reading:
        register_pool(holding, 1, BLOCK_BYTES).release()
        register_pool(reading, 1, BLOCK_BYTES).release()
        before = listening()
        for _ in range(2):
            assert await error_of(reading, holding.endpoint()) is None
            # The reader's is left: it finds out when it next asks.
            await until(lambda: len(listening() - before) == 1)


# --- who may ----------------------------------------------------------------------------------------------


async def error_of(transport: CollectiveTransport, endpoint: bytes) -> TandemError | None:
    return (await result_of(transport.pull(endpoint, [pair(0, 0)]))).error


async def test_refusals(small: Holder) -> None:
    _, endpoint = small
    async with reader() as (transport, pool):
        known = decode_endpoint(endpoint)
        guessed = Endpoint(known.address, known.incarnation, bytes(16), known.num_blocks, known.block_bytes)
        assert isinstance(await error_of(transport, encode_endpoint(guessed)), Unauthorized)
        earlier = Endpoint(known.address, Incarnation(6), known.secret, known.num_blocks, known.block_bytes)
        assert isinstance(await error_of(transport, encode_endpoint(earlier)), StaleIncarnation)
        more = Endpoint(known.address, known.incarnation, known.secret, NUM_BLOCKS + 1, known.block_bytes)
        beyond = transport.pull(encode_endpoint(more), [pair(0, 1), pair(NUM_BLOCKS, 0)])
        assert isinstance((await result_of(beyond)).error, BadRequest)
        for junk in (b"", b"junk", encode_endpoint(known)[:-1]):
            assert isinstance(await error_of(transport, junk), BadRequest)
        assert not pool.any()
        # None of it harmed the holder.
        assert await error_of(transport, endpoint) is None
        del pool


async def test_peer_without_the_proof_is_turned_away() -> None:
    """Whoever reaches a listening port first is connected; only the peer of the meeting knows what to say."""
    right, wrong = bytes(PROOF_BYTES), b"x" * PROOF_BYTES
    with ThreadPoolExecutor(2) as reaper:
        groups = [
            GlooGroup(rank, interface=None, piece_bytes=BLOCK_BYTES, timeout_s=PATIENCE_S, reaper=reaper)
            for rank in (READER, HOLDER)
        ]
        one, two = [await each.call(each.open) for each in groups]
        ends = await asyncio.gather(
            groups[0].call(groups[0].connect, one, two, proof=wrong, expected=right),
            groups[1].call(groups[1].connect, two, one, proof=right, expected=right),
            return_exceptions=True,
        )
        assert [type(each) for each in ends] == [type(None), Unauthorized]
        for each in groups:
            await each.close()
            with pytest.raises(RuntimeError):
                await each.call(each.open)


async def test_frozen_holder_cannot_be_connected_to(small: Holder) -> None:
    process, endpoint = small
    async with reader() as (transport, pool):
        process.freeze()
        try:
            async with asyncio.timeout(END_S):
                with pytest.raises(DeadlineExceeded):
                    await transport.connect(endpoint, 0.2)
                # gRPC says which: it gave up on the answer, or on the connection.
                assert isinstance(await error_of(transport, endpoint), (DeadlineExceeded, WorkerUnavailable))
        finally:
            process.wake()
        await until_reachable(transport, endpoint)
        assert await error_of(transport, endpoint) is None
        del pool


async def test_wrong_use_is_refused() -> None:
    network = GrpcNetwork()
    with pytest.raises(ConfigError, match="none0"):
        CollectiveTransport(
            clock=LiveClock(), network=network, address=LOOPBACK, incarnation=Incarnation(1), interface="none0"
        )
    with pytest.raises(ConfigError, match="cuda"):
        CollectiveTransport(
            clock=LiveClock(), network=network, address=LOOPBACK, incarnation=Incarnation(1), device="cuda:0"
        )
    transport = CollectiveTransport(clock=LiveClock(), network=network, address=LOOPBACK, incarnation=Incarnation(1))
    with pytest.raises(InvariantBroken):
        transport.endpoint()
    with pytest.raises(InvariantBroken):
        transport.pull(b"", ())
    register_pool(transport, 1, BLOCK_BYTES).release()
    with pytest.raises(InvariantBroken):
        register_pool(transport, 1, BLOCK_BYTES)
    assert repr(decode_endpoint(transport.endpoint())).count("secret") == 0
    await transport.close()
    await network.close()


def listening() -> set[tuple[str, int]]:
    found = psutil.Process().net_connections("inet")
    return {(each.laddr.ip, each.laddr.port) for each in found if each.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("interface", [None, "lo", "127.0.0.2"])
async def test_ports_are_on_the_interface_alone_and_deaf_once_connected(interface: str | None) -> None:
    async with peer(LOOPBACK, 1, interface) as one, peer(LOOPBACK, 2, interface) as two:
        register_pool(one, 1, BLOCK_BYTES).release()
        register_pool(two, 1, BLOCK_BYTES).release()
        before = listening()
        await two.connect(one.endpoint(), PATIENCE_S)
        # The holder's side finishes for itself.
        assert await error_of(two, one.endpoint()) is None
        ports = listening() - before
        assert {host for host, _ in ports} == {"127.0.0.2" if interface == "127.0.0.2" else "127.0.0.1"}
        assert len(ports) == 2
        for port in ports:
            with socket.socket() as stranger:
                stranger.settimeout(0.2)
                with pytest.raises(TimeoutError):
                    stranger.connect(port)
        assert await error_of(two, one.endpoint()) is None


# --- by another way -----------------------------------------------------------------------------------------


class Proxy:
    """Passes connections on, one at a time, and may flip a bit on the way."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.num_bytes = 0
        #: Which of the passing bytes loses its lowest bit; None: none.
        self.flip_at: int | None = None
        #: How long every 64 KiB wait.
        self.delay_s = 0.0

    def advertise(self, blob: bytes) -> bytes:
        address = read_address(blob)
        self.target = (socket.inet_ntop(address.family, address.host), address.port)
        return rewrite_address(blob, "127.0.0.1", self.port)

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        assert self.target is not None
        far, forth = await asyncio.open_connection(*self.target)
        await asyncio.gather(self._pass(near, forth), self._pass(far, back))

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            while some := bytearray(await source.read(1 << 16)):
                if self.flip_at is not None and 0 <= self.flip_at - self.num_bytes < len(some):
                    some[self.flip_at - self.num_bytes] ^= 1
                self.num_bytes += len(some)
                await asyncio.sleep(self.delay_s)
                sink.write(some)
                await sink.drain()
        except ConnectionError:
            return
        finally:
            sink.close()


async def test_addresses_may_be_those_of_proxies() -> None:
    """gloo calls only lesser addresses than its own, so both sides are bound above the proxies'."""
    interface = "127.0.0.2"
    async with (
        Proxy() as for_holder,
        Proxy() as for_reader,
        peer(LOOPBACK, 1, interface, for_holder.advertise) as holding,
        peer(LOOPBACK, 2, interface, for_reader.advertise) as reading,
    ):
        source = words(register_pool(holding, 200, BLOCK_BYTES), BLOCK_BYTES)
        source[:] = content(range(200), BLOCK_BYTES)
        pool = words(register_pool(reading, 200, BLOCK_BYTES), BLOCK_BYTES)
        assert (await result_of(reading.pull(holding.endpoint(), straight(200)))).error is None
        assert (pool == source).all()
        passed = for_holder.num_bytes + for_reader.num_bytes
        assert passed > 200 * BLOCK_BYTES
        # What the network spoils inside a block arrives as it is: checksums are the layer above's.
        for each in (for_holder, for_reader):
            each.flip_at = each.num_bytes + 100 * BLOCK_BYTES
        assert (await result_of(reading.pull(holding.endpoint(), straight(200)))).error is None
        assert np.count_nonzero(pool != source) == 1
        del pool, source


async def test_what_still_comes_for_a_stopped_pull_is_dropped() -> None:
    interface, block_bytes = "127.0.0.2", 1 << 20
    async with (
        Proxy() as for_holder,
        Proxy() as for_reader,
        peer(LOOPBACK, 1, interface, for_holder.advertise) as holding,
        peer(LOOPBACK, 2, interface, for_reader.advertise) as reading,
    ):
        source = words(register_pool(holding, 6, block_bytes), block_bytes)
        source[:] = content(range(6), block_bytes)
        pool = words(register_pool(reading, 6, block_bytes), block_bytes)
        await reading.connect(holding.endpoint(), PATIENCE_S)
        for_holder.delay_s = for_reader.delay_s = 0.005
        pull = reading.pull(holding.endpoint(), straight(6))
        await begun(pool)
        pull.request_stop()
        result = await result_of(pull)
        assert isinstance(result.error, Cancelled)
        assert 0 < result.num_bytes < 6 * block_bytes
        passed = for_holder.num_bytes + for_reader.num_bytes
        pool[:] = 5
        # The next goes by the same group, and so after all of that.
        assert (await result_of(reading.pull(holding.endpoint(), [pair(5, 0)]))).error is None
        assert for_holder.num_bytes + for_reader.num_bytes > passed + 2 * block_bytes
        assert (pool[0] == source[5]).all()
        assert (pool[1:] == 5).all()
        del pool, source


# --- nothing left -------------------------------------------------------------------------------------------


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def num_tasks() -> int:
    return len(os.listdir("/proc/self/task"))


async def test_descriptors_and_threads_go_with_the_transport(big: Holder, small: Holder) -> None:
    (process, endpoint), (_, unlike) = big, small
    # What gRPC and asyncio keep for the process's life.
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, _):
        assert await error_of(transport, endpoint) is None
    descriptors, tasks, threads = num_descriptors(), num_tasks(), threading.active_count()
    for _ in range(3):
        async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
            pull = transport.pull(endpoint, straight(BIG_BLOCKS))
            assert isinstance(await error_of(transport, unlike), IncompatiblePeer)
            await begun(pool)
            del pool
        assert isinstance((await result_of(pull)).error, Cancelled)
        await until(lambda: process.num_gloo_threads() == 0)
    await until(lambda: num_descriptors() <= descriptors)
    await until(lambda: num_tasks() <= tasks)
    assert threading.active_count() <= threads


# --- two machines -------------------------------------------------------------------------------------------


@contextmanager
def two_machines_apart(rate: str) -> Generator[tuple[Child, Child, Callable[[], None], Callable[[], None]]]:
    """A holder and a reader on two machines, and what cuts and restores their cable."""
    with two_machines() as (one, two, cable):
        cable.throttle(rate)
        hold = command("hold", f"{one.address}:7700", BIG_BLOCKS, BIG_BLOCK_BYTES, "7", one.interface)
        with one.start(hold) as holding:
            process = Child(holding)
            endpoint = process.hear()
            read = command("read", f"{two.address}:7700", BIG_BLOCKS, BIG_BLOCK_BYTES, endpoint, two.interface)
            with two.start(read) as reading:
                other = Child(reading)
                assert other.hear() == "ready"
                yield process, other, cable.cut, cable.restore


def test_late_landing_between_two_machines() -> None:
    """A frozen holder and a slow cable: bytes are under way when the pull ends and its blocks are used anew."""
    with two_machines_apart("400mbit") as (holding, reading, _, _):
        assert reading.ask(f"pull {BIG_BLOCKS}") == "begun"
        holding.freeze()
        assert reading.hear() in ("DeadlineExceeded", "WorkerUnavailable")
        assert reading.ask("fill 238") == "filled"
        holding.wake()
        # The next pull goes by a new connection, after whatever the old one still held.
        assert reading.ask("pull 1") == "begun"
        assert reading.hear() == "ok"
        assert reading.ask("filled 1") == str((BIG_BLOCKS - 1) * BIG_BLOCK_BYTES)
        assert reading.ask("right 1") == "1"


def test_cable_cut_in_mid_pull_and_restored() -> None:
    with two_machines_apart("400mbit") as (_, reading, cut, restore):
        assert reading.ask(f"pull {BIG_BLOCKS}") == "begun"
        cut()
        assert reading.hear() in ("DeadlineExceeded", "WorkerUnavailable")
        assert reading.ask("fill 238") == "filled"
        restore()
        # gRPC finds the way again within its back-off.
        for _ in range(60):
            assert reading.ask("pull 8") == "begun"
            if reading.hear() == "ok":
                break
        assert reading.ask("right 8") == "8"
        assert reading.ask("filled 8") == str((BIG_BLOCKS - 8) * BIG_BLOCK_BYTES)
