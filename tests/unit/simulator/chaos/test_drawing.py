"""What a seed draws: pure, all kinds of faults, and by weather what a trial may do to its cluster."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import get_args

import pytest

from contracts.config import EvictionPolicyName
from contracts.failpoints import FAILPOINTS
from contracts.requests import SamplingParams
from simulator.chaos import draw
from simulator.chaos import faults as faults_module
from simulator.chaos import operations as operations_module
from simulator.chaos import scaling as scaling_module
from simulator.chaos.drawing import Victims, draw_faults, draw_power_cut
from simulator.chaos.faults import (
    CrashWorker,
    CutLinks,
    Fault,
    FreezeWorker,
    HangWorker,
    OfNetwork,
    StickEngine,
    Strand,
)
from simulator.chaos.operations import MoveAbout
from simulator.chaos.scenario import (
    CALM_IN,
    LONG_ANSWER_LEFT_WITHIN_TOKENS,
    LONG_ANSWER_TOKENS,
    LONGEST_WORKLOAD_S,
    MAX_FAULTS,
    TOPOLOGIES,
    Weather,
)
from simulator.chaos.stores import MAX_RUSH, RUSH_S, STORE, draw_rush
from simulator.clients import Ask
from simulator.cluster import ClusterSpec

SCENARIOS = [draw(seed) for seed in range(1, 401)]
VICTIMS = Victims(
    worker_ids=("p0", "d0", "d1"),
    stores=("s0",),
    readers=("d0", "d1", "s0"),
    hosts=("p0", "d0", "d1", "s0", "coordinator", "gateway"),
)
WITH_STORES = [scenario for scenario in SCENARIOS if scenario.cluster.stores]


def kinds() -> set[type[Fault]]:
    """Every kind of fault that can strike."""
    modules = (faults_module, operations_module, scaling_module)
    found = [
        each
        for module in modules
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, Fault)
    ]
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
        assert victim in (VICTIMS.worker_ids if isinstance(fault, StickEngine) else VICTIMS.members)


def test_a_store_is_a_victim_of_whatever_a_worker_without_an_engine_can_be() -> None:
    drawn = [fault for seed in range(400) for fault in draw_faults(random.Random(seed), VICTIMS, over_s=9.0, most=8)]
    struck = {type(fault) for fault in drawn if getattr(fault, "worker_id", None) == "s0"}
    assert struck == {CrashWorker, FreezeWorker, HangWorker, Strand}
    assert any(isinstance(fault, CutLinks) and "s0" in (*fault.one, *fault.other) for fault in drawn)
    assert any(isinstance(fault, OfNetwork) and "s0" in fault.describe() for fault in drawn)


def test_some_trials_have_a_store_with_all_kinds_of_disks() -> None:
    assert len(SCENARIOS) / 4 < len(WITH_STORES) < len(SCENARIOS) / 2
    assert {scenario.weather for scenario in WITH_STORES} == set(Weather)
    disks = [scenario.cluster.store_disk for scenario in WITH_STORES]
    assert None in disks
    assert {bool(disk.damaged_chance) for disk in disks if disk is not None} == {True, False}
    assert {scenario.cluster.eviction for scenario in WITH_STORES} == set(get_args(EvictionPolicyName))
    lost = [scenario.faults[0] for scenario in WITH_STORES if scenario.weather is Weather.SURVIVABLE]
    assert {getattr(fault, "worker_id", "") == STORE for fault in lost} == {True, False}


def test_where_there_is_a_store_prompts_go_on_with_what_was_said() -> None:
    for scenario in WITH_STORES:
        asks = scenario.asks
        turns = [ask for ask in asks if any(goes_on(ask, other) for other in asks)]
        assert len(turns) >= len(asks) / 16 or len(asks) <= 8, scenario.seed


def goes_on(ask: Ask, other: Ask) -> bool:
    """Whether a prompt begins with the whole of another one, and is longer."""
    length = len(other.token_ids)
    return len(ask.token_ids) > length and ask.token_ids[:length] == other.token_ids


def test_a_power_cut_takes_everybodys_memory_and_some_come_back_at_once() -> None:
    cuts = [draw_power_cut(random.Random(seed), VICTIMS, over_s=10.0) for seed in range(50)]
    assert 20 < sum(map(bool, cuts)) < 50
    for cut in filter(None, cuts):
        assert [getattr(fault, "worker_id", "") for fault in cut] == list(VICTIMS.members)
        assert len({fault.at_s for fault in cut}) == 1
        assert 3.0 <= cut[0].at_s <= 7.0
    without = replace(VICTIMS, stores=())
    assert not any(draw_power_cut(random.Random(seed), without, over_s=10.0) for seed in range(50))


def test_a_rush_goes_on_with_one_chat_from_before_the_cut() -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=4)
    asks = tuple(Ask(at_s=number / 2, token_ids=(number, 1, 2), sampling=sampling) for number in range(12))
    cluster = ClusterSpec(roles={"p0": "prefill", "d0": "decode"})
    drawn = draw_rush(random.Random(1), asks, cluster, cut_s=3.0, until_s=5.0)
    assert len(drawn) == len(asks)
    assert [ask.at_s for ask in drawn] == sorted(ask.at_s for ask in drawn)
    rush = [ask for ask in drawn if len(ask.token_ids) > 3]
    assert 2 <= len(rush) <= MAX_RUSH
    (said,) = {ask.token_ids[:7] for ask in rush}
    assert said[:3] in {ask.token_ids for ask in asks if ask.at_s < 3.0}
    assert all(3.0 < ask.at_s <= 5.0 and ask.at_s - rush[0].at_s <= RUSH_S for ask in rush)
    assert draw_rush(random.Random(1), asks, cluster, cut_s=0.0, until_s=5.0) == asks, "nothing was said before"


def test_nothing_is_done_to_a_calm_cluster() -> None:
    for scenario in SCENARIOS:
        assert (scenario.weather is Weather.CALM) == (scenario.seed % CALM_IN == 0)
        # That its request moves is noticed by no client.
        faults = [fault for fault in scenario.faults if not isinstance(fault, MoveAbout)]
        is_untouched = not faults and not scenario.failpoints
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
        latest_s = LONGEST_WORKLOAD_S if cluster.elastic is None else scaling_module.LATEST_ASK_S
        assert 0 <= scenario.asks[0].at_s <= scenario.asks[-1].at_s <= latest_s
        for ask in scenario.asks:
            longest = len(ask.token_ids) + ask.sampling.max_tokens
            assert longest <= cluster.num_blocks * cluster.block_tokens
        assert scenario.healed_s >= max(fault.at_s + fault.for_s for fault in (*scenario.faults, _nothing()))


def _nothing() -> Fault:
    return faults_module.CrashGateway(at_s=0.0, for_s=0.0)
