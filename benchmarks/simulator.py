"""How fast the simulator is, and whether it tells the truth.

    python -m benchmarks.simulator [--quick] [--trace FILE] [--only PART ...]

- heap: the event heap with the real dispatch, admission and batching policies: an hour of a production chat service
  (the Mooncake conversation trace) on 16 prefill and 16 decode workers, and a million requests on 1,000 workers.
- loop: one virtual minute of a cluster of 2P2D, with the production shells, at 4 requests/s of 100 tokens.
- chaos: trials a minute, all cores.
- truth: the same workload on a real 1P1D cluster (88 M shape, one core each) and in the event heap with a profile that
  was fitted in this run: relative errors of mean TTFT and TPOT, and the difference of attainment in points.

`--quick` simulates a quarter of the hour, a fiftieth of the million requests and 60 trials; its figures are scaled up
to the whole. It leaves truth out, whose profile alone takes more than a minute: `--quick --only truth` has 15 s of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.models import random_88m
from benchmarks.report import finish, print_table
from benchmarks.truth import truth_figures
from contracts.requests import SamplingParams
from contracts.roofline import DEVICES, MODELS, Efficiencies, Roofline, kv_blocks_that_fit
from contracts.transfer_models import LinkTransfer
from engine.compose import StepBudget
from simulator import Program, run
from simulator.chaos.campaign import run_campaign
from simulator.clients import Ask, ask_for
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from workload import LogNormal, Poisson, read_trace, synthetic, window

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.messages import Role
    from simulator.heap.results import StudyResult
    from workload import WorkloadRequest

TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
PARTS = ("heap", "loop", "chaos", "truth")
QUICK_PARTS = ("heap", "loop", "chaos")

#: A prefill worker of four A100 reads some 4,500 tokens of a 70 B model a second: 16 of them are half busy with the
#: 40,000 tokens a second of the conversation hour.
MODEL, DEVICE, TENSOR_PARALLEL = "llama-3-70b", "a100-80g", 4
BLOCK_TOKENS = 16
EFFICIENCIES = Efficiencies(compute=0.5, memory=0.6, overhead_s=0.002)
LINK = LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=50e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    hour_share: float
    num_million: int
    loop_repeats: int
    num_trials: int
    truth_s: float


FULL = Effort(hour_share=1.0, num_million=1_000_000, loop_repeats=5, num_trials=400, truth_s=180.0)
QUICK = Effort(hour_share=0.25, num_million=20_000, loop_repeats=1, num_trials=60, truth_s=15.0)


# --- the event heap -------------------------------------------------------------------------------------


def study(num_prefill: int, num_decode: int) -> StudySpec:
    latency = Roofline(MODELS[MODEL], DEVICES[DEVICE], EFFICIENCIES, tensor_parallel=TENSOR_PARALLEL)
    num_blocks = kv_blocks_that_fit(
        MODELS[MODEL], DEVICES[DEVICE], block_tokens=BLOCK_TOKENS, tensor_parallel=TENSOR_PARALLEL
    )

    def group(name: str, role: Role, count: int) -> WorkerGroup:
        return WorkerGroup(
            name=name,
            role=role,
            count=count,
            latency=latency,
            num_blocks=num_blocks,
            num_devices=TENSOR_PARALLEL,
            budget=StepBudget(max_tokens=2048, max_sequences=256),
        )

    return StudySpec(
        groups=(group("prefill", "prefill", num_prefill), group("decode", "decode", num_decode)),
        transfer=LINK,
        kv_token_bytes=MODELS[MODEL].kv_token_bytes,
        block_tokens=BLOCK_TOKENS,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    what: str
    result: StudyResult
    took_s: float
    peak_gib: float

    def row(self) -> list[object]:
        result = self.result
        return [
            self.what,
            len(result.requests.arrival_s),
            result.duration_s,
            result.num_events,
            result.num_steps,
            self.took_s,
            result.num_events / self.took_s,
            self.peak_gib,
        ]


def timed(what: str, spec: StudySpec, requests: Iterable[WorkloadRequest]) -> Timed:
    started_s = time.perf_counter()
    result = simulate(spec, requests)
    took_s = time.perf_counter() - started_s
    # Of the whole process, which has run nothing larger before. Linux counts in KiB.
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return Timed(what=what, result=result, took_s=took_s, peak_gib=peak_gib)


def heap_figures(effort: Effort, trace: Path) -> dict[str, float]:
    rows: list[Timed] = []
    figures: dict[str, float] = {}
    if trace.exists():
        requests = window(read_trace(trace).requests, 0.0, effort.hour_share * 3600.0)
        rows.append(timed("conversation, 16P16D", study(16, 16), requests))
        figures["conversation_hour_s"] = rows[0].took_s / effort.hour_share
    else:
        print(f"no trace at {trace}: the conversation hour is left out")
    # Enough of them that the 400 prefill workers are about half busy.
    drawn = synthetic(
        arrivals=Poisson(600.0),
        prompts=LogNormal.from_mean(1500, sigma=1.0, max_tokens=16_000),
        outputs=LogNormal.from_mean(200, sigma=0.8, max_tokens=2_000),
        seed=1,
        num_requests=effort.num_million,
    )
    rows.append(timed("synthetic, 400P600D", study(400, 600), drawn))
    million = rows[-1]
    print_table(
        "event heap: the real dispatch, admission and batching policies",
        ["study", "requests", "virtual s", "events", "steps", "took s", "events/s", "peak GiB"],
        [row.row() for row in rows],
    )
    figures["heap_events_per_s"] = rows[0].result.num_events / rows[0].took_s
    figures["million_requests_s"] = million.took_s * 1_000_000 / effort.num_million
    figures["million_requests_gib"] = million.peak_gib
    return figures


# --- the virtual loop -----------------------------------------------------------------------------------


async def virtual_minute(program: Program) -> int:
    """60 s of 2P2D at 4 requests/s of 100 prompt and 100 answer tokens; how many were served."""
    rng = program.rng("workload")
    spec = ClusterSpec(roles={"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}, num_blocks=512)
    async with SimulatedCluster(program, spec) as cluster:

        async def ask_later(at_s: float, ask: Ask) -> None:
            await asyncio.sleep(at_s)
            answer = await ask_for(cluster.core, ask)
            if answer.finish != "length":
                raise RuntimeError(f"a request of the virtual minute failed: {answer.error!r}")

        served = 0
        async with asyncio.TaskGroup() as clients:
            at_s = rng.expovariate(4.0)
            while at_s < 60.0:
                ask = Ask(
                    at_s=at_s,
                    token_ids=tuple(rng.choices(range(1000), k=100)),
                    sampling=SamplingParams(temperature=0.0, max_tokens=100),
                )
                clients.create_task(ask_later(at_s, ask))
                served += 1
                at_s += rng.expovariate(4.0)
    return served


def loop_figures(effort: Effort) -> dict[str, float]:
    took: list[float] = []
    served = 0
    for seed in range(effort.loop_repeats):
        started_s = time.perf_counter()
        served = run(virtual_minute, seed=seed)
        took.append(time.perf_counter() - started_s)
    print_table(
        "virtual loop: 60 s of 2P2D with the production shells",
        ["requests", "best s", "worst s"],
        [[served, min(took), max(took)]],
    )
    return {"virtual_minute_s": min(took)}


# --- chaos ----------------------------------------------------------------------------------------------


def chaos_figures(effort: Effort) -> dict[str, float]:
    started_s = time.perf_counter()
    campaign = asyncio.run(run_campaign(1, effort.num_trials, num_processes=os.cpu_count() or 1))
    took_s = time.perf_counter() - started_s
    print_table(
        "chaos: whole clusters under drawn faults",
        ["trials", "failed", "requests", "virtual s", "took s", "trials a minute"],
        [
            [
                campaign.num_trials,
                campaign.num_failed,
                campaign.outcomes.total(),
                campaign.virtual_s,
                took_s,
                60 * campaign.num_trials / took_s,
            ]
        ],
    )
    return {"chaos_seeds_per_minute": 60 * campaign.num_trials / took_s, "chaos_failed": campaign.num_failed}


# --- all ------------------------------------------------------------------------------------------------


def measure(part: str, effort: Effort, trace: Path) -> dict[str, float]:
    match part:
        case "heap":
            return heap_figures(effort, trace)
        case "loop":
            return loop_figures(effort)
        case "chaos":
            return chaos_figures(effort)
        case _:
            cores = sorted(os.sched_getaffinity(0))[:2]
            with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
                model = random_88m(Path(scratch) / "88m")
                return truth_figures(model, cores, Path(scratch), effort.truth_s)


def in_a_process(part: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Each part has a fresh process: what one leaves in memory is no figure of the next."""
    command = [sys.executable, "-m", "benchmarks.simulator", "--part", part, "--trace", str(arguments.trace)]
    finished = subprocess.run(
        [*command, *(["--quick"] if arguments.quick else [])], stdout=subprocess.PIPE, text=True, check=True
    )
    *lines, last = finished.stdout.splitlines()
    print("\n".join(lines), flush=True)
    figures: dict[str, float] = json.loads(last)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 60 s; long parts are scaled down and said to be")
    parser.add_argument("--trace", type=Path, default=TRACE, help=f"the conversation trace (default {TRACE})")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts alone")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    effort = QUICK if arguments.quick else FULL
    if arguments.part is not None:
        print(json.dumps(measure(arguments.part, effort, arguments.trace)))
        return
    if arguments.quick:
        print(
            f"quick: {QUICK.hour_share:.0%} of the conversation hour and {QUICK.num_million:,} of 1,000,000 requests, "
            f"scaled up; {QUICK.num_trials} chaos trials; truth only where asked for (--only truth)"
        )
    figures: dict[str, float] = {}
    for part in arguments.only or (QUICK_PARTS if arguments.quick else PARTS):
        figures |= in_a_process(part, arguments)
    finish("simulator", figures)


if __name__ == "__main__":
    main()
