"""Part `ttft` of `benchmarks.kvstore`: a prompt of 2,000 tokens whose first 1,800 the store has, or nobody has.

A real 1P1D cluster of the 88 M shape over HTTP, one core a worker, a store with memory and a disk. The same client
streams completions of four kinds in turn: nothing known (all is computed), prefix in the store's memory, on the store's
disk, and in the prefill worker's own pool. What is to be forgotten is cleared between two requests; of each request the
gateway's metrics say which tier its tokens came from, and one that came from another does not count (but is told).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx
import uvloop

from benchmarks.cluster import running_state
from benchmarks.kvstore_blocks import BLOCK_TOKENS, PREFIX_BLOCKS, PREFIX_TOKENS
from benchmarks.models import random_88m
from benchmarks.report import print_table, spread
from contracts.messages import MEMBERS, Empty
from contracts.store_messages import CACHE_CLEAR, CACHE_STAT, CacheClearRequest, CacheStatRequest
from rpc import GrpcNetwork

if TYPE_CHECKING:
    from cluster.state_file import ClusterState
    from contracts.messages import WorkerInfo
    from contracts.store_messages import Tier

VOCAB_LOW, VOCAB_HIGH = 10, 8000
PROMPT_TOKENS = 2000
#: Prefixes that take turns, and rounds over all kinds.
FULL = (4, 12)
QUICK = (1, 1)
#: Steps before anything counts: by then the cluster knows what computing and fetching cost.
WARM_UP_STEPS = 40
WARM_UP_TOKENS = 96
#: Each kind, what is cleared before it at the workers and at the store, and the tier that its prefix comes from.
KINDS: dict[str, tuple[tuple[Tier, ...], str | None]] = {
    "recompute": ((), None),
    "dram": (("device",), "dram"),
    "ssd": (("device", "dram"), "ssd"),
    "device": ((), "device"),
}
#: News of what was cleared reach the coordinator every 0.1 s.
NEWS_S = 0.5
SETTLE_LIMIT_S = 30.0
METRIC = "tandem_prefix_tokens_total"


def cluster(model: Path, folder: Path, cores: list[int]) -> dict[str, Any]:
    def pool(role: str, core: int) -> dict[str, Any]:
        return {
            "name": role,
            "role": role,
            "workers": 1,
            "cores": [core],
            "threads": 1,
            "kv_memory": "512MiB",
            "max_batch_tokens": 512,
        }

    return {
        "model": str(model),
        "served_model_name": "bench",
        "max_model_len": 4096,
        "gateway": {"host": "127.0.0.1", "port": 0},
        "store": {"dram": "1GiB", "ssd": {"path": str(folder / "kv"), "size": "4GiB"}},
        "pools": [pool("prefill", cores[0]), pool("decode", cores[1])],
    }


class Client:
    """Asks for completions, and looks into and clears caches beside that."""

    def __init__(self, state: ClusterState, http: httpx.AsyncClient, network: GrpcNetwork) -> None:
        self._state = state
        self._http = http
        self._network = network
        self._rng = random.Random(17)

    def tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(VOCAB_LOW, VOCAB_HIGH) for _ in range(count)]

    async def ttft_s(self, prompt: list[int]) -> tuple[float, int]:
        """And how many of the prompt's tokens were not computed."""
        body: dict[str, Any] = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": 2,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        cached = 0
        first_s: float | None = None
        sent_s = time.perf_counter()
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
            async for line in response.aiter_lines():
                if line.startswith('data: {"error"'):
                    raise RuntimeError(line)
                if not line.startswith("data: {"):
                    continue
                document: dict[str, Any] = json.loads(line.removeprefix("data: "))
                if document["choices"] and first_s is None:
                    first_s = time.perf_counter()
                if document.get("usage"):
                    cached = document["usage"]["prompt_tokens_details"]["cached_tokens"]
        if first_s is None:
            raise RuntimeError("an answer without a token")
        return first_s - sent_s, cached

    async def by_tier(self) -> dict[str, float]:
        """Prompt tokens that were not computed, by where they came from, since the gateway's start."""
        text = (await self._http.get("/metrics")).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith(METRIC + "{"):
                labels, value = line.removeprefix(METRIC).split()
                tier = labels.partition('tier="')[2].partition('"')[0]
                if tier != "computed":
                    found[tier] = float(value)
        return found

    async def _members(self) -> list[WorkerInfo]:
        reply = await self._network.channel(self._state.coordinator_address).call(MEMBERS, Empty(), timeout_s=5.0)
        return [member.info for member in reply.members]

    async def clear(self, tiers: tuple[Tier, ...]) -> None:
        for info in await self._members():
            ask = CacheClearRequest(target=info.incarnation, tiers=tiers)
            await self._network.channel(info.address).call(CACHE_CLEAR, ask, timeout_s=5.0)

    async def stored(self) -> dict[Tier, int]:
        """Blocks in each of the store's tiers."""
        for info in await self._members():
            if info.role == "store":
                ask = CacheStatRequest(target=info.incarnation)
                reply = await self._network.channel(info.address).call(CACHE_STAT, ask, timeout_s=5.0)
                return {figures.tier: figures.num_blocks for figures in reply.tiers}
        raise RuntimeError("the cluster has no store")

    async def settle(self, least: int = 0) -> None:
        """Until the store has at least so many blocks in each tier more than were there, and takes no more."""
        async with asyncio.timeout(SETTLE_LIMIT_S):
            before, quiet = await self.stored(), 0
            while quiet < 4 or min(before.values()) < least:
                await asyncio.sleep(0.1)
                now = await self.stored()
                quiet = quiet + 1 if now == before else 0
                before = now


async def _measure(
    model: Path, folder: Path, num_prefixes: int, rounds: int
) -> tuple[dict[str, list[float]], list[str]]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this comparison needs two cores: one for each worker")
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    strays: list[str] = []
    async with (
        running_state(cluster(model, folder, cores)) as state,
        httpx.AsyncClient(base_url=state.base_url, timeout=300) as http,
    ):
        network = GrpcNetwork(token=state.cluster_token)
        try:
            client = Client(state, http, network)
            prefixes = await _warm_up(client, num_prefixes)
            for turn in range(rounds):
                kinds = list(KINDS)
                first = turn % len(kinds)
                for kind in [*kinds[first:], *kinds[:first]]:
                    took_s, stray = await _ask(client, kind, prefixes[turn % num_prefixes])
                    if stray:
                        strays.append(stray)
                    else:
                        found[kind].append(took_s)
        finally:
            await network.close()
    return found, strays


async def _warm_up(client: Client, num_prefixes: int) -> list[list[int]]:
    """The prefixes that the store has from now on, in memory and on disk."""
    for _ in range(WARM_UP_STEPS):
        await client.ttft_s(client.tokens(WARM_UP_TOKENS))
    prefixes = [client.tokens(PREFIX_TOKENS) for _ in range(num_prefixes)]
    for prefix in prefixes:
        await client.ttft_s([*prefix, *client.tokens(BLOCK_TOKENS)])
    await client.settle(num_prefixes * PREFIX_BLOCKS)
    # One fetch from each tier, so that what they cost is known.
    for kind in ("dram", "ssd"):
        await _ask(client, kind, prefixes[0])
    return prefixes


async def _ask(client: Client, kind: str, prefix: list[int]) -> tuple[float, str]:
    """Seconds, and what was wrong with where its tokens came from."""
    tiers, tier = KINDS[kind]
    head = client.tokens(PREFIX_TOKENS) if tier is None else prefix
    await client.settle()
    if tier in ("device", "dram"):
        # So that it is there, whatever was cleared for the one before.
        await client.ttft_s([*head, *client.tokens(PROMPT_TOKENS - PREFIX_TOKENS)])
        await client.settle()
    if tiers:
        await client.clear(tiers)
        await asyncio.sleep(NEWS_S)
    before = await client.by_tier()
    took_s, cached = await client.ttft_s([*head, *client.tokens(PROMPT_TOKENS - PREFIX_TOKENS)])
    after = await client.by_tier()
    came = {
        name: round(count - before.get(name, 0.0)) for name, count in after.items() if count > before.get(name, 0.0)
    }
    wanted = {} if tier is None else {tier: PREFIX_BLOCKS * BLOCK_TOKENS}
    if came != wanted or cached != sum(wanted.values()):
        return took_s, f"{kind}: {came} tokens came, {wanted} were meant ({1e3 * took_s:.0f} ms)"
    return took_s, ""


def measure_ttft(folder: Path, *, quick: bool) -> dict[str, float]:
    """In a fresh folder below `folder`, which is on the disk that is meant."""
    with tempfile.TemporaryDirectory(prefix="kvstore-", dir=folder) as scratch:
        model = random_88m(Path(scratch) / "88m")
        found, strays = uvloop.run(_measure(model, Path(scratch), *(QUICK if quick else FULL)))
    names = {
        "recompute": "nothing: recomputed",
        "dram": "in the store's memory",
        "ssd": "on the store's disk",
        "device": "in the prefill worker's pool",
    }
    for stray in strays:
        print(f"not counted: {stray}")
    if missing := [kind for kind, values in found.items() if not values]:
        raise RuntimeError(f"no request was a {' or '.join(missing)} hit")
    all_s = median(found["recompute"])
    print_table(
        f"TTFT of {PROMPT_TOKENS} tokens, {PREFIX_BLOCKS * BLOCK_TOKENS} of them known",
        ["where", "ms", "of recompute", "requests"],
        [
            [names[kind], spread([1e3 * value for value in values]), median(values) / all_s, len(values)]
            for kind, values in found.items()
        ],
    )
    return {f"ttft_{kind}_over_recompute": median(found[kind]) / all_s for kind in ("dram", "ssd", "device")}
