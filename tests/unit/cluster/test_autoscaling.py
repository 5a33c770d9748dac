"""From the configuration to scaling, over rpc to what `tandem autoscale` prints."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.autoscaling import autoscale_settings, autoscaler
from cluster.scale_report import dry_run_lines, lines
from coldstart.keep_alive import KeepRules
from contracts.config import ClusterConfig
from contracts.config_loader import load_config
from contracts.control_messages import AGENT_BEAT, AgentBeat, WorkerSlot
from contracts.ids import GatewayId, Incarnation, WorkerId
from contracts.messages import (
    DISPATCH,
    HEARTBEAT,
    MEMBERS,
    REGISTER,
    DispatchRequest,
    Empty,
    HeartbeatRequest,
    Rejection,
    TtftTally,
    WorkerLoad,
)
from contracts.scale_messages import SCALING, ScalingReply
from contracts.weight_messages import HeldWeights, MeasuredWeights, NodeWeights
from coordinator import CoordinatorShell
from rpc import MemoryNetwork
from simulator import VirtualClock, run
from tests.support.conductors import info_of, item_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from contracts.control_messages import SlotState
    from contracts.messages import CoordinatorFigures, Placement
    from contracts.weight_messages import WeightTier
    from simulator import Program

ROOT = Path(__file__).parents[3]


def config_of(*pools: Mapping[str, object], **sections: object) -> ClusterConfig:
    return ClusterConfig.model_validate({"pools": list(pools), **sections})


READING = {"name": "reading", "role": "prefill", "workers": {"max": 3}, "scale": {"cooldown_s": "20s", "window_s": 10}}
WRITING = {"name": "writing", "role": "decode", "workers": {"max": 3}, "scale": {"cooldown_s": "20s", "window_s": 10}}
EMPTY_POOL = {"name": "all", "role": "mixed", "workers": {"min": 0, "max": 2}, "scale": {"to_zero_after_s": "30s"}}


def test_rules_follow_from_pools_and_targets() -> None:
    config = config_of(
        {**READING, "scale": {"cooldown_s": "2min", "max_step_up": 2, "flip": False}},
        {**WRITING, "workers": 2},
        slo={"chat": {"ttft_ms": 500, "tpot_ms": 50}, "batch": {"ttft_ms": 60_000, "tpot_ms": 500}},
        coordinator={"autoscale": {"mode": "propose", "start_s": "3s"}, "lend": {"mode": "apply", "memory_low": 0.5}},
    )
    settings = autoscale_settings(config)
    reading, writing = settings.pools
    rules = reading.rules
    assert (rules.min_workers, rules.max_workers, rules.cooldown_down_s, rules.max_step_up) == (1, 3, 120.0, 2)
    assert (rules.queue_delay_s, rules.flip) == (0.25, False)
    assert (reading.is_scaled, writing.is_scaled, settings.is_on) == (True, False, True)
    assert (settings.mode, settings.start_s, settings.tpot_s) == ("propose", 3.0, 0.05)
    assert (settings.lend_mode, settings.lend_rules.memory_low) == ("apply", 0.5)


def test_how_long_an_idle_pool_is_kept_follows_from_its_scale() -> None:
    scale = {"keep_alive": "cost_aware", "keep_min_times": 3, "keep_price": 0.5, "keep_bin_s": "30s"}
    config = config_of({**EMPTY_POOL, "kv_memory": "1GiB", "scale": scale}, {**WRITING, "workers": 1})
    kept, fixed = autoscale_settings(config, weight_bytes=2**31).pools
    assert kept.rules.keep == KeepRules(way="cost_aware", min_times=3, wait_s_per_gib_s=0.5)
    assert (kept.rules.keep_bin_s, kept.worker_bytes) == (30.0, 3 * 2**30)
    assert fixed.rules.keep is None


def test_nothing_looks_where_pools_are_fixed() -> None:
    assert not autoscale_settings(ClusterConfig()).is_on
    assert autoscale_settings(load_config(ROOT / "configs" / "elastic.yaml", {}, {}).config).is_on
    assert not autoscale_settings(config_of(EMPTY_POOL, coordinator={"autoscale": {"mode": "off"}})).is_on


class Office:
    """A coordinator that hears of agents and workers, which obey nobody."""

    def __init__(self, config: ClusterConfig) -> None:
        self.clock = VirtualClock()
        self.network = MemoryNetwork(rng=random.Random(1), host="c")
        self.told: list[str] = []
        self.shell = CoordinatorShell(self.clock, network=self.network, log=self.told.append)
        scaler = autoscaler(config, self.shell, self.clock, self.told.append)
        assert scaler is not None
        self.scaler = scaler
        self.channel = self.network.channel("c:1")

    async def beat(self, *slots: tuple[str, str, SlotState]) -> None:
        beat = AgentBeat(
            node="n",
            incarnation=Incarnation(1),
            address="agent:1",
            slots=tuple(
                WorkerSlot(
                    worker_id=WorkerId(f"{pool}-{number}"),
                    pool=pool,
                    role=role,  # type: ignore[arg-type]
                    state=state,
                )
                for number, (pool, role, state) in enumerate(slots)
            ),
        )
        await self.channel.call(AGENT_BEAT, beat, timeout_s=1.0)

    async def worker(self, name: str, role: str, load: WorkerLoad) -> None:
        info = info_of(name, role=role)  # type: ignore[arg-type]
        await self.channel.call(REGISTER, info, timeout_s=1.0)
        await self.told_by(name, load)

    async def told_by(self, name: str, load: WorkerLoad) -> None:
        beat = HeartbeatRequest(worker_id=WorkerId(name), incarnation=Incarnation(1), load=load)
        await self.channel.call(HEARTBEAT, beat, timeout_s=1.0)

    async def scaling(self) -> ScalingReply:
        return await self.channel.call(SCALING, Empty(), timeout_s=1.0)

    async def ask(self, *outcomes: TtftTally) -> Placement | Rejection:
        reply = await self.channel.call(
            DISPATCH, DispatchRequest(gateway_id=GatewayId("g"), items=(item_of(),), outcomes=outcomes), timeout_s=1.0
        )
        return reply.verdicts[0]

    async def figures(self) -> CoordinatorFigures:
        reply = await self.channel.call(MEMBERS, Empty(), timeout_s=1.0)
        assert reply.coordinator is not None
        return reply.coordinator


def with_office(config: ClusterConfig, body: Callable[[Office], Awaitable[None]]) -> None:
    async def main(program: Program) -> None:
        office = Office(config)
        server = office.network.server("c:1")
        office.shell.register_on(server)
        office.scaler.register_on(server)
        async with office.shell, office.scaler:
            await server.start()
            await body(office)

    run(main, seed=1)


FULL = WorkerLoad(free_blocks=10, owned_blocks=990, queued_demand_blocks=500, preempted_answers=3, open_requests=9)
IDLE = WorkerLoad(free_blocks=1000)


def test_a_dry_run_says_what_would_be_done_and_why_and_does_nothing() -> None:
    async def body(office: Office) -> None:
        for _ in range(4):
            await office.beat(
                ("reading", "prefill", "ready"), ("writing", "decode", "ready"), ("writing", "decode", "absent")
            )
            await office.worker("reading-0", "prefill", IDLE)
            await office.worker("writing-1", "decode", FULL)
            await office.clock.sleep(1.0)
        # Between two looks, and after the cooldown of the last proposal.
        await office.clock.sleep(0.3)
        reply = await office.scaling()
        again = await office.scaling()
        assert again.pools == reply.pools
        text = "\n".join(dry_run_lines(reply))
        assert text.startswith("scaling is proposed, not done")
        assert "writing (decode, 1 to 3): 1 ready, 0 coming; wanted 2; a start takes 20.0 s" in text
        assert "  would start 1\n  demand: starts 1" in text
        assert "memory 1." in text
        assert "reading (prefill, 1 to 3): 1 ready, 0 coming; wanted 1" in text
        assert not office.shell.operations or not office.shell.operations.machine.num_running
        # The looks proposed it, too.
        assert any(line.startswith("proposed: pool writing: starts 1") for line in office.told)
        assert any("proposed: pool writing" in line for line in lines(reply))
        pools = {pool.pool: pool for pool in (await office.figures()).pools}
        assert (pools["writing"].ready, pools["writing"].coming) == (1, 0)
        assert sum(pools["writing"].decisions_total.values()) >= 3

    fast = {"mode": "propose", "interval_s": 0.5}
    writing = {**WRITING, "scale": {"cooldown_up_s": 0.1}}
    with_office(config_of(READING, writing, coordinator={"autoscale": fast}), body)


def test_a_request_that_finds_an_empty_pool_is_told_to_wait_and_a_worker_is_started() -> None:
    async def body(office: Office) -> None:
        # Nobody could be started: it is refused as ever.
        await office.clock.sleep(1.0)
        verdict = await office.ask()
        assert isinstance(verdict, Rejection)
        assert verdict.reason == "no_prefill"
        await office.beat(("all", "mixed", "absent"), ("all", "mixed", "absent"))
        await office.clock.sleep(1.0)
        verdict = await office.ask()
        assert isinstance(verdict, Rejection)
        assert (verdict.reason, verdict.code, verdict.retry_after_s) == ("waking", "not_ready", 20.0)
        assert office.shell.operations is not None
        (status,) = office.shell.operations.machine.statuses(office.clock.now_s())
        assert msgspec.to_builtins(status.operation) == {"type": "start", "worker_id": "all-0"}
        assert status.by == "autoscaler"

    with_office(config_of(EMPTY_POOL), body)


def test_outcomes_are_counted_once_workers_are_warm() -> None:
    async def body(office: Office) -> None:
        await office.worker("reading-0", "prefill", IDLE)
        await office.worker("writing-0", "decode", IDLE)
        await office.clock.sleep(2.5)
        history = office.scaler.watch.pools["reading"].history
        await office.ask(TtftTally("chat", 0, 10, 10))
        assert history.seen(office.clock.now_s()).attainment is None
        for _ in range(20):
            await office.told_by("reading-0", IDLE)
            await office.told_by("writing-0", IDLE)
            await office.clock.sleep(1.0)
        await office.ask(TtftTally("chat", 0, 10, 1))
        assert history.seen(office.clock.now_s()).attainment == 0.9

    with_office(config_of(READING, WRITING), body)


def test_pools_of_a_fixed_size_are_left_out_of_a_dry_run() -> None:
    async def body(office: Office) -> None:
        await asyncio.sleep(0)
        text = "\n".join(dry_run_lines(await office.scaling()))
        assert text == "scaling is on; no pool has a range of workers (pools.NAME.workers: {min: 1, max: 4})"

    with_office(ClusterConfig(), body)


def test_a_worker_is_started_where_its_weights_are_and_who_waits_is_told_how_long_that_takes() -> None:
    async def beat(office: Office, node: str, first: int, tier: WeightTier, *seen_s: float) -> None:
        """`seen_s`: a start that was seen there, and what of it was waiting for 2 GB from that disk."""
        told = NodeWeights(
            held=(HeldWeights(model="demo", tier=tier, num_bytes=2 * 10**9),),
            measured=tuple(
                MeasuredWeights(number=1, tier="ssd", num_bytes=2 * 10**9, seconds=wait_s, is_direct=True)
                for wait_s in seen_s[1:]
            ),
        )
        slots = tuple(
            WorkerSlot(
                worker_id=WorkerId(f"all-{first + number}"),
                pool="all",
                role="mixed",
                state="stopped",
                incarnation=Incarnation(1),
                start_s=seen_s[0] if seen_s and number == 0 else None,
                weights_wait_s=seen_s[1] if seen_s and number == 0 else None,
                model="demo",
            )
            for number in range(2)
        )
        ask = AgentBeat(node=node, incarnation=Incarnation(1 + first), address=f"{node}:1", slots=slots, weights=told)
        await office.channel.call(AGENT_BEAT, ask, timeout_s=1.0)

    async def body(office: Office) -> None:
        await beat(office, "far", 0, "ssd", 9.0, 5.0)
        await beat(office, "near", 8, "dram")
        await office.clock.sleep(2.5)
        reply = await office.scaling()
        text = "\n".join(dry_run_lines(reply))
        assert "  next start: all-8: demo from dram of near in 4.00 s; far 9.00 s from ssd" in text
        assert "  far   demo in ssd (1907.3 MiB); from ssd 0.40 GB/s (measured, 1 loads)" in text
        assert "  near  demo in dram (1907.3 MiB); from ssd 0.40 GB/s (fleet, 1 loads)" in text
        assert reply.pools[0].expected_start_s == 4.0
        # The mean of what was seen.
        assert reply.pools[0].start_s == 9.0
        verdict = await office.ask()
        assert isinstance(verdict, Rejection)
        assert (verdict.reason, verdict.retry_after_s) == ("waking", 4.0)
        assert office.shell.operations is not None
        (status,) = office.shell.operations.machine.statuses(office.clock.now_s())
        assert msgspec.to_builtins(status.operation) == {"type": "start", "worker_id": "all-8"}
        assert any(
            "pool all: starts 1 (4.0 s" in line and line.endswith("near in 4.00 s; far 9.00 s from ssd")
            for line in office.told
        ), office.told

    with_office(config_of(EMPTY_POOL), body)
