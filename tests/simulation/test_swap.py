"""Preempted answers whose blocks a store keeps: fetched where that is faster than reading, and always the same."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from decode import DecodeLimits
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.engine import StepTiming
from tests.support.workload import serve, workload

if TYPE_CHECKING:
    from contracts.messages import Role

ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
#: Answers are admitted without room to grow, so that they lose their blocks, and others take them.
SMALL = ClusterSpec(roles=ROLES, stores=("store-node",), num_blocks=32, decode=DecodeLimits(growth_tokens=8))
#: And reading is dear.
TIGHT = replace(SMALL, timing=StepTiming(per_new_token_s=0.004))


@pytest.mark.parametrize("seed", range(2))
def test_what_was_swapped_out_comes_back_and_nothing_changes(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, TIGHT) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=6.0, prompt=60, output=150)
            for answer in await serve(program, cluster, asks):
                assert answer.error is None, answer.error
            writer = cluster.worker("d0")
            assert writer.decode.preemptions_total > 10
            assert writer.decode.swapped_in_blocks_total >= 3

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_a_store_that_is_killed_costs_nobody_his_answer(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, TIGHT) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=6.0, prompt=60, output=150, cancels=0.2)
            asks = [ask for ask in asks if ask.at_s > 0.5]
            cluster.crash("store-node")
            await cluster.start("store-node")
            for answer in await serve(program, cluster, asks):
                assert answer.error is None, answer.error

    run(main, seed=seed)
