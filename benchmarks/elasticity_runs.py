"""One run of `benchmarks.elasticity`: a fleet, how it is run and a load, and what came of it in a few numbers.

The fleet is that of Llumnix (OSDI'24, section 6.1): LLaMA-7B on A10s with 13,616 tokens of KV each and 64 Gbit/s
between machines. Lengths are power laws up to 6 k tokens with the means and medians of its table 1; its other quantiles
come out within a fifth. Arrivals have Gamma-distributed gaps.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from contracts.roofline import DeviceSpec, Efficiencies, ModelShape, Roofline
from contracts.transfer_models import LinkTransfer
from coordinator.policy.lending import LendRules
from coordinator.policy.move_terms import MoveRules
from coordinator.policy.scaling import ScaleRules
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from coordinator.policy.virtual_usage import HIGH_PRIORITY, UsageRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from engine.compose import StepBudget
from simulator.heap.results import Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies
from workload import Diurnal, Fixed, Gamma, PowerLaw, SloClass, WorkloadRequest, synthetic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from contracts.config import DispatchPolicyName
    from contracts.control_messages import Operation
    from contracts.messages import Role

MODEL = ModelShape(
    num_layers=32,
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    ffn_size=11_008,
    ffn_matrices=3,
    vocab_size=32_000,
)
#: NVIDIA's data sheet: 125 TFLOP/s without sparsity, 600 GB/s, 24 GB. No link but the network.
DEVICE = DeviceSpec(peak_flop_s=125e12, memory_bandwidth_bytes_s=600e9, memory_bytes=24_000_000_000, link_bytes_s=8e9)
EFFICIENCIES = Efficiencies(compute=0.6, memory=0.6, overhead_s=0.005)
BLOCK_TOKENS = 16
#: The paper's 13,616 tokens.
NUM_BLOCKS = 851
LINK = LinkTransfer(latency_s=1e-3, bandwidth_bytes_s=8e9)
MAX_TOKENS = 6144
#: Means and medians of Llumnix' generated lengths.
LENGTHS = {
    "s": PowerLaw.from_mean_median(128, 38, MAX_TOKENS),
    "m": PowerLaw.from_mean_median(256, 32, MAX_TOKENS),
    "l": PowerLaw.from_mean_median(512, 55, MAX_TOKENS),
}
#: What requests should meet; nobody is refused for it.
SLO = SloClass("default", 5000.0, 100.0)
#: Share of requests that are urgent, where some are; as in the paper.
HIGH_SHARE = 0.1
#: From one heartbeat to the next, and from one look for moves to the next. With half a second moves come too late.
LOOK_INTERVAL_S = 0.2
START_S = 30.0
#: Tokens that each answer should be able to grow by: with less the pool grows, with more it may shrink. With the
#: paper's 10 and 60 the last worker is full whenever one of the long answers comes.
FREENESS = (300.0, 600.0)
FLIP_S = 2.0

Priorities = Literal["none", "order", "headroom"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Requests of one size."""

    rate_rps: float
    prompt_tokens: int
    output_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    #: Two letters of `LENGTHS`: prompts, answers.
    mix: str = "mm"
    rate_rps: float = 0.0
    cv: float = 2.0
    num_requests: int = 0
    seed: int = 1
    #: With it the rate goes up and down by that part of itself, once in `period_s`; arrivals are Poisson then.
    amplitude: float = 0.0
    period_s: float = 0.0
    #: Instead of all that: one after the other.
    phases: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that one run depends on."""

    load: Load
    policy: DispatchPolicyName = "ttft_min"
    moves: bool = False
    priorities: Priorities = "none"
    num_workers: int = 16
    #: Prefill workers; None: all are mixed.
    num_prefill: int | None = None
    #: Mixed: as many run as the load needs. Else: workers are lent between the roles.
    autoscale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What came of a job, small enough to be sent between processes."""

    job: Job
    #: Of all requests, in order of arrival; infinite where it did not finish.
    ttft_s: NDArray[np.float32]
    tpot_s: NDArray[np.float32]
    e2e_s: NDArray[np.float32]
    arrival_s: NDArray[np.float32]
    is_met: NDArray[np.bool_]
    is_high: NDArray[np.bool_]
    num_preemptions: int
    #: Answers, prompts and preempted answers that changed workers; and for how long answers stood still.
    moved: tuple[int, int, int]
    pause_p50_s: float
    pause_p99_s: float
    moved_gib: float
    blocks_used: float
    worker_s: float
    duration_s: float
    operations: tuple[tuple[float, Operation], ...]
    #: Per second, while requests came: loads of both roles as `TimeLine` has them.
    prefill_load: NDArray[np.float32]
    decode_load: NDArray[np.float32]
    cpu_s: float

    @property
    def served(self) -> float:
        """Requests that ended in the second half of the time in which requests came, over those that came in it."""
        last_s = float(self.arrival_s[-1])
        ended_s = self.arrival_s + self.e2e_s
        ended = (ended_s > 0.5 * last_s) & (ended_s <= last_s)
        return float(ended.sum() / (self.arrival_s > 0.5 * last_s).sum())

    @property
    def attained(self) -> float:
        return float(self.is_met.mean())


def study(job: Job) -> StudySpec:
    usage = UsageRules() if job.priorities == "headroom" else UsageRules(headroom_tokens={})
    conductor = ConductorSettings(
        policy=job.policy,
        headroom_tokens=dict(usage.headroom_tokens),
        admission=AdmissionRule(form="none"),
        queue_order="fcfs",
    )
    return StudySpec(
        groups=_groups(job),
        transfer=LINK,
        kv_token_bytes=MODEL.kv_token_bytes,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=NUM_BLOCKS * BLOCK_TOKENS,
        conductor=conductor,
        slos=(SLO,),
        default_slo=SLO.name,
        max_output_tokens=MAX_TOKENS,
        request_timeout_s=7200.0,
        moves=MoveRules(usage=usage) if job.moves else None,
        heartbeat_interval_s=LOOK_INTERVAL_S,
        look_interval_s=LOOK_INTERVAL_S,
        autoscale=_autoscale(job),
    )


def _groups(job: Job) -> tuple[WorkerGroup, ...]:
    latency = Roofline(MODEL, DEVICE, EFFICIENCIES)

    def group(name: str, role: Role, count: int, max_tokens: int = 512) -> WorkerGroup:
        return WorkerGroup(
            name=name,
            role=role,
            count=count,
            latency=latency,
            num_blocks=NUM_BLOCKS,
            tpot_chunks=False,
            budget=StepBudget(max_tokens=max_tokens, max_sequences=256),
        )

    if job.num_prefill is None:
        return (group("mixed", "mixed", job.num_workers),)
    return (
        group("prefill", "prefill", job.num_prefill, 2048),
        group("decode", "decode", job.num_workers - job.num_prefill, 2048),
    )


def _autoscale(job: Job) -> AutoscaleSettings | None:
    if not job.autoscale:
        return None
    if job.num_prefill is None:
        rules = ScaleRules(
            min_workers=2,
            max_workers=job.num_workers,
            freeness_low=FREENESS[0],
            freeness_high=FREENESS[1],
            cooldown_down_s=30.0,
        )
        pools: tuple[ScaledPool, ...] = (ScaledPool(name="mixed", role="mixed", rules=rules),)
        return AutoscaleSettings(pools=pools, start_s=START_S, flip_s=FLIP_S)
    counts: dict[Role, int] = {"prefill": job.num_prefill, "decode": job.num_workers - job.num_prefill}
    pools = tuple(
        ScaledPool(name=role, role=role, rules=ScaleRules(min_workers=count, max_workers=count))
        for role, count in counts.items()
    )
    lend = LendRules(max_lent=job.num_workers)
    return AutoscaleSettings(
        mode="off",
        interval_s=0.5,
        pools=pools,
        flip_s=FLIP_S,
        tpot_s=SLO.tpot_ms / 1e3,
        lend_mode="apply",
        lend_rules=lend,
    )


def requests_of(job: Job) -> list[WorkloadRequest]:
    load = job.load
    if load.phases:
        return list(_in_phases(load))
    arrivals = Gamma(load.rate_rps, load.cv)
    requests = synthetic(
        arrivals=Diurnal(load.rate_rps, load.amplitude, load.period_s) if load.amplitude else arrivals,
        prompts=LENGTHS[load.mix[0]],
        outputs=LENGTHS[load.mix[1]],
        seed=load.seed,
        num_requests=load.num_requests or None,
        duration_s=load.period_s or None,
    )
    urgent = random.Random(f"{load.seed} urgent")
    # The same ones are called urgent where priorities are not looked at.
    return [replace_priority(request, HIGH_PRIORITY if urgent.random() < HIGH_SHARE else 0) for request in requests]


def replace_priority(request: WorkloadRequest, priority: int) -> WorkloadRequest:
    return request._replace(priority=priority)


def _in_phases(load: Load) -> Iterable[WorkloadRequest]:
    begin_s = 0.0
    for phase in load.phases:
        drawn = synthetic(
            arrivals=Gamma(phase.rate_rps, load.cv),
            prompts=_around(phase.prompt_tokens),
            outputs=_around(phase.output_tokens),
            # The same whether it comes alone or after another.
            seed=load.seed + phase.prompt_tokens,
            duration_s=phase.seconds,
        )
        for request in drawn:
            yield request._replace(arrival_s=begin_s + request.arrival_s)
        begin_s += phase.seconds


def _around(tokens: int) -> PowerLaw | Fixed:
    """Half to four times as long, most of them short."""
    return PowerLaw.from_mean_median(tokens, 0.8 * tokens, 4 * tokens)


def run(job: Job) -> Ran:
    spec, requests = study(job), requests_of(job)
    is_high = np.array([request.priority > 0 for request in requests], np.bool_)
    if job.priorities == "none":
        requests = [replace_priority(request, 0) for request in requests]
    began_s = time.process_time()
    result = simulate(spec, requests)
    cpu_s = time.process_time() - began_s
    rows, line, moves = result.requests, result.time_line, result.moves
    finished = rows.outcome == Outcome.FINISHED
    latencies = request_latencies(result, spec.slos)
    arriving = line.at_s <= rows.arrival_s[-1]

    def known(values: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.where(finished, values, np.inf).astype(np.float32)

    return Ran(
        job=job,
        ttft_s=known(rows.first_token_s - rows.arrival_s),
        tpot_s=known((rows.finished_s - rows.first_token_s) / np.maximum(1, rows.output_tokens - 1)),
        e2e_s=known(rows.finished_s - rows.arrival_s),
        arrival_s=rows.arrival_s.astype(np.float32),
        is_met=latencies.met,
        is_high=is_high,
        num_preemptions=int(rows.preemptions.sum()),
        moved=(moves.answers, moves.prompts, moves.preempted),
        pause_p50_s=result.move_pause_s.quantile(0.5),
        pause_p99_s=result.move_pause_s.quantile(0.99),
        moved_gib=result.moved_bytes / 2**30,
        blocks_used=float(line.blocks_used[arriving].mean()),
        worker_s=result.worker_s,
        duration_s=result.duration_s,
        operations=result.operations,
        prefill_load=line.prefill_load[arriving],
        decode_load=line.decode_load[arriving],
        cpu_s=cpu_s,
    )


def at_rate(job: Job, rate_rps: float, seed: int) -> Job:
    return replace(job, load=replace(job.load, rate_rps=rate_rps, seed=seed))
