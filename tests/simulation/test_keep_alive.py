"""A model that is asked for now and then, on virtual time: it is let go of, and there again before the next request."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from coldstart.keep_alive import KeepRules
from contracts.control_messages import RemoveOperation, StartOperation
from coordinator.holding import Room
from coordinator.policy.scaling_terms import ScaleRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from simulator import Program, run
from tests.support.elastic import ElasticCluster

EVERY_S = 120.0
VISITS = 14
RULES = ScaleRules(
    min_workers=0,
    max_workers=1,
    cooldown_up_s=1.0,
    cooldown_down_s=5.0,
    window_s=10.0,
    settle_s=1.0,
    keep=KeepRules(way="histogram", min_times=6),
    keep_bin_s=5.0,
)


def visited(rules: ScaleRules) -> ElasticCluster:
    """Three requests at the begin of each two minutes."""
    settings = AutoscaleSettings(
        interval_s=1.0, start_s=6.0, pools=(ScaledPool(name="all", role="mixed", rules=rules),)
    )

    async def main(program: Program) -> ElasticCluster:
        cluster = ElasticCluster(settings, {"all": 0}, start_s=6.0, answer_s=2.0)
        async with cluster.scaler:
            await cluster.serve(VISITS * EVERY_S, lambda at_s: 1.0 if at_s % EVERY_S < 3.0 else 0.0)
        return cluster

    return run(main, seed=1)


def num_starts(cluster: ElasticCluster) -> int:
    return sum(isinstance(operation, StartOperation) for _, operation in cluster.begun)


def test_by_histogram_a_model_is_away_most_of_the_time_and_nobody_waits_for_it_any_more() -> None:
    cluster = visited(RULES)
    # Until six pauses were seen it stays; after each later visit it goes and comes by itself.
    assert 2 * 3 <= num_starts(cluster) <= VISITS
    assert any("all: starts 1" in line and "idle for" in line for line in cluster.told), cluster.told
    assert max(cluster.waits_s[:3]) > 5.0
    assert max(cluster.waits_s[3:]) < 3.0, cluster.waits_s
    held = visited(replace(RULES, keep=KeepRules(way="lru")))
    assert num_starts(held) == 1
    assert cluster.worker_s < 0.75 * held.worker_s, (cluster.worker_s, held.worker_s)


def test_a_fixed_time_that_is_too_short_has_every_visit_wait() -> None:
    fixed = visited(replace(RULES, keep=None, to_zero_after_s=20.0))
    assert num_starts(fixed) == VISITS
    assert sum(wait_s > 5.0 for wait_s in fixed.waits_s) >= VISITS


def test_where_memory_is_for_one_the_other_makes_room_and_nobody_is_refused() -> None:
    """Two coordinators, each with a model that stays until its memory is needed."""
    room = Room(2**30)
    rules = replace(RULES, keep=KeepRules(way="lru"), cooldown_down_s=500.0)
    most = 0

    async def main(program: Program) -> list[ElasticCluster]:
        def made(name: str) -> ElasticCluster:
            pool = ScaledPool(name=name, role="mixed", rules=rules, worker_bytes=2**30)
            settings = AutoscaleSettings(interval_s=1.0, start_s=6.0, pools=(pool,))
            return ElasticCluster(settings, {name: 0}, room, start_s=6.0, answer_s=2.0)

        day, night = made("day"), made("night")

        def asked(begin_s: float, at_s: float) -> float:
            nonlocal most
            most = max(most, len(day.workers) + len(night.workers))
            return 1.0 if begin_s <= at_s < begin_s + 3.0 else 0.0

        async with day.scaler, night.scaler:
            await asyncio.gather(
                day.serve(240.0, lambda at_s: asked(0.0, at_s) + asked(160.0, at_s)),
                night.serve(240.0, lambda at_s: asked(80.0, at_s)),
            )
        return [day, night]

    day, night = run(main, seed=1)
    assert most == 1
    assert [len(cluster.waits_s) for cluster in (day, night)] == [6, 3]
    # The other's leaving, and a start.
    assert max(*day.waits_s, *night.waits_s) < 12.0, (day.waits_s, night.waits_s)
    kinds = [(type(operation), at_s) for at_s, operation in day.begun]
    assert [kind for kind, _ in kinds] == [StartOperation, RemoveOperation, StartOperation]
    assert 80.0 <= kinds[1][1] < 90.0
    assert any("night: no_room" in line for line in night.told), night.told
    assert any("room for night" in line and "idle for" in line for line in day.told), day.told


def test_two_models_of_two_pools_with_room_for_one_do_not_each_hold_half_of_it() -> None:
    """Both are asked for while others have the memory, which becomes free in two parts, the second just before the
    model looks that came later."""
    room = Room(2 * 2**30)
    rules = replace(RULES, keep=KeepRules(way="lru"), cooldown_down_s=500.0)

    async def main(program: Program) -> list[ElasticCluster]:
        def made(name: str) -> ElasticCluster:
            pools = tuple(
                ScaledPool(name=f"{name}-{role}", role=role, rules=rules, worker_bytes=2**30)
                for role in ("prefill", "decode")
            )
            settings = AutoscaleSettings(interval_s=1.0, start_s=6.0, pools=pools)
            return ElasticCluster(settings, {}, room, start_s=6.0, answer_s=2.0)

        clusters = [made("day"), made("night")]
        for number in range(2):
            room.tell(f"busy-{number}", 2**30, None)
            asyncio.get_running_loop().call_later(10.2 * (number + 1), room.tell, f"busy-{number}", 0, None)

        async def serve(cluster: ElasticCluster, after_s: float) -> None:
            await asyncio.sleep(after_s)
            async with cluster.scaler:
                await cluster.serve(120.0, lambda at_s: 1.0 if at_s < 3.0 else 0.0)

        await asyncio.gather(*(serve(cluster, 0.5 * number) for number, cluster in enumerate(clusters)))
        return clusters

    clusters = run(main, seed=1)
    assert [len(cluster.waits_s) for cluster in clusters] == [3, 3], "all were answered"
    # The one that came first, as soon as there was room for both of its pools; then it is idle, and goes.
    assert 20.4 - 3.0 < max(clusters[0].waits_s) < 20.4 + 6.0 + 3.0
