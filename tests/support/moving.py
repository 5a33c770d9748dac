"""The hands of a test on requests that move between the workers of a running cluster."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from contracts.errors import TandemError
from contracts.messages import AUDIT, MIGRATE, Empty, MigrateRequest, Peer
from rpc import GrpcNetwork

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator, Sequence

    import httpx

    from contracts.messages import AuditReply, MigrateReply, MoveMode
    from rpc import Network
    from tests.support.cluster import ClusterProcess

CALL_TIMEOUT_S = 5.0


@dataclass
class Mover:
    """Asks workers to move requests; knows them by the cluster's state file, as of each call."""

    cluster: ClusterProcess
    network: Network
    #: Begun, as the sources said.
    num_begun: int = 0

    def _peer(self, worker_id: str) -> Peer | None:
        worker = self.cluster.worker(worker_id)
        if worker.address is None:
            return None
        return Peer(worker_id=worker.worker_id, incarnation=worker.incarnation, address=worker.address)

    async def move(
        self, source: str, destination: str, *, mode: MoveMode = "auto", max_requests: int = 1, waiting: bool = True
    ) -> MigrateReply | TandemError:
        """What the source said; an error also where either is not up."""
        here, there = self._peer(source), self._peer(destination)
        if here is None or there is None:
            return TandemError(f"{source} or {destination} is not up")
        ask = MigrateRequest(
            target=here.incarnation, destination=there, mode=mode, max_requests=max_requests, waiting=waiting
        )
        try:
            reply = await self.network.channel(here.address).call(MIGRATE, ask, timeout_s=CALL_TIMEOUT_S)
        except TandemError as error:
            return error
        self.num_begun += len(reply.started)
        return reply

    async def move_at_random(
        self, rng: random.Random, names: Sequence[str], modes: Sequence[MoveMode], pause_s: float
    ) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(rng.uniform(0.0, 2.0 * pause_s))
            source, destination = rng.sample(list(names), 2)
            await self.move(source, destination, mode=rng.choice(modes), max_requests=rng.choice([1, 1, 1, 2]))

    async def audit(self, worker_id: str) -> AuditReply | None:
        """None: it does not answer."""
        peer = self._peer(worker_id)
        if peer is None:
            return None
        try:
            return await self.network.channel(peer.address).call(AUDIT, Empty(), timeout_s=CALL_TIMEOUT_S)
        except TandemError:
            return None


@asynccontextmanager
async def mover_of(cluster: ClusterProcess) -> AsyncGenerator[Mover]:
    network = GrpcNetwork(token=cluster.state.cluster_token)
    try:
        yield Mover(cluster, network)
    finally:
        await network.close()


@dataclass(slots=True)
class Streamed:
    """One answer, as its client saw it."""

    token_ids: list[int] = field(default_factory=list[int])
    text: str = ""
    finish: str | None = None
    error: str | None = None


async def stream(client: httpx.AsyncClient, body: dict[str, Any]) -> Streamed:
    """Reads one streamed completion to its end."""
    seen = Streamed()
    ask = {**body, "stream": True, "return_token_ids": True}
    async with client.stream("POST", "/v1/completions", json=ask) as response:
        if response.status_code != 200:
            seen.error = (await response.aread()).decode()
            return seen
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            document: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in document:
                seen.error = str(document["error"])
                continue
            for choice in document["choices"]:
                seen.token_ids += choice.get("token_ids") or []
                seen.text += choice["text"]
                seen.finish = choice["finish_reason"] or seen.finish
    return seen
