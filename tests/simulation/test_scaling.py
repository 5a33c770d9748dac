"""The loop of scaling on virtual time, with starts that take their time: does it settle, and at what?"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.control_messages import FlipOperation, RemoveOperation, StartOperation
from contracts.ids import WorkerId
from coordinator.policy.lending import LendRules
from coordinator.policy.scaling_terms import ScaleRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from simulator import run
from tests.support.elastic import ElasticCluster

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from coordinator.policy.virtual_usage import UsageView
    from simulator import Program

RULES = ScaleRules(
    min_workers=1,
    max_workers=5,
    queue_delay_s=1.0,
    freeness_low=64.0,
    freeness_high=128.0,
    cooldown_up_s=4.0,
    cooldown_down_s=20.0,
    window_s=30.0,
    settle_s=1.0,
)
SETTINGS = AutoscaleSettings(
    interval_s=1.0,
    start_s=6.0,
    flip_s=2.0,
    pools=(
        ScaledPool(name="prefill", role="prefill", rules=RULES),
        ScaledPool(name="decode", role="decode", rules=RULES),
    ),
)


def with_cluster(
    body: Callable[[ElasticCluster], Awaitable[None]],
    settings: AutoscaleSettings = SETTINGS,
    initial: dict[str, int] | None = None,
    **times_s: float,
) -> ElasticCluster:
    async def main(program: Program) -> ElasticCluster:
        cluster = ElasticCluster(settings, {"prefill": 1, "decode": 1} if initial is None else initial, **times_s)
        async with cluster.scaler:
            await body(cluster)
        return cluster

    return run(main, seed=1)


def fixed(settings: AutoscaleSettings, **changes: object) -> AutoscaleSettings:
    """All pools with other rules."""
    return replace(
        settings,
        pools=tuple(replace(pool, rules=replace(pool.rules, **changes)) for pool in settings.pools),  # type: ignore[arg-type]
    )


def test_a_constant_load_is_met_and_left_alone() -> None:
    """Two prompts a second are one worker's time: two readers. 16 answers at once hold 640 blocks of 200 each: with
    room to grow four writers."""

    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(180.0, lambda _: 2.0)
        settled = len(cluster.begun)
        waits = len(cluster.waits_s)
        await cluster.serve(240.0, lambda _: 2.0)
        assert len(cluster.begun) == settled, cluster.told
        assert max(cluster.waits_s[waits:]) <= 2.0
        assert (cluster.count("prefill"), cluster.count("decode")) == (2, 4)

    with_cluster(body)


def test_a_burst_brings_no_more_than_it_needs_and_all_of_it_goes_again() -> None:
    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(60.0, lambda _: 0.5)
        calm = (cluster.count("prefill"), cluster.count("decode"))
        await cluster.serve(40.0, lambda _: 2.0)
        await cluster.serve(300.0, lambda _: 0.5)
        started = [operation for _, operation in cluster.begun if isinstance(operation, StartOperation)]
        removed = [operation for _, operation in cluster.begun if isinstance(operation, RemoveOperation)]
        # What the burst needs if it lasts is two readers and five writers.
        assert len(started) <= 6
        assert started
        assert removed
        assert (cluster.count("prefill"), cluster.count("decode")) == calm

    with_cluster(body)


def test_changes_of_one_pool_are_as_far_apart_as_the_rules_say() -> None:
    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(400.0, lambda at_s: 2.5 if int(at_s / 50.0) % 2 else 0.25)

    cluster = with_cluster(body)
    for pool in ("prefill", "decode"):
        times = {
            kind: [at_s for at_s, operation in cluster.begun if isinstance(operation, kind) and pool in str(operation)]
            for kind in (StartOperation, RemoveOperation)
        }
        for down_s in times[RemoveOperation]:
            assert all(not down_s - 20.0 < up_s <= down_s for up_s in times[StartOperation]), cluster.told
        for up_s in times[StartOperation]:
            assert all(not up_s - 4.0 < down_s <= up_s for down_s in times[RemoveOperation]), cluster.told


def test_following_the_load_takes_fewer_workers_than_its_peak_and_waits_stay_within_bounds() -> None:
    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(600.0, lambda at_s: 2.0 if 200.0 <= at_s < 300.0 else 0.4)

    elastic = with_cluster(body)
    peak = with_cluster(body, fixed(SETTINGS, min_workers=5), {"prefill": 5, "decode": 5})
    assert elastic.worker_s < 0.6 * peak.worker_s
    # One start, and what waited meanwhile.
    assert max(elastic.waits_s) <= 15.0
    assert sorted(elastic.waits_s)[int(0.9 * len(elastic.waits_s))] <= 2.0


def test_pools_go_to_zero_and_wake_for_the_first_request() -> None:
    settings = fixed(SETTINGS, min_workers=0, to_zero_after_s=30.0)

    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(10.0, lambda _: 0.0)
        assert not cluster.begun
        # One request for nobody.
        await cluster.serve(20.0, lambda at_s: 4.0 if at_s == 0.0 else 0.0)
        assert len(cluster.waits_s) == 1
        assert set(cluster.reworded) == {"waking"}
        assert cluster.waits_s[0] <= 2 * 6.0 + 3.0
        await cluster.serve(200.0, lambda _: 0.0)
        assert not cluster.workers
        removed = [operation for _, operation in cluster.begun if isinstance(operation, RemoveOperation)]
        assert removed
        # That nobody is left is what it is for.
        assert all(operation.force for operation in removed)

    with_cluster(body, settings, {})


def test_a_shift_of_the_load_flips_what_the_other_pool_can_spare() -> None:
    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(60.0, lambda _: 0.1)
        await cluster.serve(60.0, lambda _: 1.9)
        assert (cluster.count("prefill"), cluster.count("decode")) == (2, 2)

    initial = {"prefill": 1, "decode": 5}
    slow = with_cluster(body, SETTINGS, initial, start_s=60.0, answer_s=2.0)
    kinds = {type(operation) for _, operation in slow.begun}
    assert FlipOperation in kinds
    assert StartOperation not in kinds

    async def started(cluster: ElasticCluster) -> None:
        await cluster.serve(60.0, lambda _: 0.1)
        await cluster.serve(60.0, lambda _: 1.9)

    # Where a start is faster nobody is taken from anywhere.
    fast = with_cluster(started, SETTINGS, initial, start_s=1.0, answer_s=2.0)
    assert FlipOperation not in {type(operation) for _, operation in fast.begun}


def test_what_is_only_proposed_is_told_and_not_done() -> None:
    settings = replace(SETTINGS, mode="propose")

    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(60.0, lambda _: 2.0)

    cluster = with_cluster(body, settings)
    assert not cluster.begun
    assert any(line.startswith("proposed: pool decode: starts") for line in cluster.told)


def test_a_worker_is_lent_to_readers_and_comes_home() -> None:
    settings = replace(
        fixed(SETTINGS, min_workers=2, max_workers=2),
        lend_mode="apply",
        lend_rules=LendRules(queue_delay_high_s=2.0, queue_delay_low_s=0.5, min_stay_s=10.0, lend_as="other"),
    )

    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(30.0, lambda _: 5.0 if cluster.clock.now_s() < 25.0 else 0.2)
        assert cluster.count("prefill") == 3
        await cluster.serve(120.0, lambda _: 0.2)
        assert (cluster.count("prefill"), cluster.count("decode")) == (2, 2)

    cluster = with_cluster(body, settings, {"prefill": 2, "decode": 2}, answer_s=0.25)
    roles = [operation.role for _, operation in cluster.begun if isinstance(operation, FlipOperation)]
    assert roles == ["prefill", "decode"], cluster.told


@pytest.mark.parametrize("seed", [1, 2])
def test_two_runs_are_alike(seed: int) -> None:
    async def body(cluster: ElasticCluster) -> None:
        await cluster.serve(100.0, lambda at_s: 0.5 + seed * (at_s > 30.0))

    assert with_cluster(body).begun == with_cluster(body).begun


def test_a_worker_that_is_found_gone_in_the_middle_of_a_look_ends_nothing() -> None:
    """Who asks the members what they use may find that one has not been heard of for too long: it leaves the fleet."""
    gone = WorkerId("decode-0")

    async def body(cluster: ElasticCluster) -> None:
        cluster.scaler.look()
        usage = cluster.scaler._usage  # pyright: ignore[reportPrivateUsage]

        def usage_that_finds_it_gone() -> UsageView:
            if gone in cluster.workers:
                del cluster.workers[gone]
                cluster.conductor.remove(gone)
            return usage()

        cluster.scaler._usage = usage_that_finds_it_gone  # pyright: ignore[reportPrivateUsage]
        cluster.scaler.look()
        assert any(isinstance(operation, StartOperation) for _, operation in cluster.begun), cluster.told

    with_cluster(body, initial={"prefill": 1, "decode": 1})
