"""The UCX transport between real processes: bytes, stops, deaths, freezes, refusals, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from contracts.errors import (
    BadRequest,
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    TandemError,
    WorkerUnavailable,
)
from contracts.ids import Incarnation
from kvtransfer import ucx, ucx_agent, ucx_thread
from kvtransfer.ucx import UcxTransport
from kvtransfer.ucx_endpoint import decode_endpoint, encode_endpoint
from rpc import LiveClock
from tests.support.long_tests import only_long
from tests.support.pools import register_pool
from tests.support.transport_contract import MakeTransport, TransportContract, closing, pair
from tests.support.ucx_holder import content, words

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from numpy.typing import NDArray

    from kvtransfer import BlockPair, PullResult

NUM_BLOCKS = 64
BLOCK_BYTES = 3 * 4096 + 8
#: Long enough for a machine under load; nothing waits for it when all is well.
PATIENCE_S = 60.0

#: A pull of all of it over tcp takes a tenth of a second and more.
BIG_BLOCKS = 256
BIG_BLOCK_BYTES = 512 << 10

TCP = {"UCX_TLS": "tcp"}

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(package) for package in ucx_agent.PACKAGES), reason="NIXL is not installed"
)


def new_transport(name: str = "d0") -> UcxTransport:
    return UcxTransport(clock=LiveClock(), incarnation=Incarnation(1), worker_name=name, interface=None)


class TestUcxContract(TransportContract):
    @pytest.fixture
    async def make(self) -> AsyncGenerator[MakeTransport]:
        async with closing(new_transport) as make:
            yield make


def num_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers of this process reach holders over tcp alone."""
    monkeypatch.setenv("UCX_TLS", "tcp")


class Holder:
    """A holder's process."""

    def __init__(self, process: subprocess.Popen[str], endpoint: bytes) -> None:
        self.process = process
        self.endpoint = endpoint

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def wake(self) -> None:
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def holder(num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES, **environ: str) -> Generator[Holder]:
    command = [sys.executable, "-m", "tests.support.ucx_holder", str(num_blocks), str(block_bytes)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **environ}) as process:
        try:
            assert process.stdout is not None
            yield Holder(process, bytes.fromhex(process.stdout.readline().strip()))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def child() -> Generator[Holder]:
    """A holder that every test may read and none may end."""
    with holder() as process:
        yield process


@pytest.fixture(scope="module")
def one_big() -> Generator[Holder]:
    with holder(BIG_BLOCKS, BIG_BLOCK_BYTES, **TCP) as process:
        yield process


@pytest.fixture
def big(one_big: Holder) -> Generator[Holder]:
    """A holder of much, reached over tcp, that tests may also freeze."""
    yield one_big
    one_big.wake()


@asynccontextmanager
async def reader(
    num_blocks: int = NUM_BLOCKS, block_bytes: int = BLOCK_BYTES
) -> AsyncGenerator[tuple[UcxTransport, NDArray[np.uint64]]]:
    """A reader and its pool, by blocks and words."""
    transport = new_transport()
    try:
        pool = register_pool(transport, num_blocks, block_bytes)
        yield transport, words(pool, block_bytes)
    finally:
        await transport.close()


async def pull(transport: UcxTransport, endpoint: bytes, *pairs: BlockPair) -> PullResult:
    async with asyncio.timeout(PATIENCE_S):
        return await transport.pull(endpoint, pairs).wait()


async def failed(transport: UcxTransport, endpoint: bytes, *pairs: BlockPair) -> TandemError:
    """The error of a pull that must fail; `connect` must fail the same way where no pair is at fault."""
    error = (await pull(transport, endpoint, *(pairs or (pair(0, 0),)))).error
    assert error is not None
    if not pairs:
        with pytest.raises(type(error)):
            await transport.connect(endpoint, PATIENCE_S)
    return error


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def until_bytes_land(pool: NDArray[np.uint64]) -> None:
    await until(lambda: bool(pool[0, 0]))


async def assert_nothing_lands(pool: NDArray[np.uint64], for_s: float) -> None:
    before = pool.copy()
    await asyncio.sleep(for_s)
    assert np.array_equal(pool, before)


# --- bytes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transports", ["tcp", "cma,tcp"])
async def test_bytes_arrive_where_they_belong_and_nowhere_else(
    transports: str, child: Holder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    rng = random.Random(1)
    async with reader() as (transport, pool):
        sources, targets = rng.sample(range(NUM_BLOCKS), 40), rng.sample(range(NUM_BLOCKS), 40)
        scattered = [pair(*each) for each in zip(sources, targets, strict=True)]
        result = await pull(transport, child.endpoint, *scattered)
        assert (result.error, result.num_bytes) == (None, 40 * BLOCK_BYTES)
        expected = np.zeros_like(pool)
        expected[targets] = content(sources, BLOCK_BYTES)
        assert np.array_equal(pool, expected)
        contiguous = [pair(n, n) for n in range(NUM_BLOCKS)]
        assert (await pull(transport, child.endpoint, *contiguous)).error is None
        assert np.array_equal(pool, content(range(NUM_BLOCKS), BLOCK_BYTES))


async def test_large_pulls_side_by_side(big: Holder, tcp: None) -> None:
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        pulls = [
            transport.pull(big.endpoint, [pair(n, BIG_BLOCKS - 1 - n) for n in range(start, BIG_BLOCKS, 12)])
            for start in range(12)
        ]
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*(each.wait() for each in pulls))
        assert [each.error for each in results] == [None] * 12
        assert np.array_equal(pool, content(range(BIG_BLOCKS), BIG_BLOCK_BYTES)[::-1])


async def test_both_ways() -> None:
    async with reader() as (one, one_pool), reader() as (two, two_pool):
        one_pool[0] = 5
        assert (await pull(two, one.endpoint(), pair(0, 3))).error is None
        assert (await pull(one, two.endpoint(), pair(3, 7))).error is None
        assert (one_pool[7] == 5).all()
        assert not two_pool[:3].any()


# --- ends -----------------------------------------------------------------------------------------------


async def test_stopped_pull_is_over_when_nothing_lands_any_more(big: Holder, tcp: None) -> None:
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        running = transport.pull(big.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)])
        await until_bytes_land(pool)
        running.request_stop()
        running.request_stop()
        async with asyncio.timeout(PATIENCE_S):
            result = await running.wait()
        assert isinstance(result.error, Cancelled)
        assert 0 < result.num_bytes < BIG_BLOCKS * BIG_BLOCK_BYTES
        assert np.count_nonzero(pool) * 8 == result.num_bytes
        await assert_nothing_lands(pool, 0.5)
        assert (await pull(transport, big.endpoint, pair(1, 2))).error is None
        assert np.array_equal(pool[2], content([1], BIG_BLOCK_BYTES)[0])


async def test_frozen_holders_pull_is_not_over_until_it_wakes(big: Holder, child: Holder, tcp: None) -> None:
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        running = transport.pull(big.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)])
        await until_bytes_land(pool)
        big.freeze()
        behind = [transport.pull(big.endpoint, [pair(0, 0)]) for _ in range(2 * ucx_thread.MAX_ACTIVE_PULLS)]
        running.request_stop()
        waiting = asyncio.ensure_future(running.wait())
        _, late = await asyncio.wait([waiting], timeout=2.0)
        assert late == {waiting}
        # One that has posted nothing yet is over at once.
        behind[-1].request_stop()
        async with asyncio.timeout(PATIENCE_S):
            assert isinstance((await behind[-1].wait()).error, Cancelled)
        # Nobody else waits for it: not even a refusal.
        assert isinstance(await failed(transport, child.endpoint), IncompatiblePeer)
        with pytest.raises(DeadlineExceeded):
            await transport.connect(big.endpoint, 0.2)
        big.wake()
        async with asyncio.timeout(PATIENCE_S):
            result = await waiting
            assert [(await each.wait()).error for each in behind[:-1]] == [None] * (len(behind) - 1)
        assert isinstance(result.error, Cancelled)
        await assert_nothing_lands(pool, 0.5)


@pytest.mark.parametrize("frozen", [False, True])
async def test_holder_killed_in_mid_pull(frozen: bool, big: Holder, tcp: None) -> None:
    with holder(BIG_BLOCKS, BIG_BLOCK_BYTES, **TCP) as doomed:
        async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
            running = transport.pull(doomed.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)])
            behind = [transport.pull(doomed.endpoint, [pair(0, 0)]) for _ in range(20)]
            await until_bytes_land(pool)
            if frozen:
                doomed.freeze()
                running.request_stop()
                await asyncio.sleep(0.5)
            doomed.kill()
            async with asyncio.timeout(PATIENCE_S):
                results = [await each.wait() for each in (running, *behind)]
            errors = [each.error for each in results if each.error is not None]
            assert results[0].error in errors
            assert all(isinstance(error, WorkerUnavailable) for error in errors)
            await assert_nothing_lands(pool, 0.5)
            assert isinstance(await failed(transport, doomed.endpoint), WorkerUnavailable)
            assert (await pull(transport, big.endpoint, pair(5, 1))).error is None
            assert np.array_equal(pool[1], content([5], BIG_BLOCK_BYTES)[0])


async def test_holder_killed_before_a_pull() -> None:
    with holder() as child:
        async with reader() as (transport, pool):
            await transport.connect(child.endpoint, PATIENCE_S)
            child.kill()
            assert isinstance(await failed(transport, child.endpoint), WorkerUnavailable)
            assert not pool.any()


async def test_forgotten_in_mid_pull(big: Holder, tcp: None) -> None:
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        running = transport.pull(big.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)])
        await until_bytes_land(pool)
        transport.forget(big.endpoint)
        async with asyncio.timeout(PATIENCE_S):
            result = await running.wait()
        assert isinstance(result.error, WorkerUnavailable)
        assert 0 < result.num_bytes < BIG_BLOCKS * BIG_BLOCK_BYTES
        await assert_nothing_lands(pool, 0.5)
        assert (await pull(transport, big.endpoint, pair(1, 2))).error is None


async def restart_holders(times: int) -> None:
    """One worker name; each life is killed in turn, in the middle of pulls or after them, and told of or not."""
    num_blocks, block_bytes = 64, 64 << 10
    async with reader(num_blocks, block_bytes) as (transport, pool):
        descriptors: int | None = None
        for life in range(times):
            with holder(num_blocks, block_bytes) as child:
                assert (await pull(transport, child.endpoint, pair(life % num_blocks, 0))).error is None
                assert np.array_equal(pool[0], content([life % num_blocks], block_bytes)[0])
                running = [transport.pull(child.endpoint, [pair(n, n) for n in range(num_blocks)]) for _ in range(4)]
                child.kill()
                async with asyncio.timeout(PATIENCE_S):
                    errors = [(await each.wait()).error for each in running]
                assert all(error is None or isinstance(error, WorkerUnavailable) for error in errors)
                if life % 2:
                    transport.forget(child.endpoint)
                else:
                    assert isinstance(await failed(transport, child.endpoint, pair(0, 0)), WorkerUnavailable)
            if life == 1:
                descriptors = num_descriptors()
        assert descriptors is not None
        # A few may still be closing.
        assert num_descriptors() <= descriptors + 4


@pytest.mark.parametrize("transports", ["tcp", "cma,tcp"])
async def test_holder_restarted_under_its_name(transports: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", transports)
    await restart_holders(4)


@only_long
@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_holder_restarted_a_hundred_times(tcp: None) -> None:
    await restart_holders(100)


# --- refusals -------------------------------------------------------------------------------------------


async def test_refusals(child: Holder) -> None:
    endpoint = decode_endpoint(child.endpoint)

    def but(**changes: object) -> bytes:
        return encode_endpoint(msgspec.structs.replace(endpoint, **changes))

    async with reader() as (transport, pool):
        unfit = await failed(transport, but(block_bytes=4096))
        assert isinstance(unfit, IncompatiblePeer)
        assert unfit.message == f"block_bytes: {BLOCK_BYTES} here, 4096 there"
        foreign = await failed(transport, but(software="nixl 0.0.1"))
        assert isinstance(foreign, IncompatiblePeer)
        assert "nixl 0.0.1 there" in foreign.message
        assert isinstance(await failed(transport, but(num_blocks=0)), BadRequest)
        # Memory that the holder has not registered.
        assert isinstance(await failed(transport, but(address=4096)), WorkerUnavailable)
        assert isinstance(await failed(transport, child.endpoint, pair(NUM_BLOCKS, 1)), BadRequest)
        assert isinstance(await failed(transport, child.endpoint, pair(0, NUM_BLOCKS)), BadRequest)
        assert isinstance(await failed(transport, child.endpoint, pair(-1, 0)), BadRequest)
        assert not pool.any()
        assert (await pull(transport, child.endpoint, pair(3, 0))).error is None


async def test_damaged_endpoints_never_reach_the_library() -> None:
    rng = random.Random(2)
    async with reader() as (holding, _), reader() as (transport, _):
        raw = holding.endpoint()
        for garbage in (b"", b"\xc1", rng.randbytes(400), raw[:-1], raw + b"x"):
            assert isinstance(await failed(transport, garbage), BadRequest)
        for _ in range(50):
            damaged = bytearray(raw)
            damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
            assert isinstance((await pull(transport, bytes(damaged), pair(0, 0))).error, BadRequest)
        assert (await pull(transport, raw, pair(0, 0))).error is None


async def test_metadata_that_nixl_cannot_read() -> None:
    async with reader() as (holding, _), reader() as (transport, _):
        endpoint = msgspec.structs.replace(decode_endpoint(holding.endpoint()), metadata=b"nonsense")
        assert isinstance(await failed(transport, encode_endpoint(endpoint)), WorkerUnavailable)


async def test_least_recently_used_peer_goes_first(big: Holder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ucx_thread, "MAX_PEERS", 1)
    monkeypatch.setenv("UCX_TLS", "tcp")
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (other, _), reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (me, pool):
        for endpoint in (other.endpoint(), big.endpoint, other.endpoint(), big.endpoint):
            assert (await pull(me, endpoint, pair(0, 1))).error is None
        running = me.pull(big.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)])
        await until_bytes_land(pool)
        big.freeze()
        assert isinstance(await failed(me, other.endpoint()), NoCapacity)
        big.wake()
        assert (await running.wait()).error is None


async def test_what_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = UcxTransport(clock=LiveClock(), incarnation=Incarnation(1), worker_name="d0", interface="nowhere0")
    with pytest.raises(ConfigError, match=r"no network interface 'nowhere0' here, only .*\blo\b"):
        register_pool(nowhere, 1, 4096)
    monkeypatch.setattr(ucx_agent, "PACKAGES", {"nixl_of_nobody": "nixl-of-nobody"})
    with pytest.raises(ConfigError, match=r"pip install 'tandem-serve\[ucx\]'"):
        register_pool(new_transport(), 1, 4096)
    await nowhere.close()


async def test_misuse_is_a_bug() -> None:
    transport = new_transport()
    with pytest.raises(InvariantBroken):
        transport.endpoint()
    with pytest.raises(InvariantBroken):
        transport.pull(b"", [])
    register_pool(transport, 1, 4096)
    with pytest.raises(InvariantBroken):
        register_pool(transport, 1, 4096)
    await transport.close()
    await transport.close()


# --- what it leaves, and whom it lets in ------------------------------------------------------------------


def own_sockets() -> dict[str, list[str]]:
    """This process's TCP sockets by inode, with the columns of /proc/net/tcp."""
    links: set[str] = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            links.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    found: dict[str, list[str]] = {}
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if f"socket:[{fields[9]}]" in links:
                    found[fields[9]] = fields
    return found


def listening_addresses() -> set[str]:
    """Where this process listens for TCP, as /proc writes addresses."""
    return {fields[1].split(":")[0] for fields in own_sockets().values() if fields[3] == "0A"}


async def test_listens_on_loopback_alone_and_leaves_nothing(child: Holder) -> None:
    async with reader() as (transport, _):
        pass  # what the libraries keep for good is there now
    descriptors, threads = num_descriptors(), len(os.listdir("/proc/self/task"))
    before, environ = listening_addresses(), dict(os.environ)
    async with reader() as (transport, _):
        assert listening_addresses() - before == {"0100007F"}
        assert (await pull(transport, child.endpoint, pair(0, 0))).error is None
        assert dict(os.environ) == environ
    assert listening_addresses() == before
    assert num_descriptors() <= descriptors
    assert len(os.listdir("/proc/self/task")) <= threads


async def test_idle_connections_are_looked_after(tcp: None) -> None:
    """What the holder's keep-alives bring is taken, and so is the holder's end."""
    before = set(own_sockets())

    def new() -> list[list[str]]:
        return [fields for inode, fields in own_sockets().items() if inode not in before]

    def unread() -> bool:
        return any(int(fields[4].split(":")[1], 16) > 0 for fields in new() if fields[3] != "0A")

    with holder(UCX_TLS="tcp", UCX_KEEPALIVE_INTERVAL="50ms") as child:
        async with reader() as (transport, _):
            await transport.connect(child.endpoint, PATIENCE_S)
            for _ in range(2):
                await until(unread)
                await until(lambda: not unread())
            child.kill()
            # CLOSE_WAIT: the holder's side is closed, and nobody here has noticed.
            await until(lambda: not unread() and all(fields[3] != "08" for fields in new()))
            assert isinstance(await failed(transport, child.endpoint), WorkerUnavailable)


async def test_closing_waits_for_pulls(big: Holder, tcp: None) -> None:
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        running = [transport.pull(big.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)]) for _ in range(3)]
        await until_bytes_land(pool)
    results = [await each.wait() for each in running]
    assert all(isinstance(each.error, Cancelled) for each in results)
    await assert_nothing_lands(pool, 0.3)


async def test_closing_leaves_a_frozen_holders_pull_to_its_thread(
    big: Holder, tcp: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ucx, "CLOSE_TIMEOUT_S", 0.5)
    async with reader(BIG_BLOCKS, BIG_BLOCK_BYTES) as (transport, pool):
        running = transport.pull(big.endpoint, [pair(n, n) for n in range(BIG_BLOCKS)])
        await until_bytes_land(pool)
        big.freeze()
    waiting = asyncio.ensure_future(running.wait())
    _, late = await asyncio.wait([waiting], timeout=0.5)
    assert late == {waiting}
    big.wake()
    async with asyncio.timeout(PATIENCE_S):
        assert isinstance((await waiting).error, Cancelled)
    await until(lambda: all(thread.name != "kv-ucx" for thread in threading.enumerate()))
