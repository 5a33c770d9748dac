"""Stands before a real coordinator and tells everybody that each worker is reached through a damaging proxy."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from contracts.messages import DEREGISTER, DISPATCH, HEARTBEAT, MEMBERS, REGISTER
from rpc import GrpcNetwork
from tests.support.proxy import Proxy, proxy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from contracts.messages import Method, RegisterReply, ReplyT, RequestT, WorkerInfo
    from rpc import CallContext, Server
    from tests.support.proxy import Damage

CALL_TIMEOUT_S = 5.0


class Front:
    """Passes every call on, except that a registration's address becomes that of a proxy of its own."""

    def __init__(self, network: GrpcNetwork, coordinator_address: str, stack: AsyncExitStack, seed: int) -> None:
        self._network = network
        self._coordinator_address = coordinator_address
        self._stack = stack
        self._seed = seed
        self.address = ""
        #: By the worker's own address.
        self.proxies: dict[str, Proxy] = {}

    def set_damage(self, damage: Damage) -> None:
        for each in self.proxies.values():
            each.damage = damage

    def cut_all(self) -> None:
        """Breaks every connection that passes a proxy now."""
        for each in self.proxies.values():
            each.cut_all()

    def num_done(self) -> int:
        return sum(each.done.total() for each in self.proxies.values())

    def register_on(self, server: Server) -> None:
        server.register(REGISTER, self._on_register)
        self._relay(server, HEARTBEAT)
        self._relay(server, DEREGISTER)
        self._relay(server, DISPATCH)
        self._relay(server, MEMBERS)

    async def _on_register(self, info: WorkerInfo, _context: CallContext) -> RegisterReply:
        between = self.proxies.get(info.address)
        if between is None:
            host, _, port = info.address.rpartition(":")
            rng = random.Random(f"{self._seed} {info.worker_id}")
            between = await self._stack.enter_async_context(proxy(host, int(port), rng))
            self.proxies[info.address] = between
        told = msgspec.structs.replace(info, address=between.address)
        return await self._call(REGISTER, told)

    def _relay(self, server: Server, method: Method[RequestT, ReplyT]) -> None:
        async def handler(request: RequestT, _context: CallContext) -> ReplyT:
            return await self._call(method, request)

        server.register(method, handler)

    async def _call(self, method: Method[RequestT, ReplyT], request: RequestT) -> ReplyT:
        channel = self._network.channel(self._coordinator_address)
        return await channel.call(method, request, timeout_s=CALL_TIMEOUT_S)


@asynccontextmanager
async def front(coordinator_address: str, token: str, seed: int) -> AsyncGenerator[Front]:
    """Serves on `address`, in this process's event loop, until the block is left."""
    async with AsyncExitStack() as stack:
        network = GrpcNetwork(token=token)
        stack.push_async_callback(network.close)
        made = Front(network, coordinator_address, stack, seed)
        server = network.server("127.0.0.1:0")
        made.register_on(server)
        made.address = await server.start()
        stack.push_async_callback(server.stop, 0.2)
        yield made
