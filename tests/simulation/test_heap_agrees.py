"""The event heap against the production shells on virtual time: one workload, one latency model, two simulators.

The shells send every message and step every step; the heap knows only the order of things. Where they disagreed, a
capacity study would be about another system.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.errors import NoCapacity
from contracts.latency import DecodeTerms
from contracts.requests import SamplingParams
from contracts.transfer_models import LinkTransfer
from coordinator.conductor import Conductor, ConductorSettings
from engine.compose import StepBudget
from gateway.core import Submission
from prefill import PrefillLimits
from simulator import Program, StepTiming, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.heap.costs import StudyCosts
from simulator.heap.results import Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from tests.support.heap_studies import audit, tpot_s, ttft_s
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from contracts.config import DispatchPolicyName
    from contracts.latency import StepWork
    from contracts.messages import Role
    from simulator.heap.results import StudyResult

TIMING = StepTiming(floor_s=0.004, per_new_token_s=0.000_2, per_context_token_s=0.000_002, per_sequence_s=0.000_3)
#: As `kvtransfer.memory.steady_link` has it; the KV of a token as in `modelled_identity`.
LINK = LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=4e9)
KV_TOKEN_BYTES = 16
#: Every message takes this long: with jitter two offers may arrive in the other order, and where blocks are few all
#: that follows is different.
MESSAGE_S = 0.000_25
#: By then a started worker knows its peers.
PROBED_S = 5.0
HEARTBEAT_INTERVAL_S = 0.5
BLOCK_TOKENS = 8
MAX_BATCH_TOKENS = 64
MAX_SEQUENCES = 16
DEFAULT_PREFILL = PrefillLimits()

PAIR: dict[str, Role] = {"d-0": "decode", "p-0": "prefill"}
TWO_PAIRS: dict[str, Role] = {"d-0": "decode", "d-1": "decode", "p-0": "prefill", "p-1": "prefill"}
MIXED: dict[str, Role] = {"m-0": "mixed"}
TWO_MIXED: dict[str, Role] = {"m-0": "mixed", "m-1": "mixed"}


@dataclass(frozen=True, slots=True)
class SameTiming:
    """`StepTiming` as a latency model. What the chunks of a step read is exact for one, and nearly so for more."""

    timing: StepTiming

    def step_s(self, work: StepWork) -> float:
        timing = self.timing
        read_tokens = 0.0
        if work.prefill_tokens:
            read_tokens = max(work.prefill_tokens, work.prefill_pairs / work.prefill_tokens + work.prefill_tokens / 2)
        return (
            max(timing.floor_s, timing.per_new_token_s * (work.prefill_tokens + work.num_decodes))
            + timing.per_context_token_s * (read_tokens + work.context_tokens)
            + timing.per_sequence_s * (work.num_chunks + work.num_decodes)
        )

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        timing = self.timing
        base_s = max(timing.floor_s, timing.per_new_token_s * num_decodes) + timing.per_sequence_s * num_decodes
        return DecodeTerms(base_s, timing.per_context_token_s)


def workload(rng: random.Random, *, rate: float, count: int) -> list[WorkloadRequest]:
    requests: list[WorkloadRequest] = []
    now_s = 0.0
    for _ in range(count):
        now_s += rng.expovariate(rate)
        requests.append(WorkloadRequest(now_s, rng.randint(1, 250), rng.randint(2, 60)))
    return requests


async def restart_apart(cluster: SimulatedCluster, worker_ids: list[str]) -> None:
    """Workers that started together beat together, and the dispatch policy then forgets all that it has placed at
    once. The heap spreads beats evenly over their interval; so do these workers from now on, in the same order."""
    for worker_id in worker_ids:
        await cluster.stop(worker_id)
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    for index, worker_id in enumerate(worker_ids):
        await asyncio.sleep(start_s + HEARTBEAT_INTERVAL_S * (index + 1) / len(worker_ids) - loop.time())
        await cluster.start(worker_id)
    await asyncio.sleep(start_s + PROBED_S - loop.time())


def shells_spec(roles: dict[str, Role], num_blocks: int, policy: DispatchPolicyName = "ttft_min") -> ClusterSpec:
    """Its coordinator knows what steps and pulls cost, as that of the heap does."""
    study = heap_spec(roles, num_blocks, policy=policy)

    def conductor() -> Conductor:
        return Conductor(
            costs=StudyCosts(study), slos={}, default_slo=None, settings=study.settings(0), rng=random.Random(0)
        )

    return ClusterSpec(
        conductor=conductor,
        roles=roles,
        num_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        max_batch_tokens=MAX_BATCH_TOKENS,
        max_sequences=MAX_SEQUENCES,
        timing=TIMING,
        latency_s=lambda _message, _rng: MESSAGE_S,
    )


def in_shells(requests: list[WorkloadRequest], spec: ClusterSpec) -> list[tuple[float, float] | None]:
    """TTFT and TPOT of each request as a client of the whole cluster sees them; None for one refused for room."""

    async def ask(cluster: SimulatedCluster, request: WorkloadRequest, index: int) -> tuple[float, float] | None:
        await asyncio.sleep(request.arrival_s)
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        times: list[float] = []
        submission = Submission(
            token_ids=tuple((index + each) % 1000 for each in range(request.prompt_tokens)),
            sampling=SamplingParams(temperature=0.0, max_tokens=request.output_tokens),
            deadline_s=600.0,
        )
        try:
            async with cluster.core.submit(submission) as stream:
                async for delta in stream:
                    times += [loop.time()] * len(delta.token_ids)
        except NoCapacity:
            assert not times, "refused before it is taken up"
            return None
        assert len(times) == request.output_tokens
        return times[0] - asked_s, (times[-1] - times[0]) / (len(times) - 1)

    async def main(program: Program) -> list[tuple[float, float] | None]:
        async with SimulatedCluster(program, spec) as cluster:
            await restart_apart(cluster, sorted(spec.roles))
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(ask(cluster, each, index)) for index, each in enumerate(requests)]
            return [task.result() for task in asked]

    return run(main, seed=1)


def heap_spec(
    roles: dict[str, Role],
    num_blocks: int,
    prefill: PrefillLimits = DEFAULT_PREFILL,
    policy: DispatchPolicyName = "ttft_min",
) -> StudySpec:
    budget = StepBudget(max_tokens=MAX_BATCH_TOKENS, max_sequences=MAX_SEQUENCES)
    names: dict[str, Role] = {worker_id[0]: role for worker_id, role in roles.items()}
    return StudySpec(
        groups=tuple(
            WorkerGroup(
                name=name,
                role=role,
                count=sum(worker_id[0] == name for worker_id in roles),
                latency=SameTiming(TIMING),
                num_blocks=num_blocks,
                budget=budget,
                prefill=prefill,
            )
            for name, role in names.items()
        ),
        transfer=LINK,
        kv_token_bytes=KV_TOKEN_BYTES,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=1024,
        message_s=MESSAGE_S,
        conductor=ConductorSettings(policy=policy),
    )


def in_heap(requests: list[WorkloadRequest], spec: StudySpec) -> StudyResult:
    result = simulate(spec, requests)
    audit(result)
    return result


@pytest.mark.parametrize("policy", ["least_loaded", "ttft_min"])
@pytest.mark.parametrize(
    ("roles", "rate", "num_blocks", "tolerance"),
    [
        pytest.param(PAIR, 12.0, 400, 0.01, id="pair"),
        pytest.param(PAIR, 12.0, 64, 0.01, id="pair, few blocks"),
        pytest.param(PAIR, 12.0, 40, 0.01, id="pair, very few blocks"),
        pytest.param(MIXED, 6.0, 64, 0.01, id="mixed, few blocks"),
        pytest.param(MIXED, 6.0, 40, 0.01, id="mixed, very few blocks"),
        # Where there is a choice, a heartbeat that comes a little later places requests elsewhere.
        pytest.param(TWO_PAIRS, 4.0, 400, 0.05, id="two pairs"),
        pytest.param(TWO_PAIRS, 25.0, 400, 0.08, id="two pairs, busy"),
        pytest.param(TWO_MIXED, 12.0, 400, 0.08, id="two mixed, busy"),
    ],
)
def test_both_simulators_see_the_same_latencies(
    roles: dict[str, Role], rate: float, num_blocks: int, tolerance: float, policy: DispatchPolicyName
) -> None:
    requests = workload(random.Random(0), rate=rate, count=80)
    served = [each for each in in_shells(requests, shells_spec(roles, num_blocks, policy)) if each is not None]
    result = in_heap(requests, heap_spec(roles, num_blocks, policy=policy))
    assert len(served) == len(requests)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    assert float(np.mean(ttft_s(result))) == pytest.approx(fmean(ttft for ttft, _ in served), rel=tolerance)
    assert float(np.mean(tpot_s(result))) == pytest.approx(fmean(tpot for _, tpot in served), rel=tolerance)


def refused_in_both(requests: list[WorkloadRequest]) -> tuple[list[bool], list[bool]]:
    """By the shells and by the heap, where two prompts may wait at each of two prefill workers."""
    prefill = PrefillLimits(max_waiting=2)
    asked = in_shells(requests, replace(shells_spec(TWO_PAIRS, 64, "least_loaded"), prefill=prefill))
    result = in_heap(requests, heap_spec(TWO_PAIRS, 64, prefill, "least_loaded"))
    return [each is None for each in asked], (result.requests.outcome == Outcome.REJECTED).tolist()


def test_both_simulators_refuse_as_many_of_a_burst() -> None:
    """The short prompts go to the worker that does not read the long one until it says no. Each that it refuses is
    placed once more: at the other worker, while that has room."""
    short = [WorkloadRequest(0.002 + 0.001 * number, 20, 2) for number in range(15)]
    shells, heap = refused_in_both([WorkloadRequest(0.0, 500, 2), *short])
    assert 0 < sum(heap) == sum(shells)


def test_both_simulators_refuse_under_overload() -> None:
    """Once one prompt goes elsewhere, all that follows may: single workloads differ by more than their sum."""
    shells: list[bool] = []
    heap: list[bool] = []
    for seed in range(10):
        by_shells, by_heap = refused_in_both(workload(random.Random(seed), rate=60.0, count=80))
        shells += by_shells
        heap += by_heap
    assert sum(heap) == pytest.approx(sum(shells), rel=0.1)
    assert fmean(ours == theirs for ours, theirs in zip(heap, shells, strict=True)) > 0.75
