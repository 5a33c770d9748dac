"""One run of `benchmarks.policies`: a fleet, a policy and a load, and what came of it in a few numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from contracts.roofline import DEVICES, MODELS, Efficiencies, Roofline, kv_blocks_that_fit
from contracts.transfer_models import LinkTransfer
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.heap.results import Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies
from workload import Fixed, LogNormal, Poisson, SloClass, at_speed, read_trace, synthetic

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from contracts.config import AdmissionForm, DispatchPolicyName
    from contracts.messages import Role
    from simulator.heap.results import StudyResult
    from workload import WorkloadRequest

#: Mooncake's testbed (FAST'25, section 5.1): nodes of eight A800 that run a 70 B model tensor-parallel.
MODEL, DEVICE, TENSOR_PARALLEL = "llama-3-70b", "a800-80g", 8
#: Shares of the data sheet: DistServe's published fit of OPT-66B on eight A100 reaches 49 % of the operations while it
#: reads prompts; while it decodes it reads weights with 35 % and context with 64 % of the bandwidth.
EFFICIENCIES = Efficiencies(compute=0.5, memory=0.5, overhead_s=0.002)
#: What Mooncake's transfer engine reaches between nodes with four cards of 200 Gbit/s.
LINK = LinkTransfer(latency_s=1e-3, bandwidth_bytes_s=87e9)
#: Of each node's host memory: 3 M tokens of 320 KiB are 0.9 TiB of its DRAM. The paper calls a capacity of 3 M tokens a
#: node's as well.
PREFIX_CACHE_TOKENS = 3_000_000
BLOCK_TOKENS = 16
#: What clients allow; the longest answer of the trace has 2,000 tokens.
MAX_OUTPUT_TOKENS = 2048
TTFT_TARGET_S = 30.0
TPOT_TARGETS_S = (0.1, 0.2)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    num_prefill: int = 8
    num_decode: int = 8
    prefix_cache_tokens: int = PREFIX_CACHE_TOKENS
    #: What a step may hold: of the workers that read, and of those that write.
    prefill_batch_tokens: int = 4096
    decode_sequences: int = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A workload: a trace at a multiple of its own speed, or drawn."""

    #: None: `SYNTHETIC_*` at `speed` requests a second.
    trace: Path | None
    speed: float
    #: Only requests of the trace's first part, or so many seconds.
    seconds: float | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that one run depends on."""

    load: Load
    policy: DispatchPolicyName = "ttft_min"
    form: AdmissionForm = "none"
    #: Admission rests on it.
    tpot_target_s: float = TPOT_TARGETS_S[1]
    fleet: Fleet = field(default_factory=Fleet)
    forced: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What came of a job, small enough to be sent between processes."""

    job: Job
    num_requests: int
    num_accepted: int
    mean_ttft_s: float
    p90_ttft_s: float
    mean_tpot_s: float
    #: Share of all requests that met both targets, by TPOT target.
    attained: dict[float, float]
    #: Of the accepted: those that missed a target, by the job's.
    accepted_missing: float
    #: Of all prompt tokens that were read: found cached, and of these copied from another worker.
    cached_share: float
    fetched_share: float
    prefill_busy: float
    decode_busy: float
    #: Rows of the requests that were refused for their targets; and of `job.forced`, those that met both.
    refused: NDArray[np.int64]
    forced_met: int
    #: Loads of both pools over time (`TimeLine.prefill_load`), while requests arrived.
    prefill_load: NDArray[np.float32]
    decode_load: NDArray[np.float32]
    num_events: int
    num_rejected_for: dict[str, int]


def study(job: Job) -> StudySpec:
    fleet = job.fleet
    num_blocks = kv_blocks_that_fit(
        MODELS[MODEL], DEVICES[DEVICE], block_tokens=BLOCK_TOKENS, tensor_parallel=TENSOR_PARALLEL
    )
    latency = Roofline(MODELS[MODEL], DEVICES[DEVICE], EFFICIENCIES, tensor_parallel=TENSOR_PARALLEL)

    def group(name: str, role: Role, count: int, budget: StepBudget) -> WorkerGroup:
        return WorkerGroup(
            name=name,
            role=role,
            count=count,
            latency=latency,
            num_blocks=num_blocks,
            num_devices=TENSOR_PARALLEL,
            prefix_cache_tokens=fleet.prefix_cache_tokens if role == "prefill" else 0,
            budget=budget,
            prefill=PrefillLimits(queue=QueueRules(order="fcfs")),
        )

    reading = StepBudget(max_tokens=fleet.prefill_batch_tokens, max_sequences=256)
    writing = StepBudget(max_tokens=fleet.decode_sequences, max_sequences=fleet.decode_sequences)
    return StudySpec(
        groups=(
            group("prefill", "prefill", fleet.num_prefill, reading),
            group("decode", "decode", fleet.num_decode, writing),
        ),
        transfer=LINK,
        kv_token_bytes=MODELS[MODEL].kv_token_bytes,
        block_tokens=BLOCK_TOKENS,
        conductor=ConductorSettings(policy=job.policy, admission=AdmissionRule(form=job.form)),
        slos=(SloClass("default", TTFT_TARGET_S * 1e3, job.tpot_target_s * 1e3),),
        default_slo="default",
        max_output_tokens=MAX_OUTPUT_TOKENS,
        request_timeout_s=3600.0,
        forced=job.forced,
    )


@lru_cache(maxsize=1)
def _trace(path: Path) -> tuple[WorkloadRequest, ...]:
    return tuple(read_trace(path).requests)


def requests_of(load: Load) -> Iterable[WorkloadRequest]:
    if load.trace is None:
        num_requests = round(load.speed * (load.seconds or 600.0))
        return synthetic(
            arrivals=Poisson(load.speed),
            prompts=LogNormal.from_mean(8000, sigma=0.5, max_tokens=32_000),
            outputs=Fixed(400),
            seed=load.seed,
            num_requests=num_requests,
        )
    requests = _trace(load.trace)
    if load.seconds is not None:
        requests = tuple(request for request in requests if request.arrival_s < load.seconds)
    return at_speed(requests, load.speed)


def run(job: Job) -> Ran:
    result = simulate(study(job), requests_of(job.load))
    rows = result.requests
    met = {target_s: _met(result, target_s) for target_s in TPOT_TARGETS_S}
    own = met[job.tpot_target_s]
    accepted = rows.outcome != Outcome.REJECTED
    latencies = request_latencies(result, result.spec.slos)
    ttft_s = latencies.ttft_s[np.isfinite(latencies.ttft_s)]
    read = np.isfinite(rows.started_s)
    read_tokens = int(rows.prompt_tokens[read].sum())
    line = result.time_line
    arriving = line.at_s <= rows.arrival_s[-1]
    reasons = np.array(["too_long", "no_prefill", "no_decode", "full", "ttft", "tpot", "queue"])
    names, counts = np.unique(reasons[rows.refusal[~accepted]], return_counts=True)
    return Ran(
        job=job,
        num_requests=len(accepted),
        num_accepted=int(accepted.sum()),
        mean_ttft_s=float(ttft_s.mean()),
        p90_ttft_s=float(np.quantile(ttft_s, 0.9)),
        mean_tpot_s=float(np.nanmean(latencies.tpot_s)),
        attained={target_s: float(each.mean()) for target_s, each in met.items()},
        accepted_missing=float((accepted & ~own).sum() / max(1, accepted.sum())),
        cached_share=float(rows.cached_tokens[read].sum() / read_tokens),
        fetched_share=float(rows.fetched_tokens[read].sum() / read_tokens),
        prefill_busy=float(line.prefill_busy[arriving].mean()),
        decode_busy=float(line.decode_busy[arriving].mean()),
        refused=np.flatnonzero(~accepted),
        forced_met=int(own[sorted(job.forced)].sum()) if job.forced else 0,
        prefill_load=line.prefill_load[arriving],
        decode_load=line.decode_load[arriving],
        num_events=result.num_events,
        num_rejected_for={str(name): int(count) for name, count in zip(names, counts, strict=True)},
    )


def _met(result: StudyResult, tpot_target_s: float) -> NDArray[np.bool_]:
    slo = SloClass("default", TTFT_TARGET_S * 1e3, tpot_target_s * 1e3)
    return request_latencies(result, (slo,)).met


def forced_samples(ran: Ran, share: float, count: int, seed: int) -> list[Job]:
    """The same runs again, where independent thin samples of the refused are admitted."""
    rng = random.Random(seed)
    refused = ran.refused.tolist()
    size = min(len(refused), max(1, round(share * len(refused))))
    return [replace(ran.job, forced=frozenset(rng.sample(refused, size))) for _ in range(count if refused else 0)]
