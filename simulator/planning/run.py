"""One search from its flags to its file: the body of `tandem plan`."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, cast

from contracts.config import ExpectedWorkload, parse_size
from contracts.errors import ConfigError
from coordinator.planner.plans import Dropped, Parallelism, WorkerKind
from coordinator.planner.search import ROLES, plan_goodput
from coordinator.planner.space import Machines, parallelisms
from coordinator.replanning import percentile_95
from simulator.planning.cluster_file import cluster_file
from simulator.planning.costs import cost_table
from simulator.planning.evaluator import EvaluatorSettings, HeapEvaluator
from simulator.planning.progress import PlanProgress
from simulator.planning.report import report_text, summary
from simulator.planning.search_range import MAX_REQUESTS, MIN_REQUESTS, MIN_SPAN_S, ROUGH_REQUESTS, search_settings
from simulator.study.run import unmodelled
from workload.traffic import build_traffic

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contracts.messages import Role
    from coordinator.planner.plans import Planned
    from simulator.planning.costs import CostTable
    from simulator.planning.flags import PlanFlags
    from simulator.study.flags import LatencyFlags
    from workload.flags import WorkloadFlags
    from workload.request import WorkloadRequest
    from workload.traffic import Traffic

_MAX_GPUS = 1024
_USUAL_NODE_GPUS = 8
#: Steady load takes a while to show: a search that squeezed the workload into less than this says so.
_SHORT_S = 60.0
#: Token budgets that are tried for workers that read prompts.
_BUDGETS = (512, 2048)


def run_plan(flags: PlanFlags, latency: LatencyFlags, workload: WorkloadFlags) -> int:
    """Searches, prints the answer and writes the file; returns the exit code: 1 where no plan meets the targets, or
    none the rate. Raises ConfigError before it starts."""
    machines = _machines(flags)
    costs = _costs(flags, latency, machines)
    is_open = _is_open(workload)
    traffic = build_traffic(replace(workload, requests=MAX_REQUESTS) if is_open else workload)
    base_rps = traffic.totals.rate_rps
    if base_rps is None:
        raise ConfigError("all requests of the workload come at once: a planner needs a rate that it can scale")
    _check_output(flags)
    found, dropped = _parallelisms(machines, costs, flags, latency)
    max_sequences = flags.max_sequences or costs.max_sequences
    settings = EvaluatorSettings(max_sequences=max_sequences)
    requests_at = _Requests(traffic, base_rps)
    roughly = replace(settings, min_requests=ROUGH_REQUESTS)
    if is_open:
        settings = replace(settings, min_requests=MIN_REQUESTS, min_span_s=MIN_SPAN_S)
    exact = HeapEvaluator(costs, requests_at, traffic.slos, settings)
    rough = HeapEvaluator(costs, requests_at, traffic.slos, roughly)
    started_s = time.perf_counter()
    with PlanProgress() as progress:
        planned = plan_goodput(
            machines,
            {role: _kinds(role, found, flags, max_sequences) for role in ROLES},
            exact,
            search_settings(
                costs,
                min(found, key=lambda parallel: parallel.num_devices),
                prompt_tokens=traffic.totals.prompt_tokens / traffic.totals.num_requests,
                output_tokens=traffic.totals.output_tokens / traffic.totals.num_requests,
                target=flags.target_attainment,
            ),
            rate_rps=workload.rate,
            rough=rough,
            progress=progress.update,
        )
    took_s = time.perf_counter() - started_s
    planned = replace(planned, dropped=(*dropped, *planned.dropped))
    print(
        report_text(
            planned,
            workload=traffic.text,
            latency=costs.text,
            machines=_machines_text(machines, costs),
            targets=", ".join(
                f"{slo.name} TTFT {slo.ttft_ms:g} ms and TPOT {slo.tpot_ms:g} ms" for slo in traffic.slos
            ),
            took_s=took_s,
            warnings=(
                *costs.warnings,
                *traffic.warnings,
                *_unmodelled(planned, exact, traffic),
                *_too_short(planned, exact, traffic),
            ),
        )
    )
    if planned.best is None:
        return 1
    if flags.output is not None:
        _write(flags, latency, planned, costs, exact, traffic, max_sequences, workload.rate)
    return 1 if workload.rate is not None and planned.best.goodput_rps < workload.rate else 0


class _Requests:
    """The workload at any rate; lone requests are drawn once."""

    def __init__(self, traffic: Traffic, base_rps: float) -> None:
        self._traffic = traffic
        self._base_rps = base_rps
        self._drawn = None if traffic.totals.num_chats else tuple(traffic.requests())

    def __call__(self, rate_rps: float) -> Iterable[WorkloadRequest]:
        factor = rate_rps / self._base_rps
        if self._drawn is None:
            return self._traffic.requests(factor)
        return (request._replace(arrival_s=request.arrival_s / factor) for request in self._drawn)


# --- from flags -------------------------------------------------------------------------------------------


def _machines(flags: PlanFlags) -> Machines:
    if not 1 <= flags.gpus <= _MAX_GPUS:
        raise ConfigError(f"--gpus {flags.gpus}: must be between 1 and {_MAX_GPUS:,}")
    for name in ("nodes", "max_pipeline", "max_batch_tokens", "max_sequences"):
        value: int | None = getattr(flags, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    if not 0 < flags.target_attainment <= 1:
        raise ConfigError(f"--target-attainment {flags.target_attainment:g}: must be above 0, at most 1")
    nodes = flags.nodes
    if nodes is None:
        nodes = 1 if flags.gpus % _USUAL_NODE_GPUS else flags.gpus // _USUAL_NODE_GPUS
    try:
        return Machines(num_devices=flags.gpus, num_nodes=nodes, fast_fabric=flags.fabric == "fast")
    except ValueError as error:
        raise ConfigError(f"--gpus {flags.gpus} --nodes {nodes}: {error}") from error


def _costs(flags: PlanFlags, latency: LatencyFlags, machines: Machines) -> CostTable:
    costs = cost_table(latency, node_devices=machines.node_devices, fast_fabric=machines.fast_fabric)
    if flags.link_bandwidth is None:
        return costs
    try:
        bandwidth_bytes_s = cast("int", parse_size(flags.link_bandwidth))
        transfer = replace(costs.transfer, bandwidth_bytes_s=float(bandwidth_bytes_s), efficiency=1.0)
    except ValueError as error:
        raise ConfigError(f"--link-bandwidth: {error}") from error
    return replace(costs, transfer=transfer)


def _is_open(workload: WorkloadFlags) -> bool:
    """A drawn workload of which nobody says how long it is."""
    said = (workload.workload, workload.trace, workload.requests, workload.duration)
    return all(each is None for each in said)


def _parallelisms(
    machines: Machines, costs: CostTable, flags: PlanFlags, latency: LatencyFlags
) -> tuple[list[Parallelism], list[Dropped]]:
    """At least one. Raises ConfigError that says why there is none."""
    single = costs.num_layers == 1
    found, dropped = parallelisms(
        machines,
        num_heads=costs.num_heads,
        num_layers=costs.num_layers,
        max_pipeline=1 if single else flags.max_pipeline,
        fits=costs.why_not,
    )
    if latency.tensor_parallel is not None:
        found = [parallel for parallel in found if parallel.tensor == latency.tensor_parallel]
    if not found:
        wanted = "" if latency.tensor_parallel is None else f"--tensor-parallel {latency.tensor_parallel}: "
        why = f": {dropped[-1].what}: {dropped[-1].why}" if dropped else ""
        raise ConfigError(f"{wanted}no worker on {machines.num_devices} devices can hold the model{why}")
    return found, dropped


def _kinds(role: Role, found: Sequence[Parallelism], flags: PlanFlags, max_sequences: int) -> list[WorkerKind]:
    if flags.max_batch_tokens is not None:
        budgets: tuple[int, ...] = (flags.max_batch_tokens,)
    elif role == "decode":
        # It reads a prompt only again, after a preemption.
        budgets = (max(_BUDGETS[0], max_sequences),)
    else:
        budgets = _BUDGETS
    return [WorkerKind(parallel, budget) for parallel in found for budget in budgets]


def _check_output(flags: PlanFlags) -> None:
    if flags.output is None:
        return
    if flags.output.exists() and not flags.force:
        raise ConfigError(f"--output {flags.output}: exists already; --force replaces it")
    if not flags.output.parent.is_dir():
        raise ConfigError(f"--output {flags.output}: there is no folder {flags.output.parent}")


# --- to people and files ----------------------------------------------------------------------------------


def _machines_text(machines: Machines, costs: CostTable) -> str:
    link = costs.transfer
    where = "between any two workers" if machines.fast_fabric else "within a machine only"
    nodes = f"{machines.num_nodes} machine{'s' * (machines.num_nodes > 1)}"
    return (
        f"{machines.num_devices} devices in {nodes}; KV goes {where}, at "
        f"{link.bandwidth_bytes_s * link.efficiency / 1e9:g} GB/s of a worker"
    )


def _unmodelled(planned: Planned, evaluator: HeapEvaluator, traffic: Traffic) -> tuple[str, ...]:
    return () if planned.best is None else unmodelled(traffic, evaluator.spec(planned.best.plan))


def _too_short(planned: Planned, evaluator: HeapEvaluator, traffic: Traffic) -> tuple[str, ...]:
    if planned.best is None:
        return ()
    rate_rps = planned.best.goodput_rps / planned.best.plan.copies
    num_requests = min(traffic.totals.num_requests, evaluator.num_requests(rate_rps) or traffic.totals.num_requests)
    span_s = num_requests / rate_rps
    if span_s >= _SHORT_S:
        return ()
    return (
        f"at {planned.best.goodput_rps:,.3g} requests/s the workload lasts {span_s:,.0f} s: queues may not have had "
        f"the time to grow. Give more --requests",
    )


def _write(
    flags: PlanFlags,
    latency: LatencyFlags,
    planned: Planned,
    costs: CostTable,
    evaluator: HeapEvaluator,
    traffic: Traffic,
    max_sequences: int,
    rate_rps: float | None,
) -> None:
    best, output = planned.best, flags.output
    assert best is not None
    assert output is not None
    text = cluster_file(
        best.plan,
        model=costs.model,
        block_tokens=EvaluatorSettings().block_tokens,
        max_sequences=max_sequences,
        num_blocks=evaluator.num_blocks,
        slos=traffic.slos,
        profile=latency.profile,
        expected=_expected(traffic, rate_rps),
        heading=(f"Planned for {traffic.text}.", f"{summary(best)}.", f"Latencies: {costs.text}."),
    )
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written: {error.strerror}") from error
    print(f"wrote {output}")


def _expected(traffic: Traffic, rate_rps: float | None) -> ExpectedWorkload:
    """What was planned for. Without a rate that was asked for the plan is for as much as it can serve, and what comes
    is no drift from it."""
    prompts = sorted(request.prompt_tokens for request in traffic.requests())
    totals = traffic.totals
    return ExpectedWorkload(
        rate_rps=rate_rps,
        prompt_tokens=round(totals.prompt_tokens / totals.num_requests, 1),
        p95_prompt_tokens=percentile_95(prompts),
        answer_tokens=round(totals.output_tokens / totals.num_requests, 1),
    )
