"""The collective transport: blocks by torch.distributed's send and receive, between any two processes that share
a network: gloo over TCP, or NCCL between CUDA devices.

Sending takes two, so a reader first asks over rpc, which knows who may ask; each pair of processes has a process
group of its own, made when first needed and torn down when it breaks or idles.

    kvtransfer.collective_reader    asks, receives, copies into the pool
    kvtransfer.collective_holder    answers, sends from the pool
    kvtransfer.collective_group     the process group of two; of gloo and of NCCL in modules of their own
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, InvariantBroken, NoCapacity, TandemError, WorkerUnavailable
from contracts.messages import MEET, PART, SEND, Empty, MeetReply, MeetRequest, PartRequest, SendRequest
from kvtransfer.collective_address import device_arguments
from kvtransfer.collective_endpoint import SECRET_BYTES, Endpoint, decode_endpoint, encode_endpoint
from kvtransfer.collective_gloo import GlooGroup
from kvtransfer.collective_holder import HolderSide, Holding
from kvtransfer.collective_pieces import BlockCopier, piece_bytes
from kvtransfer.collective_reader import CollectivePull, Courier, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.clock import Clock
    from contracts.ids import Incarnation
    from kvtransfer.collective_group import MakeGroup
    from kvtransfer.transport import BlockPair, Pool
    from rpc.api import CallContext, Network, Server

#: Holders with a courier at a time; the one idle for longest goes first.
MAX_COURIERS = 64

#: Threads that close groups, which may each take as long as a connection that never comes.
NUM_REAPERS = 4


def _as_bound(address: bytes) -> bytes:
    return address


class CollectiveTransport:
    """`kvtransfer.transport.Transport` for pools in host memory: over gloo for device "cpu", and over NCCL with
    staging memory on the device for "cuda:0" and the like. Both sides need the same of the two.

    `address` is where `register_on`'s server is reached. `interface` names what gloo listens on: a network
    interface or a numeric address of this machine; None: loopback. `advertise` turns the address gloo is bound
    to into the one that peers should call (`kvtransfer.collective_address.rewrite_address`).
    """

    name = "collective"

    def __init__(
        self,
        *,
        clock: Clock,
        network: Network,
        address: str,
        incarnation: Incarnation,
        interface: str | None = None,
        device: str = "cpu",
        advertise: Callable[[bytes], bytes] = _as_bound,
    ) -> None:
        """Raises ConfigError for an interface or device that cannot be used."""
        if device == "cpu":
            device_arguments(interface)
        else:
            from kvtransfer.collective_nccl import check_device, prepare_environment

            check_device(device)
            prepare_environment(interface)
        self._clock = clock
        self._network = network
        self._address = address
        self._incarnation = incarnation
        self._interface = interface
        self._device = device
        self._advertise = advertise
        self._reaper = ThreadPoolExecutor(NUM_REAPERS, "kv-collective-reaper")
        #: All four from `register` on; None again after `close`, but for the endpoint.
        self._pool: Pool | None = None
        self._endpoint: Endpoint | None = None
        self._holder: HolderSide | None = None
        self._reading: Reading | None = None
        #: By endpoint, least recently used first.
        self._couriers: dict[bytes, Courier] = {}
        #: Couriers being let go.
        self._leaving: set[asyncio.Task[None]] = set()

    def register(self, pool: Pool) -> None:
        if self._pool is not None:
            raise InvariantBroken("a second pool is registered with the collective transport")
        self._pool = pool
        self._endpoint = Endpoint(
            address=self._address,
            incarnation=self._incarnation,
            secret=secrets.token_bytes(SECRET_BYTES),
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
        )
        copier = BlockCopier(pool)
        make_group = self._group_maker(piece_bytes(pool.block_bytes))
        self._holder = HolderSide(
            Holding(
                endpoint=self._endpoint,
                copier=copier,
                pool=pool,
                make_group=make_group,
                advertise=self._advertise,
            )
        )
        self._reading = Reading(
            clock=self._clock,
            network=self._network,
            copier=copier,
            make_group=make_group,
            advertise=self._advertise,
            reader=secrets.token_hex(8),
            group_numbers=itertools.count(1),
        )

    def _group_maker(self, piece_bytes: int) -> MakeGroup:
        if self._device == "cpu":
            return functools.partial(GlooGroup, interface=self._interface, piece_bytes=piece_bytes, reaper=self._reaper)
        from kvtransfer.collective_nccl import NcclGroup

        return functools.partial(
            NcclGroup, device=self._device, clock=self._clock, piece_bytes=piece_bytes, reaper=self._reaper
        )

    def register_on(self, server: Server) -> None:
        """Lets readers meet this process. Those that come before `register` get WorkerUnavailable."""
        server.register(MEET, self._on_meet)
        server.register(SEND, self._on_send)
        server.register(PART, self._on_part)

    async def _on_meet(self, body: MeetRequest, _context: CallContext) -> MeetReply:
        return await self._holding().meet(body)

    async def _on_send(self, body: SendRequest, _context: CallContext) -> Empty:
        return self._holding().send(body)

    async def _on_part(self, body: PartRequest, _context: CallContext) -> Empty:
        return self._holding().part(body)

    def _holding(self) -> HolderSide:
        if self._holder is None:
            raise WorkerUnavailable(f"no pool is registered with the collective transport at {self._address}")
        return self._holder

    def endpoint(self) -> bytes:
        if self._endpoint is None:
            raise InvariantBroken("the collective transport has no pool registered")
        return encode_endpoint(self._endpoint)

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        pull = self.pull(endpoint, ())
        try:
            async with asyncio.timeout(deadline_s):
                result = await pull.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"no process group within {deadline_s:g} s") from None
        finally:
            pull.request_stop()
        if result.error is not None:
            raise result.error

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> CollectivePull:
        if self._reading is None:
            raise InvariantBroken("the collective transport has no pool registered, or was closed")
        pull = CollectivePull(pairs, self._clock.now_s(), self._clock)
        try:
            courier = self._couriers.pop(endpoint, None) or self._new_courier(self._reading, endpoint)
        except TandemError as error:
            pull.finish(error)
            return pull
        # To the end of the order of use.
        self._couriers[endpoint] = courier
        courier.submit(pull)
        return pull

    def forget(self, endpoint: bytes) -> None:
        self._let_go(endpoint, "the holder's life is over", tell=False)

    async def close(self) -> None:
        self._pool = None
        self._reading = None
        holder, self._holder = self._holder, None
        for endpoint in list(self._couriers):
            self._let_go(endpoint, "the transport is closed", tell=True)
        while self._leaving:
            await asyncio.wait(self._leaving)
        if holder is not None:
            await holder.close()
        self._reaper.shutdown()

    def _new_courier(self, reading: Reading, endpoint: bytes) -> Courier:
        """Raises BadRequest or NoCapacity."""
        decoded = decode_endpoint(endpoint)
        if len(self._couriers) >= MAX_COURIERS:
            idle = next((each for each, courier in self._couriers.items() if courier.idle), None)
            if idle is None:
                raise NoCapacity(f"pulls from {MAX_COURIERS} holders at a time are under way")
            self._let_go(idle, "unused", tell=True)
        return Courier(reading, decoded)

    def _let_go(self, endpoint: bytes, reason: str, *, tell: bool) -> None:
        courier = self._couriers.pop(endpoint, None)
        if courier is not None:
            task = asyncio.get_running_loop().create_task(courier.close(reason, tell=tell))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
