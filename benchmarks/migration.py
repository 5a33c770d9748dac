"""What a client notices when its request moves between decode workers, and what the others notice.

    python -m benchmarks.migration [--quick]

A real 1P2D cluster of the 88 M shape (random weights, fp32), every worker a process. Prefix caches are off, so that
each move copies everything.

*Downtime*: one stream is written at a time and moves to and fro, by four ways in turns: live with its KV, live by its
tokens, stopped and copied, stopped and read again (what replaying a request costs). Of the gaps between tokens that
follow the order to move, the longest is the client's: its excess over the stream's ordinary gap, in ordinary gaps, is
how many decode steps it missed. The two ways that read everything again take seconds, in which a live one writes on:
they come last in each stream, so that the others see the context that the table names, give or take a tenth.

*Overhead*: four other streams are written at both workers, for windows with a move each half second of one more, and
windows without, in turns (ABBA). The ratio of their mean gaps, pair by pair of windows, with a bootstrapped interval.

`--quick` takes most of its time for what cannot be spared: a model, a cluster, one reading of the long prompt by the
prefill worker, and one by the destination of a move by tokens. It leaves out the slowest way at the long context.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np

from benchmarks.cluster import running_state
from benchmarks.models import VOCAB, random_88m
from benchmarks.report import finish, print_table
from contracts.errors import TandemError
from contracts.messages import AUDIT, MIGRATE, Empty, MigrateRequest, MoveMode, Peer
from rpc import GrpcNetwork

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cluster.state_file import ClusterState
    from contracts.messages import WorkerLoad
    from rpc import Network

WAYS: tuple[MoveMode, ...] = ("kv", "tokens", "stop_and_copy", "stop_and_read")
READING_WAYS: tuple[MoveMode, ...] = ("tokens", "stop_and_read")
NAMES = {
    "kv": "live, KV",
    "tokens": "live, tokens",
    "stop_and_copy": "stop and copy",
    "stop_and_read": "stop and recompute",
}
#: Tokens of a stream before it moves, and between two moves.
SETTLED_TOKENS = 16
CALL_TIMEOUT_S = 5.0
#: A move that is not over by then is an error: the machines give it as long.
MOVE_LIMIT_S = 60.0
#: Of the overhead: what moves, how often, and beside how many.
MOVED_CONTEXT, MOVE_INTERVAL_S, NUM_OTHERS, OTHERS_CONTEXT = 1024, 0.5, 4, 256
BOOTSTRAPS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    contexts: tuple[int, ...]
    moves_of_each: int
    #: Of these, with one stream; then its context has grown, and another one begins.
    moves_of_each_per_stream: int
    #: Contexts up to which it is also stopped and read again, which is waited for.
    longest_recomputed: int
    num_windows: int
    window_s: float


QUICK = Effort(
    contexts=(256, 4096),
    moves_of_each=3,
    moves_of_each_per_stream=3,
    longest_recomputed=256,
    num_windows=12,
    window_s=1.0,
)
FULL = Effort(
    contexts=(256, 1024, 4096),
    moves_of_each=20,
    moves_of_each_per_stream=5,
    longest_recomputed=4096,
    num_windows=32,
    window_s=2.0,
)


@dataclass(slots=True)
class Stream:
    """One streamed answer; when each of its tokens came."""

    task: asyncio.Task[None] | None = None
    times_s: list[float] = field(default_factory=list[float])
    came: asyncio.Event = field(default_factory=asyncio.Event)

    async def tokens(self, count: int) -> None:
        """Waits until so many have come. Raises what ended the stream before."""
        while len(self.times_s) < count:
            self.came.clear()
            if self.task is not None and self.task.done():
                self.task.result()
                raise RuntimeError(f"the stream ended after {len(self.times_s)} tokens")
            async with asyncio.timeout(60.0):
                await self.came.wait()

    def gaps_s(self, since: int = 0) -> list[float]:
        return np.diff(self.times_s[since:]).tolist()


class Cluster:
    def __init__(self, network: Network, client: httpx.AsyncClient, model: str, writers: list[Peer]) -> None:
        self._network = network
        self._client = client
        self._model = model
        self._rng = random.Random(7)
        self.writers = writers

    async def holder(self) -> int:
        """Which of the two decode workers has the one request that there is."""
        while True:
            counts = [(await self._load(peer)).running_decodes for peer in self.writers]
            if sum(counts) == 1:
                return counts.index(1)
            await asyncio.sleep(0.02)

    async def _load(self, peer: Peer) -> WorkerLoad:
        """Asked at once: heartbeats tell it every half second."""
        audit = await self._network.channel(peer.address).call(AUDIT, Empty(), timeout_s=CALL_TIMEOUT_S)
        return audit.load

    @asynccontextmanager
    async def stream(self, context: int, max_tokens: int) -> AsyncGenerator[Stream]:
        """Being written; cancelled at the end."""
        stream = Stream()
        prompt = [self._rng.randrange(3, VOCAB) for _ in range(context)]
        stream.task = asyncio.create_task(self._read(stream, prompt, max_tokens))
        try:
            yield stream
        finally:
            stream.task.cancel()
            await asyncio.wait([stream.task])

    async def _read(self, stream: Stream, prompt: list[int], max_tokens: int) -> None:
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
            "stream": True, "return_token_ids": True,
        }  # fmt: skip
        async with self._client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    # A chunk carries a step's one token.
                    stream.times_s.append(time.perf_counter())
                    stream.came.set()

    async def moved(self, to: int) -> None:
        """Returns when that worker owns the one request that there is."""
        while True:
            load = await self._load(self.writers[to])
            if load.running_decodes and not load.moving_in:
                return
            await asyncio.sleep(0.02)

    async def order(self, source: int, way: MoveMode) -> bool:
        """Whether the source began to move a request to the other worker."""
        here, there = self.writers[source], self.writers[1 - source]
        ask = MigrateRequest(target=here.incarnation, destination=there, mode=way, max_requests=1)
        try:
            reply = await self._network.channel(here.address).call(MIGRATE, ask, timeout_s=CALL_TIMEOUT_S)
        except TandemError:
            return False
        return bool(reply.started)


@asynccontextmanager
async def serving(folder: Path) -> AsyncGenerator[Cluster]:
    config: dict[str, Any] = {
        "model": str(random_88m(folder / "88m")),
        "served_model_name": "bench",
        "dtype": "float32",
        "pools": [
            {"name": "prefill", "role": "prefill", "workers": 1, "kv_memory": "512MiB"},
            {"name": "decode", "role": "decode", "workers": 2, "kv_memory": "768MiB"},
        ],
        "engine": {"prefix_cache": False},
        "store": {"dram": None},
        "gateway": {"port": 0},
    }
    async with running_state(config) as state:
        network = GrpcNetwork(token=state.cluster_token)
        try:
            async with httpx.AsyncClient(base_url=state.base_url, timeout=120.0) as client:
                yield Cluster(network, client, "bench", _writers(state))
        finally:
            await network.close()


def _writers(state: ClusterState) -> list[Peer]:
    return [
        Peer(worker_id=worker.worker_id, incarnation=worker.incarnation, address=worker.address)
        for worker in state.workers
        if worker.role == "decode" and worker.address is not None
    ]


# --- downtime -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Missed:
    """What a client noticed of one move."""

    gap_ms: float
    usual_ms: float

    @property
    def steps(self) -> float:
        return max(0.0, self.gap_ms / self.usual_ms - 1.0)


async def downtime(cluster: Cluster, context: int, effort: Effort) -> dict[MoveMode, list[Missed]]:
    """By way, in turns."""
    ways: list[MoveMode] = [way for way in WAYS if way != "stop_and_read" or context <= effort.longest_recomputed]
    found: dict[MoveMode, list[Missed]] = {way: [] for way in ways}
    copying: list[MoveMode] = [way for way in ways if way not in READING_WAYS]
    reading: list[MoveMode] = [way for way in ways if way in READING_WAYS]
    for _ in range(0, effort.moves_of_each, effort.moves_of_each_per_stream):
        # To and fro: each way as often from one worker as from the other.
        turns = [copying[:: (1, -1)[number % 2]] for number in range(effort.moves_of_each_per_stream)]
        order: list[MoveMode] = [*chain.from_iterable(turns), *reading]
        async with cluster.stream(context, 3000) as stream:
            await stream.tokens(SETTLED_TOKENS)
            holder = await cluster.holder()
            for way in order:
                found[way].append(await one_move(cluster, stream, holder, way))
                holder = 1 - holder
        _say(".")
    return found


async def one_move(cluster: Cluster, stream: Stream, holder: int, way: MoveMode) -> Missed:
    before = len(stream.times_s)
    usual_s = median(stream.gaps_s(max(0, before - SETTLED_TOKENS)))
    begun_s = time.perf_counter()
    if not await cluster.order(holder, way):
        raise RuntimeError(f"{NAMES[way]}: the worker did not begin to move it")
    await asyncio.wait_for(cluster.moved(1 - holder), MOVE_LIMIT_S)
    ended_s = time.perf_counter()
    # What was on its way when it was over has come by then.
    await stream.tokens(len(stream.times_s) + SETTLED_TOKENS)
    times_s = np.array(stream.times_s)
    gaps_s = np.diff(times_s)
    # The gap that was open when it began, up to the first that began after its end.
    during = (times_s[1:] > begun_s) & (times_s[:-1] < ended_s)
    return Missed(float(gaps_s[during].max()) * 1e3, usual_s * 1e3)


# --- overhead -------------------------------------------------------------------------------------


async def overhead(cluster: Cluster, effort: Effort) -> tuple[list[float], int]:
    """By pair of windows, how much longer the others' gaps are beside moves; how many moves there were."""
    ratios: list[float] = []
    num_moves = 0
    most_tokens = 7000
    async with (
        cluster.stream(OTHERS_CONTEXT, most_tokens) as first,
        cluster.stream(OTHERS_CONTEXT, most_tokens) as second,
        cluster.stream(OTHERS_CONTEXT, most_tokens) as third,
        cluster.stream(OTHERS_CONTEXT, most_tokens) as fourth,
    ):
        others = (first, second, third, fourth)
        for other in others:
            await other.tokens(SETTLED_TOKENS)
        async with cluster.stream(MOVED_CONTEXT, most_tokens) as moving:
            await moving.tokens(SETTLED_TOKENS)
            for pair in range(effort.num_windows // 2):
                means_s: dict[bool, float] = {}
                for with_moves in (True, False) if pair % 2 else (False, True):
                    starts = [len(other.times_s) for other in others]
                    if with_moves:
                        num_moves += await _keep_moving(cluster, effort.window_s)
                    else:
                        await asyncio.sleep(effort.window_s)
                    gaps_s = [gap for other, at in zip(others, starts, strict=True) for gap in other.gaps_s(at)]
                    means_s[with_moves] = float(np.mean(gaps_s))
                ratios.append(means_s[True] / means_s[False] - 1.0)
                _say(".")
    return ratios, num_moves


async def _keep_moving(cluster: Cluster, for_s: float) -> int:
    """Moves any one request to and fro, with its KV."""
    ends_s, num_moves, source = time.perf_counter() + for_s, 0, 0
    while (left_s := ends_s - time.perf_counter()) > 0:
        began_s = time.perf_counter()
        num_moves += await cluster.order(source, "kv")
        source = 1 - source
        await asyncio.sleep(min(left_s, max(0.0, MOVE_INTERVAL_S - (time.perf_counter() - began_s))))
    return num_moves


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 %, of the mean, by bootstrap over pairs."""
    rng = np.random.default_rng(1)
    means = rng.choice(np.array(ratios), (BOOTSTRAPS, len(ratios))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# --- the whole ------------------------------------------------------------------------------------


async def measure(effort: Effort) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="tandem-bench-model-") as scratch:
        async with serving(Path(scratch)) as cluster:
            missed = {context: await downtime(cluster, context, effort) for context in effort.contexts}
            ratios, num_moves = await overhead(cluster, effort)
    print()
    rows = [
        (
            NAMES[way], context, len(found), median(one.usual_ms for one in found), median(one.gap_ms for one in found),
            median(one.steps for one in found), float(np.percentile([one.steps for one in found], 90)),
        )
        for context, ways in missed.items()
        for way, found in ways.items()
    ]  # fmt: skip
    print_table(
        "what a client notices of its request's move",
        ("way", "context", "moves", "usual gap ms", "its gap ms", "missed steps p50", "p90"),
        rows,
    )
    low, high = interval(ratios)
    mean = float(np.mean(ratios))
    print(
        f"\n{NUM_OTHERS} other streams, {num_moves} moves in {len(ratios)} windows of {effort.window_s:g} s: gaps "
        f"{mean:+.2%} (95 %: {low:+.2%} to {high:+.2%}) against the windows beside them"
    )
    short, long = min(missed), max(missed)
    live = {context: missed[context]["kv"] for context in (short, long)}
    extra_ms = {context: median(one.gap_ms - one.usual_ms for one in found) for context, found in live.items()}
    figures = {
        "downtime_steps_p50": median(one.steps for found in live.values() for one in found),
        f"downtime_{long}_over_{short}": extra_ms[long] / extra_ms[short],
        "downtime_ms_p50": median(one.gap_ms - one.usual_ms for found in live.values() for one in found),
        "overhead_on_others": mean,
        "overhead_low": low,
        "overhead_high": high,
    }
    for way in WAYS[1:]:
        for context, ways in missed.items():
            if way in ways and context in (short, long):
                figures[f"{way}_steps_{context}"] = median(one.steps for one in ways[way])
    return figures


def _say(what: str) -> None:
    print(what, end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three moves of each kind with KV instead of twenty")
    arguments = parser.parse_args()
    finish("migration", asyncio.run(measure(QUICK if arguments.quick else FULL)))


if __name__ == "__main__":
    main()
