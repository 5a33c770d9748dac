"""The event heap against the production shells on virtual time: one workload, one latency model, two simulators.

The shells send every message and step every step; the heap knows only the order of things. Where they disagreed, a
capacity study would be about another system.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.latency import DecodeTerms
from contracts.requests import SamplingParams
from contracts.transfer_models import LinkTransfer
from engine.compose import StepBudget
from gateway.core import Submission
from simulator import Program, StepTiming, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.heap.results import Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from tests.support.heap_studies import audit, tpot_s, ttft_s
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from contracts.latency import StepWork
    from contracts.messages import Role

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


def in_shells(requests: list[WorkloadRequest], roles: dict[str, Role], num_blocks: int) -> tuple[float, float]:
    """Mean TTFT and TPOT as a client of the whole cluster sees them."""

    async def ask(cluster: SimulatedCluster, request: WorkloadRequest, index: int) -> tuple[float, float]:
        await asyncio.sleep(request.arrival_s)
        loop = asyncio.get_running_loop()
        asked_s = loop.time()
        times: list[float] = []
        submission = Submission(
            token_ids=tuple((index + each) % 1000 for each in range(request.prompt_tokens)),
            sampling=SamplingParams(temperature=0.0, max_tokens=request.output_tokens),
            deadline_s=600.0,
        )
        async with cluster.core.submit(submission) as stream:
            async for delta in stream:
                times += [loop.time()] * len(delta.token_ids)
        assert len(times) == request.output_tokens
        return times[0] - asked_s, (times[-1] - times[0]) / (len(times) - 1)

    async def main(program: Program) -> list[tuple[float, float]]:
        spec = ClusterSpec(
            roles=roles,
            num_blocks=num_blocks,
            block_tokens=BLOCK_TOKENS,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_sequences=MAX_SEQUENCES,
            timing=TIMING,
            latency_s=lambda _message, _rng: MESSAGE_S,
        )
        async with SimulatedCluster(program, spec) as cluster:
            await restart_apart(cluster, sorted(roles))
            async with asyncio.TaskGroup() as tasks:
                asked = [tasks.create_task(ask(cluster, each, index)) for index, each in enumerate(requests)]
            return [task.result() for task in asked]

    measured = run(main, seed=1)
    return fmean(ttft for ttft, _ in measured), fmean(tpot for _, tpot in measured)


def in_heap(requests: list[WorkloadRequest], roles: dict[str, Role], num_blocks: int) -> tuple[float, float]:
    budget = StepBudget(max_tokens=MAX_BATCH_TOKENS, max_sequences=MAX_SEQUENCES)
    names: dict[str, Role] = {worker_id[0]: role for worker_id, role in roles.items()}
    result = simulate(
        StudySpec(
            groups=tuple(
                WorkerGroup(
                    name=name,
                    role=role,
                    count=sum(worker_id[0] == name for worker_id in roles),
                    latency=SameTiming(TIMING),
                    num_blocks=num_blocks,
                    budget=budget,
                )
                for name, role in names.items()
            ),
            transfer=LINK,
            kv_token_bytes=KV_TOKEN_BYTES,
            block_tokens=BLOCK_TOKENS,
            max_context_tokens=1024,
            message_s=MESSAGE_S,
        ),
        requests,
    )
    audit(result)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    return float(np.mean(ttft_s(result))), float(np.mean(tpot_s(result)))


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
    roles: dict[str, Role], rate: float, num_blocks: int, tolerance: float
) -> None:
    requests = workload(random.Random(0), rate=rate, count=80)
    shells_ttft_s, shells_tpot_s = in_shells(requests, roles, num_blocks)
    heap_ttft_s, heap_tpot_s = in_heap(requests, roles, num_blocks)
    assert heap_ttft_s == pytest.approx(shells_ttft_s, rel=tolerance)
    assert heap_tpot_s == pytest.approx(shells_tpot_s, rel=tolerance)
