"""Requests for a model that sleeps are taken up as soon as its workers are there, not when a timer says so."""

from __future__ import annotations

import asyncio

import pytest

from contracts.requests import SamplingParams
from coordinator.policy.scaling import ScaleRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from gateway.core import Submission
from gateway.limits import GatewayLimits
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.elastic import ElasticSpec

_SLEEPING = ElasticSpec(
    settings=AutoscaleSettings(
        interval_s=0.25,
        start_s=6.0,
        flip_s=2.0,
        pools=tuple(
            ScaledPool(
                name=role,
                role=role,
                rules=ScaleRules(
                    min_workers=0,
                    max_workers=1,
                    queue_delay_s=1.0,
                    freeness_low=64.0,
                    freeness_high=128.0,
                    cooldown_up_s=1.0,
                    cooldown_down_s=20.0,
                    window_s=30.0,
                    settle_s=1.0,
                ),
            )
            for role in ("prefill", "decode")
        ),
    ),
    initial=frozenset(),
    start_s=(5.0, 7.0),
)


@pytest.mark.parametrize("seed", range(4))
def test_a_burst_for_a_sleeping_model_begins_when_its_workers_are_there(seed: int) -> None:
    async def main(program: Program) -> None:
        loop = asyncio.get_running_loop()
        # By its timer alone a request would not ask again before all patience is over.
        limits = GatewayLimits(replay_backoff_s=20.0, max_replay_backoff_s=20.0)
        spec = ClusterSpec(
            roles={"prefill-0": "prefill", "decode-0": "decode"}, elastic=_SLEEPING, gateway=limits, num_blocks=256
        )
        async with SimulatedCluster(program, spec) as cluster:
            there_s = list[float]()

            async def wait_for_workers() -> None:
                while len(cluster.elastic_workers_up()) < 2:  # noqa: ASYNC110 - the simulated machine tells nobody
                    await asyncio.sleep(0.01)
                there_s.append(loop.time())

            async def ask(after_s: float) -> float:
                await asyncio.sleep(after_s)
                submission = Submission(token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=4), deadline_s=60.0)
                stream = cluster.core.submit(submission)
                await stream.accepted()
                began_s = loop.time()
                assert len([token async for delta in stream for token in delta.token_ids]) == 4
                return began_s

            watching = asyncio.create_task(wait_for_workers())
            # The coordinator knows its node agent by then.
            begun_s = await asyncio.gather(*(ask(2.0 + 0.2 * number) for number in range(16)))
            await watching
            # The agent tells of a worker, the coordinator of a member, and a prompt is sent.
            assert max(begun_s) - there_s[0] < 0.2

    run(main, seed=seed)
