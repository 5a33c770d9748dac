"""Whether the simulators tell the truth: one workload on a real 1P1D cluster, on the event heap, on the virtual loop.

Their costs are a fit to this engine on this machine, made in this run. The client is a small open-loop one:
it sends each request at its time, whatever became of those before it.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import httpx

from benchmarks.cluster import running
from benchmarks.handoff import VOCAB_HIGH, VOCAB_LOW, Stream, cluster, complete, split
from benchmarks.report import print_table
from contracts.requests import SamplingParams
from gateway.core import Submission
from simulator import ModelTiming, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.heap.study import simulate
from simulator.study.flags import ClusterFlags, LatencyFlags
from simulator.study.setup import build_setup
from workload import LogNormal, Poisson, SloClass, synthetic

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from simulator import Program
    from simulator.heap.spec import StudySpec
    from workload import WorkloadRequest

#: Prompts of 300 tokens keep a core busy for half of the time.
RATE_RPS = 0.9
PROMPTS = LogNormal.from_mean(300, sigma=0.8, max_tokens=1500)
OUTPUTS = LogNormal.from_mean(40, sigma=0.6, max_tokens=200)
#: About twice what an undisturbed request of the mean length takes.
SLO = SloClass("interactive", ttft_ms=1200, tpot_ms=25)
PROFILE_LIMIT_S = 240.0
#: A machine that is busy for a moment gives points that no fit meets, and such a profile is refused.
PROFILE_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What one side saw of the workload."""

    ttft_s: float
    tpot_s: float
    attainment: float

    @classmethod
    def of(cls, ttfts_s: Sequence[float], tpots_s: Sequence[float]) -> Seen:
        met = [SLO.attained(ttft_s=ttft_s, tpot_s=tpot_s) for ttft_s, tpot_s in zip(ttfts_s, tpots_s, strict=True)]
        return cls(ttft_s=fmean(ttfts_s), tpot_s=fmean(tpots_s), attainment=fmean(met))

    def row(self, name: str) -> list[object]:
        return [name, 1e3 * self.ttft_s, 1e3 * self.tpot_s, 100 * self.attainment]


def profile(model: Path, folder: Path) -> Path:
    """Runs `tandem profile` with one thread, as each worker of the cluster has one."""
    path = folder / "profile.json"
    command = [sys.executable, "-m", "cluster", "profile", str(model), "--threads", "1", "--output", str(path)]
    for _ in range(PROFILE_ATTEMPTS):
        finished = subprocess.run(command, capture_output=True, text=True, timeout=PROFILE_LIMIT_S, check=False)
        print(finished.stdout[-3000:], finished.stderr[-1000:])
        if not finished.returncode:
            return path
    raise RuntimeError(f"tandem profile failed {PROFILE_ATTEMPTS} times")


def workload(seconds: float) -> list[WorkloadRequest]:
    drawn = synthetic(arrivals=Poisson(RATE_RPS), prompts=PROMPTS, outputs=OUTPUTS, seed=7, duration_s=seconds)
    # An answer of one token has no TPOT.
    return [request._replace(output_tokens=max(2, request.output_tokens)) for request in drawn]


async def real(model: Path, cores: Sequence[int], requests: Sequence[WorkloadRequest]) -> Seen:
    config = cluster(model, split([cores[0]], [cores[1]]))
    async with running(config) as base_url, httpx.AsyncClient(base_url=base_url, timeout=120) as client:
        rng = random.Random(1)
        # The first requests of a process also pay for what is made once.
        for _ in range(3):
            await complete(client, rng, 200, 8)
        start_s = time.perf_counter()

        async def ask(request: WorkloadRequest) -> Stream:
            await asyncio.sleep(start_s + request.arrival_s - time.perf_counter())
            return await complete(client, rng, request.prompt_tokens, request.output_tokens)

        streams = await asyncio.gather(*map(ask, requests))
    for request, stream in zip(requests, streams, strict=True):
        if len(stream.stamps_s) != request.output_tokens:
            raise RuntimeError(f"{len(stream.stamps_s)} tokens came, {request.output_tokens} were asked for")
    return Seen.of(
        [stream.ttft_s for stream in streams],
        [(stream.stamps_s[-1] - stream.stamps_s[0]) / (len(stream.stamps_s) - 1) for stream in streams],
    )


def on_the_heap(spec: StudySpec, requests: Sequence[WorkloadRequest]) -> Seen:
    rows = simulate(spec, requests).requests
    ttft_s = rows.first_token_s - rows.arrival_s
    tpot_s = (rows.finished_s - rows.first_token_s) / (rows.output_tokens - 1)
    return Seen.of(ttft_s.tolist(), tpot_s.tolist())


def on_the_loop(spec: StudySpec, requests: Sequence[WorkloadRequest]) -> Seen:
    """The production shells on virtual time, with the same costs."""
    group = spec.groups[0]
    cluster_spec = ClusterSpec(
        roles={"p0": "prefill", "d0": "decode"},
        num_blocks=group.num_blocks,
        block_tokens=spec.block_tokens,
        max_context_tokens=spec.max_context_tokens,
        max_batch_tokens=group.budget.max_tokens,
        max_sequences=group.budget.max_sequences,
        timing=ModelTiming(group.latency, around_step_s=spec.between_steps_s),
        latency_s=lambda message, rng: spec.message_s,
    )

    async def main(program: Program) -> Seen:
        rng = program.rng("prompts")
        loop = asyncio.get_running_loop()
        async with SimulatedCluster(program, cluster_spec) as cluster:
            start_s = loop.time()

            async def ask(request: WorkloadRequest) -> tuple[float, float]:
                arrival_s = start_s + request.arrival_s
                await asyncio.sleep(arrival_s + spec.gateway_s - loop.time())
                submission = Submission(
                    token_ids=tuple(rng.choices(range(VOCAB_LOW, VOCAB_HIGH), k=request.prompt_tokens)),
                    sampling=SamplingParams(temperature=0.0, max_tokens=request.output_tokens),
                    deadline_s=spec.request_timeout_s,
                )
                stamps_s: list[float] = []
                async with cluster.core.submit(submission) as stream:
                    async for _ in stream:
                        stamps_s.append(loop.time())
                return stamps_s[0] - arrival_s, (stamps_s[-1] - stamps_s[0]) / (request.output_tokens - 1)

            answers = await asyncio.gather(*map(ask, requests))
        ttfts_s, tpots_s = zip(*answers, strict=True)
        return Seen.of(ttfts_s, tpots_s)

    return run(main, seed=1)


def truth_figures(model: Path, cores: Sequence[int], folder: Path, seconds: float) -> dict[str, float]:
    """`cores`: one for each worker."""
    file = profile(model, folder)
    requests = workload(seconds)
    measured = asyncio.run(real(model, cores, requests))
    # As `tandem simulate --profile` takes it.
    spec = build_setup(ClusterFlags(workers="1P1D"), LatencyFlags(profile=file)).spec
    modelled = on_the_heap(spec, requests)
    print_table(
        f"truth: {len(requests)} requests in {seconds:g} s on 1P1D, one core each "
        f"(VOCAB {VOCAB_LOW}-{VOCAB_HIGH}, SLO {SLO.ttft_ms:g}/{SLO.tpot_ms:g} ms)",
        ["side", "TTFT mean ms", "TPOT mean ms", "attainment %"],
        [
            measured.row("real cluster"),
            modelled.row("event heap"),
            on_the_loop(spec, requests).row("virtual loop"),
        ],
    )
    return {
        "truth_ttft_error": modelled.ttft_s / measured.ttft_s - 1,
        "truth_tpot_error": modelled.tpot_s / measured.tpot_s - 1,
        "truth_attainment_points": 100 * (modelled.attainment - measured.attainment),
    }
