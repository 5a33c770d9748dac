"""What disaggregation costs and buys on this machine: 1P1D against one mixed worker on the same cores.

    python -m benchmarks.handoff [--model DIR] [--quick]

Three questions, each with both sides in this run (real clusters, driven over HTTP):

- Time to first token of one prompt on an idle cluster: the prefill worker has the cores the mixed worker had.
- The second token: how many decode steps after the first it comes (a handoff lies between them).
- Inter-token latency of running streams while 1,000-token prompts keep arriving: 1P1D, one core each, against
  one chunked mixed worker on both cores (chunks of 512 and of 128).

Without `--model`, random weights of an 88 M parameter Llama shape, made once in a temporary folder.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks.cluster import running
from benchmarks.models import random_88m
from benchmarks.report import finish, quantile_ms

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCAB_LOW, VOCAB_HIGH = 10, 8000
PROMPT_TOKENS = 512
LONG_PROMPT_TOKENS = 1000
STREAMS = 4


@dataclass(slots=True)
class Stream:
    """One request as the client saw it, on the client's clock."""

    sent_s: float
    stamps_s: list[float] = field(default_factory=list[float])

    @property
    def ttft_s(self) -> float:
        return self.stamps_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        return [after - before for before, after in zip(self.stamps_s, self.stamps_s[1:], strict=False)]


@dataclass(slots=True, kw_only=True)
class Load:
    """What the running streams and the arriving prompts saw of one cluster."""

    name: str
    gaps_s: list[float]
    ttfts_s: list[float]
    seconds: float

    def row(self) -> list[str]:
        return [
            self.name,
            quantile_ms(self.gaps_s, 0.5),
            quantile_ms(self.gaps_s, 0.99),
            quantile_ms(self.gaps_s, 1.0),
            quantile_ms(self.ttfts_s, 0.5),
            f"{len(self.gaps_s) / self.seconds:.1f}",
        ]


async def complete(client: httpx.AsyncClient, rng: random.Random, prompt_tokens: int, output_tokens: int) -> Stream:
    """Streams one greedy completion of random tokens and notes when each token came."""
    body: dict[str, Any] = {
        "model": "bench",
        "prompt": [rng.randrange(VOCAB_LOW, VOCAB_HIGH) for _ in range(prompt_tokens)],
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    stream = Stream(time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"HTTP {response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith('data: {"error"'):
                raise RuntimeError(line)
            if line.startswith("data: {"):
                # The gateway sends one line for each token, also where its text is held back.
                stream.stamps_s.append(time.perf_counter())
    return stream


async def idle_latency(base_url: str, repeats: int, rng: random.Random) -> list[Stream]:
    async with httpx.AsyncClient(base_url=base_url, timeout=120) as client:
        await complete(client, rng, PROMPT_TOKENS, 8)
        return [await complete(client, rng, PROMPT_TOKENS, 16) for _ in range(repeats)]


async def under_load(name: str, base_url: str, seconds: float, every_s: float, seed: int) -> Load:
    """Keeps `STREAMS` short-prompt streams running while a long prompt arrives every `every_s`."""
    rng = random.Random(seed)
    gaps_s: list[float] = []
    async with httpx.AsyncClient(base_url=base_url, timeout=300) as client:
        await complete(client, rng, 64, 4)
        start_s = time.perf_counter()
        stop_s = start_s + seconds

        async def write() -> None:
            while time.perf_counter() < stop_s:
                gaps_s.extend((await complete(client, rng, 64, 64)).gaps_s)

        async def arrive() -> list[float]:
            prompts: list[asyncio.Task[Stream]] = []
            async with asyncio.TaskGroup() as tasks:
                while time.perf_counter() < stop_s:
                    prompts.append(tasks.create_task(complete(client, rng, LONG_PROMPT_TOKENS, 2)))
                    await asyncio.sleep(every_s)
            return [prompt.result().ttft_s for prompt in prompts]

        async with asyncio.TaskGroup() as tasks:
            writers = [tasks.create_task(write()) for _ in range(STREAMS)]
            arrivals = tasks.create_task(arrive())
        assert all(writer.done() for writer in writers)
        return Load(name=name, gaps_s=gaps_s, ttfts_s=arrivals.result(), seconds=time.perf_counter() - start_s)


def cluster(model: Path, pools: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "model": str(model),
        "served_model_name": "bench",
        "max_model_len": 4096,
        "gateway": {"host": "127.0.0.1", "port": 0},
        "pools": list(pools),
    }


def mixed(chunk_tokens: int, cores: list[int]) -> dict[str, Any]:
    return {
        "name": "mixed",
        "role": "mixed",
        "workers": 1,
        "cores": cores,
        "threads": len(cores),
        "kv_memory": "1GiB",
        "max_batch_tokens": chunk_tokens,
    }


def split(prefill_cores: list[int], decode_cores: list[int]) -> list[dict[str, Any]]:
    prefill = mixed(512, prefill_cores) | {"name": "prefill", "role": "prefill"}
    decode = mixed(512, decode_cores) | {"name": "decode", "role": "decode"}
    return [prefill, decode]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    #: Rounds over both sides on the idle cluster, and requests of each side in a round.
    rounds: int
    repeats: int
    seconds: float
    every_s: float


async def idle_figures(model: Path, cores: list[int], effort: Effort) -> dict[str, float]:
    """TTFT of P/D over mixed, and when the second token comes. The sides take turns, so that a slow drift of the
    machine meets both."""
    ttfts_s: dict[str, list[float]] = {"mixed": [], "pd": []}
    second_steps: list[float] = []
    pools = {"mixed": [mixed(512, cores)], "pd": split(cores, cores)}
    for round_number in range(effort.rounds):
        for side, members in pools.items():
            async with running(cluster(model, members)) as base_url:
                streams = await idle_latency(base_url, effort.repeats, random.Random(round_number))
            ttfts_s[side] += [stream.ttft_s for stream in streams]
            if side == "pd":
                second_steps += [stream.gaps_s[0] / statistics.median(stream.gaps_s[1:]) for stream in streams]
    for side, values in ttfts_s.items():
        print(f"  TTFT {side:5s} p50 {statistics.median(values) * 1e3:7.1f} ms  (n={len(values)})")
    print(f"  second token {statistics.median(second_steps):.2f} decode steps after the first")
    return {
        "ttft_pd_over_mixed": statistics.median(ttfts_s["pd"]) / statistics.median(ttfts_s["mixed"]),
        "second_token_steps": statistics.median(second_steps),
    }


async def load_figures(model: Path, cores: list[int], effort: Effort) -> dict[str, float]:
    half = len(cores) // 2
    pools = {
        "mixed, chunk 512": [mixed(512, cores)],
        "mixed, chunk 128": [mixed(128, cores)],
        "1P1D": split(cores[:half], cores[half:]),
    }
    loads: dict[str, Load] = {}
    for name, members in pools.items():
        async with running(cluster(model, members)) as base_url:
            loads[name] = await under_load(name, base_url, effort.seconds, effort.every_s, seed=1)
    headings = ["cluster", "ITL p50", "p99", "max ms", "TTFT p50 ms", "tokens/s"]
    print("  " + " | ".join(f"{heading:>16s}" for heading in headings))
    for load in loads.values():
        print("  " + " | ".join(f"{cell:>16s}" for cell in load.row()))
    p99 = {name: float(quantile_ms(load.gaps_s, 0.99)) for name, load in loads.items()}
    return {"itl_p99_mixed_over_pd": p99["mixed, chunk 512"] / p99["1P1D"]}


async def measure(model: Path, effort: Effort) -> dict[str, float]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("this comparison needs two cores: one for each pool")
    cores = cores[:2]
    print(f"idle cluster, {PROMPT_TOKENS} prompt tokens, cores {cores} for either side:")
    figures = await idle_figures(model, cores, effort)
    print(f"\n{STREAMS} streams, a {LONG_PROMPT_TOKENS}-token prompt every {effort.every_s:g} s:")
    return figures | await load_figures(model, cores, effort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: random weights, 88 M")
    parser.add_argument("--quick", action="store_true", help="within 60 s; figures are rougher")
    arguments = parser.parse_args()
    effort = (
        Effort(rounds=1, repeats=4, seconds=7, every_s=3)
        if arguments.quick
        else Effort(rounds=3, repeats=8, seconds=45, every_s=3)
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        model = arguments.model or random_88m(Path(scratch) / "88m")
        figures = asyncio.run(measure(model, effort))
    finish("handoff", figures)


if __name__ == "__main__":
    main()
