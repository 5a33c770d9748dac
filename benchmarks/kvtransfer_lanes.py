"""The ways of moving blocks that `benchmarks.kvtransfer` compares: Tandem's transports, and what lies beneath each.

A lane has two halves, one in the holder's process and one in the reader's; what the first says of itself (`hello`)
is JSON. A raw lane does the same pieces in the plainest way its library allows: everything that can be known before
the clock starts is prepared before, and nothing is checked.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import mmap
import os
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from contracts.ids import Incarnation
from kvtransfer import ShmTransport
from kvtransfer.host_pool import address_of
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kvtransfer import BlockPair, HostPool, Transport

#: JSON.
Hello = dict[str, Any]
#: Gives the holder's half of the lane an order; returns when it has heard it.
Ask = Callable[[Hello], Awaitable[None]]

CONNECT_TIMEOUT_S = 60.0
PULL_TIMEOUT_S = 120.0


class HolderLane(Protocol):
    """The half that owns the blocks."""

    async def open(self, pool: HostPool) -> Hello: ...

    def obey(self, order: Hello) -> None:
        """Does what the reader's half tells it, without waiting for it."""
        ...

    async def close(self) -> None: ...


class ReaderLane(Protocol):
    """The half that wants them."""

    #: False: the blocks move as one piece from the pool's beginning, whichever they are.
    scattered: bool

    async def open(self, pool: HostPool, hello: Hello, ask: Ask) -> None: ...

    async def prepare(self, pairs: Sequence[BlockPair]) -> Callable[[], Awaitable[None]]:
        """What copies these pairs. The time between `prepare` and the call is not counted."""
        ...

    async def close(self) -> None: ...


# --- Tandem's ---------------------------------------------------------------------------------------------


class _Made:
    """One of Tandem's transports, with all it needs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._network = GrpcNetwork(token="benchmark")
        self._server = self._network.server("127.0.0.1:0")

    async def make(self, pool: HostPool) -> Transport:
        clock, incarnation = LiveClock(), Incarnation(os.getpid())
        if self._name == "shm":
            transport: Transport = ShmTransport(clock=clock, incarnation=incarnation)
            transport.register(pool)
            return transport
        if self._name == "ucx":
            from kvtransfer.ucx import UcxTransport

            transport = UcxTransport(
                clock=clock, incarnation=incarnation, worker_name=f"bench-{os.getpid()}", interface=None
            )
            transport.register(pool)
            return transport
        from kvtransfer.collective import CollectiveTransport

        address = await self._server.start()
        collective = CollectiveTransport(
            clock=clock, network=self._network, address=address, incarnation=incarnation, interface=None
        )
        collective.register(pool)
        collective.register_on(self._server)
        return collective

    async def close(self) -> None:
        await self._server.stop(0.0)
        await self._network.close()


class TandemHolder:
    """`HolderLane` of one of Tandem's transports."""

    def __init__(self, name: str) -> None:
        self._made = _Made(name)
        self._transport: Transport | None = None

    async def open(self, pool: HostPool) -> Hello:
        self._transport = await self._made.make(pool)
        return {"endpoint": self._transport.endpoint().hex()}

    def obey(self, order: Hello) -> None:
        raise AssertionError("a transport needs no orders")

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()
        await self._made.close()


class TandemReader:
    """`ReaderLane` of one of Tandem's transports."""

    scattered = True

    def __init__(self, name: str) -> None:
        self._made = _Made(name)
        self._transport: Transport | None = None
        self._endpoint = b""

    async def open(self, pool: HostPool, hello: Hello, ask: Ask) -> None:
        self._transport = await self._made.make(pool)
        self._endpoint = bytes.fromhex(hello["endpoint"])
        await self._transport.connect(self._endpoint, CONNECT_TIMEOUT_S)

    async def prepare(self, pairs: Sequence[BlockPair]) -> Callable[[], Awaitable[None]]:
        transport = self._transport
        assert transport is not None

        async def pull() -> None:
            result = await transport.pull(self._endpoint, pairs).wait()
            if result.error is not None:
                raise result.error

        return pull

    async def close(self) -> None:
        if self._transport is not None:
            await self._transport.close()
        await self._made.close()


# --- memcpy -----------------------------------------------------------------------------------------------


class MappedHolder:
    """Lets the reader map the pool as it is."""

    async def open(self, pool: HostPool) -> Hello:
        return {"pid": os.getpid(), "descriptor": pool.read_only}

    def obey(self, order: Hello) -> None:
        raise AssertionError("a mapping needs no orders")

    async def close(self) -> None:
        pass


class _MappedReader:
    """The holder's pool, mapped beside one's own."""

    scattered = True

    def __init__(self) -> None:
        self._mapping: mmap.mmap | None = None

    async def open(self, pool: HostPool, hello: Hello, ask: Ask) -> None:
        descriptor = os.open(f"/proc/{hello['pid']}/fd/{hello['descriptor']}", os.O_RDONLY)
        try:
            size = pool.num_blocks * pool.block_bytes
            self._mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        self._pool = pool

    async def close(self) -> None:
        if self._mapping is not None:
            self._mapping.close()


class MemmoveReader(_MappedReader):
    """`ctypes.memmove` of piece after piece, with the addresses ready."""

    async def prepare(self, pairs: Sequence[BlockPair]) -> Callable[[], Awaitable[None]]:
        assert self._mapping is not None
        size, own, theirs = self._pool.block_bytes, self._pool.address, address_of(self._mapping)
        moves = [(own + target * size, theirs + source * size) for source, target in pairs]
        memmove = ctypes.memmove

        async def copy() -> None:
            for target, source in moves:
                memmove(target, source, size)

        return copy


class NumpyReader(_MappedReader):
    """Assignment of numpy's rows, one after the other."""

    async def prepare(self, pairs: Sequence[BlockPair]) -> Callable[[], Awaitable[None]]:
        assert self._mapping is not None
        shape = (self._pool.num_blocks, self._pool.block_bytes)
        own = np.frombuffer(self._pool.view(), np.uint8).reshape(shape)
        theirs = np.frombuffer(self._mapping, np.uint8).reshape(shape)

        async def copy() -> None:
            for source, target in pairs:
                own[target] = theirs[source]

        return copy


# --- NIXL -------------------------------------------------------------------------------------------------


#: How often the side that is read looks after its connections.
NIXL_PROGRESS_S = 0.005


def _nixl_agent(pool: HostPool) -> Any:
    """An agent of NIXL's own Python interface over UCX, as it comes, with the pool registered.

    No progress thread: a copy within one machine needs none, and NIXL's would keep a core busy.
    """
    # Everything on loopback, as Tandem's: nothing of a benchmark listens beyond it.
    os.environ.setdefault("UCX_NET_DEVICES", "lo")
    nixl: Any = importlib.import_module("nixl_cu12._api")
    config = nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])
    agent: Any = nixl.nixl_agent(f"raw-{os.getpid()}", config)
    agent.register_memory([(pool.address, pool.num_blocks * pool.block_bytes, 0, "")], "DRAM")
    return agent


def _all_blocks(address: int, pool: HostPool) -> list[tuple[int, int, int]]:
    return [(address + index * pool.block_bytes, pool.block_bytes, 0) for index in range(pool.num_blocks)]


class NixlHolder:
    """Raw NIXL: the side that is read."""

    def __init__(self) -> None:
        self._agent: Any = None
        self._progress: asyncio.Task[None] | None = None

    async def open(self, pool: HostPool) -> Hello:
        self._agent = _nixl_agent(pool)
        self._progress = asyncio.create_task(self._keep_up())
        return {"metadata": self._agent.get_agent_metadata().hex(), "address": pool.address}

    async def _keep_up(self) -> None:
        """Lets the connection come about."""
        while True:
            self._agent.get_new_notifs()
            await asyncio.sleep(NIXL_PROGRESS_S)

    def obey(self, order: Hello) -> None:
        raise AssertionError("one-sided reads need no orders")

    async def close(self) -> None:
        if self._progress is not None:
            self._progress.cancel()
        self._agent = None


class NixlReader:
    """Raw NIXL: one READ of all pieces, described in advance, and polled until it is done."""

    scattered = True

    def __init__(self) -> None:
        self._agent: Any = None

    async def open(self, pool: HostPool, hello: Hello, ask: Ask) -> None:
        agent = self._agent = _nixl_agent(pool)
        peer = agent.add_remote_agent(bytes.fromhex(hello["metadata"]))
        self._own = agent.prep_xfer_dlist("NIXL_INIT_AGENT", _all_blocks(pool.address, pool), "DRAM")
        self._theirs = agent.prep_xfer_dlist(peer, _all_blocks(hello["address"], pool), "DRAM")

    async def prepare(self, pairs: Sequence[BlockPair]) -> Callable[[], Awaitable[None]]:
        agent = self._agent
        table = np.array(pairs, np.int32).reshape(-1, 2)
        sources, targets = np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1])

        async def read() -> None:
            handle = agent.make_prepped_xfer("READ", self._own, targets, self._theirs, sources)
            state = agent.transfer(handle)
            while state == "PROC":
                state = agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"raw NIXL: {state}")
            agent.release_xfer_handle(handle)

        return read

    async def close(self) -> None:
        if self._agent is not None:
            self._agent.release_dlist_handle(self._own)
            self._agent.release_dlist_handle(self._theirs)
        self._agent = None


# --- gloo -------------------------------------------------------------------------------------------------

#: Largest message of the raw side, and how many of them are posted at a time. The fastest of 1-64 MiB and 1-16.
GLOO_MESSAGE_BYTES = 1 << 20
GLOO_POSTED = 16

#: Until the holder's sends wait for the reader's receives.
GLOO_LEAD_S = 0.005


def _gloo_group(store_path: str, rank: int) -> Any:
    # Parts of it have no types.
    dist: Any = importlib.import_module("torch.distributed")
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=PULL_TIMEOUT_S)
    options._threads = 2
    return dist.ProcessGroupGloo(dist.FileStore(store_path, 2), rank, 2, options)


def _gloo_messages(pool: HostPool, num_bytes: int) -> list[Any]:
    """The first `num_bytes` of the pool, cut: raw send and receive know no scattered pieces."""
    torch: Any = importlib.import_module("torch")
    whole = torch.frombuffer(pool.view(), dtype=torch.uint8)[:num_bytes]
    return list(whole.split(GLOO_MESSAGE_BYTES))


def _exchange(begin: Callable[[Any, int], Any], messages: Sequence[Any]) -> None:
    """Begins with all messages, some of them at a time, and waits for all."""
    posted: list[Any] = []
    for tag, message in enumerate(messages):
        if len(posted) == GLOO_POSTED:
            posted.pop(0).wait()
        posted.append(begin(message, tag))
    for each in posted:
        each.wait()


class GlooHolder:
    """Raw gloo: sends when told how much."""

    def __init__(self, scratch: Path) -> None:
        self._store = str(scratch / f"gloo-{os.getpid()}-{id(self)}")
        self._joining: asyncio.Future[Any] | None = None
        self._sending: asyncio.Future[None] | None = None

    async def open(self, pool: HostPool) -> Hello:
        self._pool = pool
        # It returns when the reader has come, too.
        self._joining = asyncio.get_running_loop().run_in_executor(None, _gloo_group, self._store, 1)
        return {"store": self._store}

    def obey(self, order: Hello) -> None:
        assert self._joining is not None
        group = self._joining.result()

        def send(message: Any, tag: int) -> Any:
            return group.send([message], 0, tag)

        messages = _gloo_messages(self._pool, order["num_bytes"])
        self._sending = asyncio.get_running_loop().run_in_executor(None, _exchange, send, messages)

    async def close(self) -> None:
        if self._sending is not None:
            await self._sending
        self._joining = None


class GlooReader:
    """Raw gloo: receives, contiguous, what the holder is already waiting to send."""

    scattered = False

    def __init__(self) -> None:
        self._group: Any = None

    async def open(self, pool: HostPool, hello: Hello, ask: Ask) -> None:
        self._pool = pool
        self._ask = ask
        self._group = await asyncio.get_running_loop().run_in_executor(None, _gloo_group, hello["store"], 0)

    async def prepare(self, pairs: Sequence[BlockPair]) -> Callable[[], Awaitable[None]]:
        num_bytes = len(pairs) * self._pool.block_bytes
        messages = _gloo_messages(self._pool, num_bytes)
        group = self._group

        def begin(message: Any, tag: int) -> Any:
            return group.recv([message], 1, tag)

        await self._ask({"num_bytes": num_bytes})
        await asyncio.sleep(GLOO_LEAD_S)

        async def receive() -> None:
            _exchange(begin, messages)

        return receive

    async def close(self) -> None:
        self._group = None


def holder_lanes(scratch: Path) -> Mapping[str, Callable[[], HolderLane]]:
    """By name; what they leave behind is in `scratch`."""
    return {
        "shm": lambda: TandemHolder("shm"),
        "ucx": lambda: TandemHolder("ucx"),
        "collective": lambda: TandemHolder("collective"),
        "memcpy-ctypes": MappedHolder,
        "memcpy-numpy": MappedHolder,
        "nixl": NixlHolder,
        "gloo": lambda: GlooHolder(scratch),
    }


READER_LANES: Mapping[str, Callable[[], ReaderLane]] = {
    "shm": lambda: TandemReader("shm"),
    "ucx": lambda: TandemReader("ucx"),
    "collective": lambda: TandemReader("collective"),
    "memcpy-ctypes": MemmoveReader,
    "memcpy-numpy": NumpyReader,
    "nixl": NixlReader,
    "gloo": GlooReader,
}
