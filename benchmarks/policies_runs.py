"""One run of `benchmarks.policies`: a fleet, a policy and a load, and what came of it in a few numbers."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from contracts.latency_models import CostCurve, FittedLatency
from contracts.roofline import DEVICES, MODELS, Efficiencies, Roofline, kv_blocks_that_fit
from contracts.transfer_models import LinkTransfer
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from engine.compose import StepBudget
from prefill import PrefillLimits
from prefill.ordering import QueueRules
from simulator.heap.results import REFUSALS, Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies
from workload import Fixed, LogNormal, Poisson, SloClass, at_speed, read_trace, synthetic
from workload.transform import spread_ties

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
class Load:
    """A workload: a trace at a multiple of its own speed, or drawn. Times of the trace are rounded to 3 s; requests of
    one time are spread over those."""

    #: None: `speed` equal prompts a second, see `_narrow_writing`.
    trace: Path | None
    speed: float
    #: Only the requests of the trace's first part, or so many seconds.
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """One element each, in order of arrival."""

    rows: NDArray[np.int64]
    #: Names in `REFUSALS`.
    reasons: NDArray[np.str_]
    #: What the coordinator expected of the best place that it had; NaN: it had none.
    predicted_ttft_s: NDArray[np.float64]
    predicted_tpot_s: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that one run depends on."""

    load: Load
    policy: DispatchPolicyName = "ttft_min"
    form: AdmissionForm = "none"
    #: Of each prefill worker, and of a store that all share.
    prefix_cache_tokens: int = PREFIX_CACHE_TOKENS
    store_tokens: int = 0
    #: Admission rests on these.
    ttft_target_s: float = TTFT_TARGET_S
    tpot_target_s: float = TPOT_TARGETS_S[1]


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
    refusals: Refusals
    #: Loads of both pools over time (`TimeLine.prefill_load`), while requests arrived.
    prefill_load: NDArray[np.float32]
    decode_load: NDArray[np.float32]
    #: Of the event heap.
    num_events: int
    #: Of the processor, for the simulation alone.
    cpu_s: float
    num_rejected_for: dict[str, int]

    @property
    def events_per_s(self) -> float:
        return self.num_events / self.cpu_s


def study(job: Job) -> StudySpec:
    slo = SloClass("default", job.ttft_target_s * 1e3, job.tpot_target_s * 1e3)
    return StudySpec(
        groups=_narrow_writing() if job.load.trace is None else _nodes(job.prefix_cache_tokens),
        store_tokens=job.store_tokens,
        transfer=LINK,
        kv_token_bytes=MODELS[MODEL].kv_token_bytes,
        block_tokens=BLOCK_TOKENS,
        conductor=ConductorSettings(policy=job.policy, admission=AdmissionRule(form=job.form)),
        slos=(slo,),
        default_slo=slo.name,
        max_output_tokens=MAX_OUTPUT_TOKENS,
        request_timeout_s=3600.0,
    )


def _nodes(cache_tokens: int) -> tuple[WorkerGroup, ...]:
    """Eight nodes that read and eight that write, with queues in order of arrival as in the paper."""
    num_blocks = kv_blocks_that_fit(
        MODELS[MODEL], DEVICES[DEVICE], block_tokens=BLOCK_TOKENS, tensor_parallel=TENSOR_PARALLEL
    )
    latency = Roofline(MODELS[MODEL], DEVICES[DEVICE], EFFICIENCIES, tensor_parallel=TENSOR_PARALLEL)

    def group(role: Role, prefix_cache_tokens: int, budget: StepBudget) -> WorkerGroup:
        return WorkerGroup(
            name=role,
            role=role,
            count=8,
            latency=latency,
            num_blocks=num_blocks,
            num_devices=TENSOR_PARALLEL,
            prefix_cache_tokens=prefix_cache_tokens,
            budget=budget,
            prefill=PrefillLimits(queue=QueueRules(order="fcfs")),
        )

    return (
        group("prefill", cache_tokens, StepBudget(max_tokens=4096, max_sequences=256)),
        group("decode", 0, StepBudget(max_tokens=256, max_sequences=256)),
    )


def _narrow_writing() -> tuple[WorkerGroup, ...]:
    """Where decode is the bottleneck, and prompts take longer to be read than answers to be written: 120 readers that
    need 8 s for a prompt of 1,000 tokens, and a writer that keeps 60 ms a token with 40 answers, 6.7 a second."""
    reading = CostCurve.line(0.02, 0.00798)
    writing = CostCurve.line(0.02, 0.001)
    latency = FittedLatency(prefill=reading, pair_s=0.0, decode=writing, context_token_s=0.0)

    def group(role: Role, count: int, max_tokens: int) -> WorkerGroup:
        return WorkerGroup(
            name=role,
            role=role,
            count=count,
            latency=latency,
            num_blocks=20_000,
            budget=StepBudget(max_tokens=max_tokens, max_sequences=256),
        )

    return group("prefill", 120, 1000), group("decode", 1, 256)


@lru_cache(maxsize=1)
def _trace(path: Path) -> tuple[WorkloadRequest, ...]:
    return tuple(spread_ties(read_trace(path).requests))


def requests_of(load: Load) -> Iterable[WorkloadRequest]:
    if load.trace is None:
        num_requests = round(load.speed * (load.seconds or 600.0))
        return synthetic(
            arrivals=Poisson(load.speed),
            prompts=Fixed(1000),
            outputs=LogNormal.from_mean(100, sigma=0.1, max_tokens=200),
            seed=1,
            num_requests=num_requests,
        )
    requests = _trace(load.trace)
    if load.seconds is not None:
        requests = tuple(request for request in requests if request.arrival_s < load.seconds)
    return at_speed(requests, load.speed)


def run(job: Job) -> Ran:
    spec, requests = study(job), list(requests_of(job.load))
    began_s = time.process_time()
    result = simulate(spec, requests)
    cpu_s = time.process_time() - began_s
    rows = result.requests
    targets_s = dict.fromkeys((*TPOT_TARGETS_S, job.tpot_target_s))
    met = {target_s: _met(result, job.ttft_target_s, target_s) for target_s in targets_s}
    own = met[job.tpot_target_s]
    accepted = rows.outcome != Outcome.REJECTED
    latencies = request_latencies(result, spec.slos)
    ttft_s = latencies.ttft_s[np.isfinite(latencies.ttft_s)]
    read = np.isfinite(rows.started_s)
    read_tokens = int(rows.prompt_tokens[read].sum())
    line = result.time_line
    arriving = line.at_s <= rows.arrival_s[-1]
    reasons = np.array(REFUSALS)[rows.refusal[~accepted]]
    names, counts = np.unique(reasons, return_counts=True)
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
        refusals=Refusals(
            rows=np.flatnonzero(~accepted),
            reasons=reasons,
            predicted_ttft_s=rows.predicted_ttft_s[~accepted],
            predicted_tpot_s=rows.predicted_tpot_s[~accepted],
        ),
        prefill_load=line.prefill_load[arriving],
        decode_load=line.decode_load[arriving],
        num_events=result.num_events,
        cpu_s=cpu_s,
        num_rejected_for={str(name): int(count) for name, count in zip(names, counts, strict=True)},
    )


def _met(result: StudyResult, ttft_target_s: float, tpot_target_s: float) -> NDArray[np.bool_]:
    slo = SloClass("default", ttft_target_s * 1e3, tpot_target_s * 1e3)
    return request_latencies(result, (slo,)).met
