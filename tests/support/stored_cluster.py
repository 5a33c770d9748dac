"""The hands of a test on a running cluster with a store: prompts whose beginning is fetched from there whatever that
costs, what stands in which tier, and where a block lies in the files."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import httpx
import numpy as np

from contracts.errors import TandemError, WorkerUnavailable
from contracts.messages import DESCRIBE, DescribeRequest, Peer, PrefixPlan
from contracts.store_messages import (
    CACHE_CLEAR,
    CACHE_LIST,
    CACHE_STAT,
    CacheClearRequest,
    CacheListRequest,
    CacheStatRequest,
)
from kvstore.block_keys import block_keys, root_key
from kvstore.ssd.format import PAGE_BYTES, header_bytes_of, parse_segment_path, read_header
from rpc import GrpcNetwork
from tests.support.direct_client import DirectAnswer, DirectClient
from tests.support.oracle import NUM_NEW, Oracle

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from contracts.store_messages import Tier, TierFigures
    from tests.support.cluster import ClusterProcess

MODEL = "tiny"
#: Of the tenant that sends no key.
SALT = "default"
CALL_TIMEOUT_S = 5.0
MOST_LISTED = 1_000
#: Anything that is to come about does so within this, on a loaded machine.
BOUND_S = 30.0
_LOOK_INTERVAL_S = 0.05


async def until(holds: Callable[[], Awaitable[bool]], what: str, within_s: float = BOUND_S) -> None:
    """A call that a dead or frozen process does not answer counts as no."""
    until_s = time.monotonic() + within_s
    while True:
        try:
            if await holds():
                return
            problem = ""
        except TandemError as error:
            problem = f" ({error!r})"
        assert time.monotonic() < until_s, f"not within {within_s:g} s: {what}{problem}"
        await asyncio.sleep(_LOOK_INTERVAL_S)


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of one block."""

    path: Path
    offset: int
    length: int


def find_block(folder: Path, key: bytes) -> Place:
    """The newest copy in the files of a disk tier. Raises AssertionError where there is none."""
    found: list[Place] = []
    for path in sorted(folder.glob("*/*.kv")):
        named = parse_segment_path(f"{path.parent.name}/{path.name}")
        assert named is not None, path
        data = memoryview(path.read_bytes())
        offset = 0
        while offset < len(data) and header_bytes_of(data[offset : offset + PAGE_BYTES]):
            header = read_header(
                data[offset:], sequence=named[1], offset=offset, identity=named[0], room_bytes=len(data) - offset
            )
            if header is None:
                # It was cut.
                break
            for index in np.flatnonzero([each == key for each in header.keys]):
                row = header.rows[index]
                found.append(Place(path, offset + int(row["start"]), int(row["length"])))
            offset += header.record_bytes
    assert found, f"{key.hex()} is in no file of {folder}"
    return found[-1]


class StoredCluster:
    """One prefill and one decode worker (or one mixed worker) and a store. Made by `opened`."""

    def __init__(self, cluster: ClusterProcess, oracle: Oracle, network: GrpcNetwork, http: httpx.AsyncClient) -> None:
        self.cluster = cluster
        self._oracle = oracle
        self._network = network
        self._http = http

    @classmethod
    @asynccontextmanager
    async def opened(cls, cluster: ClusterProcess, oracle: Oracle) -> AsyncGenerator[Self]:
        network = GrpcNetwork(token=cluster.state.cluster_token)
        try:
            async with httpx.AsyncClient(base_url=cluster.base_url, timeout=2 * BOUND_S) as http:
                yield cls(cluster, oracle, network, http)
        finally:
            await network.close()

    # --- who is there -------------------------------------------------------------------------------------

    def peer(self, role: str) -> Peer:
        worker = next(each for each in self.cluster.state.workers if each.role in (role, "mixed"))
        if role == "store":
            worker = next(each for each in self.cluster.state.workers if each.role == "store")
        if worker.address is None:
            raise WorkerUnavailable(f"{worker.worker_id} is {worker.state}")
        return Peer(worker_id=worker.worker_id, incarnation=worker.incarnation, address=worker.address)

    def pid(self, role: str) -> int:
        pid = next(each.pid for each in self.cluster.state.workers if each.role == role)
        assert pid is not None, role
        return pid

    # --- the store ----------------------------------------------------------------------------------------

    async def figures(self, tier: Tier) -> TierFigures:
        store = self.peer("store")
        ask = CacheStatRequest(target=store.incarnation)
        reply = await self._network.channel(store.address).call(CACHE_STAT, ask, timeout_s=CALL_TIMEOUT_S)
        return next(each for each in reply.tiers if each.tier == tier)

    async def keys(self, prompt: list[int]) -> list[bytes]:
        """Of its full blocks."""
        store = self.peer("store")
        ask = DescribeRequest(target=store.incarnation)
        identity = (await self._network.channel(store.address).call(DESCRIBE, ask, timeout_s=CALL_TIMEOUT_S)).identity
        return list(block_keys(root_key(identity, SALT), prompt, identity.layout.block_tokens))

    async def num_standing(self, prompt: list[int], tier: Tier) -> int:
        """How many leading blocks of it the store has in this tier."""
        store = self.peer("store")
        ask = CacheListRequest(target=store.incarnation, order="recent", limit=MOST_LISTED)
        reply = await self._network.channel(store.address).call(CACHE_LIST, ask, timeout_s=CALL_TIMEOUT_S)
        there = {block.key for block in reply.blocks if tier in block.tiers}
        return sum(1 for _ in itertools.takewhile(there.__contains__, await self.keys(prompt)))

    async def keep(self, prompt: list[int], tier: Tier = "ssd", most_blocks: int | None = None) -> None:
        """Has a prompt read and waits for its full blocks (the first `most_blocks`) to stand there. What is offered
        while the store is away, or not known yet, is dropped: the prompt is asked for again."""
        num_blocks, found = len((await self.keys(prompt))[:most_blocks]), 0

        async def holds() -> bool:
            nonlocal found
            await self.serve(prompt)
            for _ in range(8):
                found = await self.num_standing(prompt, tier)
                if found >= num_blocks:
                    return True
                await asyncio.sleep(_LOOK_INTERVAL_S)
            return False

        try:
            await until(holds, f"a prompt stands in {tier}")
        except AssertionError as error:
            raise AssertionError(f"{error}: {found} blocks of {num_blocks}") from None

    async def told(self, *words: str) -> str:
        """Waits until the disk tier says why it does not take anything, in these words (none: it takes everything)."""
        problem = ""

        async def holds() -> bool:
            nonlocal problem
            problem = (await self.figures("ssd")).problem
            return all(word in problem for word in words) if words else not problem

        try:
            await until(holds, f"the disk tier says {words}")
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {problem!r}") from None
        return problem

    async def clear(self, *tiers: Tier) -> None:
        """Blocks that somebody still holds a moment stay: so it is done until nothing is dropped any more."""
        roles = (["prefill", "decode"] if "device" in tiers else []) + (["store"] if set(tiers) - {"device"} else [])
        for role in roles:
            peer = self.peer(role)
            ask = CacheClearRequest(target=peer.incarnation, tiers=tiers)
            await self._network.channel(peer.address).call(CACHE_CLEAR, ask, timeout_s=CALL_TIMEOUT_S)

    async def audit_is_clean(self) -> None:
        """Waits for every process to be idle, with nothing but cached blocks in its books."""
        audits = {}

        async def holds() -> bool:
            nonlocal audits
            audits = await self.cluster.audit(CALL_TIMEOUT_S)
            return len(audits) == len(self.cluster.state.workers) and all(
                not audit.problems
                and audit.load.available_blocks == audit.total_blocks
                and not (audit.open_requests or audit.holder_leases or audit.reader_leases)
                for audit in audits.values()
            )

        try:
            await until(holds, "clean books")
        except AssertionError as error:
            raise AssertionError(f"{error}: {audits}") from None

    # --- requests -----------------------------------------------------------------------------------------

    async def serve(self, prompt: list[int], max_tokens: int = NUM_NEW) -> list[int]:
        """By the gateway; the answer is the reference's."""
        body = {
            "model": MODEL,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        response = await self._http.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        token_ids: list[int] = json.loads(response.text)["choices"][0]["token_ids"]
        self.check(prompt, token_ids, max_tokens)
        return token_ids

    @asynccontextmanager
    async def direct(self) -> AsyncGenerator[DirectClient]:
        async with DirectClient(self._network, name=f"direct-{time.monotonic_ns()}") as client:
            await client.open(*{self.peer(role).worker_id: self.peer(role) for role in ("prefill", "decode")}.values())
            yield client

    async def begin(self, client: DirectClient, prompt: list[int], num_blocks: int) -> DirectAnswer:
        """A request whose first blocks are to be fetched from the store."""
        plan = PrefixPlan(source=self.peer("store"), source_blocks=num_blocks)
        return await client.begin(
            prompt,
            max_tokens=NUM_NEW,
            prefill=self.peer("prefill"),
            decode=self.peer("decode"),
            prefix=plan,
            cache_salt=SALT,
        )

    async def end(self, answer: DirectAnswer) -> dict[str, int]:
        """Waits for it; the answer is the reference's. Prompt tokens that were not computed, by tier."""
        await asyncio.wait_for(answer.ended.wait(), 2 * BOUND_S)
        assert answer.error is None, answer.error
        self.check(list(answer.request.token_ids), answer.token_ids, NUM_NEW)
        return dict(answer.phases.cached_by_tier)

    async def fetch(self, prompt: list[int], num_blocks: int) -> dict[str, int]:
        """`begin` and `end`, where the workers' own pools hold nothing."""
        await self.clear("device")
        async with self.direct() as client:
            return await self.end(await self.begin(client, prompt, num_blocks))

    async def fetched(self, prompt: list[int], num_blocks: int, tier: Tier) -> int:
        """As `fetch`, again until some of it comes from that tier: workers leave a holder that failed alone for a
        while, and learn of a new one after a while. How many tokens came."""
        found: dict[str, int] = {}

        async def holds() -> bool:
            nonlocal found
            if tier == "ssd":
                await self.clear("dram")
            found = await self.fetch(prompt, num_blocks)
            return found.get(tier, 0) > 0

        await until(holds, f"blocks of a prompt come from {tier}")
        return found[tier]

    def check(self, prompt: list[int], token_ids: list[int], num_tokens: int) -> None:
        """Each token is the reference's choice after our own ones, ties excepted."""
        assert len(token_ids) == num_tokens
        logits = self._oracle.logits(prompt + token_ids)[len(prompt) - 1 : -1]
        best = [int(row.argmax()) for row in logits]
        oracle = self._oracle
        Oracle(oracle.model_dir, oracle.model, [prompt], [best], oracle.count).check([token_ids])
