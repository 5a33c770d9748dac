"""Commands of the `tandem` script that simulate. It finds them by their entry points; help loads nothing heavy."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path  # noqa: TC003 (read at run time by the command line parser)

from simulator.planning.flags import PlanFlags  # noqa: TC001 (read at run time by the command line parser)
from simulator.rejects.flags import RejectsFlags
from simulator.study.flags import ClusterFlags, LatencyFlags, PolicyFlags, ReportFlags
from workload.flags import WorkloadFlags


def simulate(
    *,
    cluster: ClusterFlags | None = None,
    latency: LatencyFlags | None = None,
    policy: PolicyFlags | None = None,
    workload: WorkloadFlags | None = None,
    report: ReportFlags | None = None,
) -> int:
    """Predict how a cluster would serve a workload: goodput, attainment, latencies, utilisation, plots."""
    from simulator.study.run import run_study

    return run_study(
        cluster or ClusterFlags(),
        latency or LatencyFlags(),
        policy or PolicyFlags(),
        workload or WorkloadFlags(),
        report or ReportFlags(),
        command=shlex.join(["tandem", *sys.argv[1:]]),
    )


def plan(*, plan: PlanFlags, latency: LatencyFlags | None = None, workload: WorkloadFlags | None = None) -> int:
    """Find the workers that serve the most requests within their targets, and write them as a cluster file."""
    from simulator.planning.run import run_plan

    return run_plan(plan, latency or LatencyFlags(), workload or WorkloadFlags())


def rejects(*logs: Path, flags: RejectsFlags | None = None) -> int:
    """Tell from a coordinator's decision log what was refused and why, and whether that was right.

    Parameters
    ----------
    logs
        Files that coordinator.decision_log named, older parts first.
    """
    from simulator.rejects.run import run_rejects

    return run_rejects(logs, flags or RejectsFlags())
