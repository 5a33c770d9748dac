"""A small study that branches; run as a program, one whose two branches and trunk go on until they are stopped."""

from __future__ import annotations

import os
from itertools import count, islice
from typing import TYPE_CHECKING

from contracts.latency_models import CostCurve, FittedLatency
from contracts.transfer_models import LinkTransfer
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.study.branches import Trial, simulate_with_branches
from workload.request import WorkloadRequest
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contracts.messages import Role

SLO = SloClass("default", 2000.0, 40.0)
_COSTS = FittedLatency(
    prefill=CostCurve.line(0.02, 0.0005), pair_s=0.0, decode=CostCurve.line(0.02, 0.002), context_token_s=0.0
)


def _worker(role: Role) -> WorkerGroup:
    return WorkerGroup(name=role, role=role, count=1, latency=_COSTS, num_blocks=5000)


SPEC = StudySpec(
    groups=(_worker("prefill"), _worker("decode")),
    transfer=LinkTransfer(latency_s=0.001, bandwidth_bytes_s=1e10),
    kv_token_bytes=1000,
    conductor=ConductorSettings(admission=AdmissionRule(form="none")),
    slos=(SLO,),
    default_slo=SLO.name,
)


def endless() -> Iterator[WorkloadRequest]:
    """Somewhat less than can be served."""
    for number in count():
        yield WorkloadRequest(0.4 * number, 400 + 100 * (number % 5), 20 + number % 3, (), 0)


def arrivals(num_requests: int) -> list[WorkloadRequest]:
    return list(islice(endless(), num_requests))


def _main() -> None:
    trunk = os.getpid()

    def requests() -> Iterator[WorkloadRequest]:
        for index, each in enumerate(endless()):
            if index == 3 and os.getpid() == trunk:
                print("two branches", flush=True)
            yield each

    trials = [Trial(index=index, patience_s=1e12) for index in (1, 2)]
    simulate_with_branches(SPEC, requests(), trials, (SLO,), max_branches=2)


if __name__ == "__main__":
    _main()
