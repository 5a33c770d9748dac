"""What a seed draws: pure, all kinds of faults, and by weather what a trial may do to its cluster."""

from __future__ import annotations

import random

import pytest

from contracts.failpoints import FAILPOINTS
from simulator.chaos import draw
from simulator.chaos import faults as faults_module
from simulator.chaos.drawing import Victims, draw_faults
from simulator.chaos.faults import Fault
from simulator.chaos.scenario import (
    CALM_IN,
    LONG_ANSWER_LEFT_WITHIN_TOKENS,
    LONG_ANSWER_TOKENS,
    LONGEST_WORKLOAD_S,
    MAX_FAULTS,
    TOPOLOGIES,
    Weather,
)

SCENARIOS = [draw(seed) for seed in range(1, 401)]
VICTIMS = Victims(
    worker_ids=("p0", "d0", "d1"), readers=("d0", "d1"), hosts=("p0", "d0", "d1", "coordinator", "gateway")
)


def kinds() -> set[type[Fault]]:
    """Every kind of fault that can strike."""
    found = [each for each in vars(faults_module).values() if isinstance(each, type) and issubclass(each, Fault)]
    return {each for each in found if not getattr(each, "__abstractmethods__", None)}


def test_a_draw_is_a_function_of_the_seed_alone() -> None:
    random.seed(1)
    first = draw(7)
    random.seed(2)
    assert draw(7) == first
    assert draw(8) != first
    assert [draw(seed) for seed in range(1, 401)] == SCENARIOS


def test_every_kind_of_fault_is_drawn() -> None:
    drawn = {type(fault) for scenario in SCENARIOS for fault in scenario.faults}
    assert {kind for kind in kinds() if kind.__name__[0] != "_"} == drawn


def test_every_failpoint_and_every_topology_is_drawn() -> None:
    assert {name for scenario in SCENARIOS for name in scenario.failpoints} == FAILPOINTS.keys()
    assert all(any(scenario.cluster.roles == roles for scenario in SCENARIOS) for roles, _ in TOPOLOGIES)


@pytest.mark.parametrize("seed", range(50))
def test_faults_strike_those_who_are_there_in_order_and_end(seed: int) -> None:
    drawn = draw_faults(random.Random(seed), VICTIMS, over_s=10.0, most=MAX_FAULTS)
    assert 1 <= len(drawn) <= MAX_FAULTS
    assert [fault.at_s for fault in drawn] == sorted(fault.at_s for fault in drawn)
    for fault in drawn:
        assert 0 <= fault.at_s <= 10.0
        assert 0 < fault.for_s < 20.0
        assert fault.what in fault.describe()
        victim = getattr(fault, "worker_id", "p0")
        assert victim in VICTIMS.worker_ids


def test_nothing_is_done_to_a_calm_cluster() -> None:
    for scenario in SCENARIOS:
        assert (scenario.weather is Weather.CALM) == (scenario.seed % CALM_IN == 0)
        is_untouched = not scenario.faults and not scenario.failpoints
        assert is_untouched == (scenario.weather is Weather.CALM)
        if scenario.weather is Weather.SURVIVABLE:
            assert (len(scenario.faults), scenario.failpoints) == (1, {})


def test_some_clients_of_calm_trials_leave_long_answers_early() -> None:
    num_long = 0
    for scenario in SCENARIOS:
        for ask in scenario.asks:
            if ask.sampling.max_tokens >= LONG_ANSWER_TOKENS:
                num_long += 1
                assert scenario.weather is Weather.CALM
                assert ask.cancel_after is not None
                assert 1 <= ask.cancel_after <= LONG_ANSWER_LEFT_WITHIN_TOKENS
                assert len(ask.token_ids) + ask.sampling.max_tokens <= scenario.cluster.max_context_tokens
    assert num_long > len(SCENARIOS) // CALM_IN
    asks = [ask for scenario in SCENARIOS if scenario.weather is Weather.CALM for ask in scenario.asks]
    assert num_long < len(asks) / 2


def test_the_work_is_bounded_and_fits_the_cluster() -> None:
    for scenario in SCENARIOS:
        cluster = scenario.cluster
        assert 0 < len(scenario.asks) <= 80
        assert [ask.at_s for ask in scenario.asks] == sorted(ask.at_s for ask in scenario.asks)
        assert 0 <= scenario.asks[0].at_s <= scenario.asks[-1].at_s <= LONGEST_WORKLOAD_S
        for ask in scenario.asks:
            longest = len(ask.token_ids) + ask.sampling.max_tokens
            assert longest <= cluster.num_blocks * cluster.block_tokens
        assert scenario.healed_s >= max(fault.at_s + fault.for_s for fault in (*scenario.faults, _nothing()))


def _nothing() -> Fault:
    return faults_module.CrashGateway(at_s=0.0, for_s=0.0)
