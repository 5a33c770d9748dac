"""Two models, two machines, and memory for one worker on the first: a busy worker moves away for another model's."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from coldstart.keep_alive import KeepRules
from contracts.control_messages import AgentBeat, MoveOperation, StartOperation
from contracts.ids import Incarnation
from contracts.weight_messages import HeldWeights, MeasuredWeights, NodeWeights
from coordinator.agents import Agents
from coordinator.holding import Room
from coordinator.policy.scaling_terms import ScaleRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from coordinator.start_knowledge import StartKnowledge
from simulator import Program, run
from tests.support.elastic import ElasticCluster

if TYPE_CHECKING:
    from collections.abc import Callable

GIB = 2**30
RULES = ScaleRules(
    min_workers=0,
    max_workers=1,
    cooldown_up_s=1.0,
    cooldown_down_s=500.0,
    window_s=10.0,
    settle_s=1.0,
    keep=KeepRules(way="lru"),
)
BEAT_S = 0.5


class Cell:
    """A model with its coordinator. Its slots are on the machines in turn, as many as there are."""

    def __init__(self, name: str, machines: dict[str, int | None], room: Room) -> None:
        self.agents = Agents()
        self.machines = machines
        self.starts = StartKnowledge(self.agents)
        pool = ScaledPool(name=name, role="mixed", rules=RULES, worker_bytes=GIB)
        settings = AutoscaleSettings(interval_s=1.0, start_s=6.0, pools=(pool,))
        self.cluster = ElasticCluster(settings, {name: 0}, room, len(machines), self.starts, start_s=6.0, answer_s=2.0)

    async def beat(self) -> None:
        while True:
            for number, (node, budget_bytes) in enumerate(self.machines.items()):
                slot = self.cluster.slots()[number]
                load = MeasuredWeights(number=1, tier="ssd", num_bytes=GIB, seconds=1.0, is_direct=True)
                told = AgentBeat(
                    node=node,
                    incarnation=Incarnation(number + 1),
                    address=f"{node}:1",
                    slots=(msgspec.structs.replace(slot, model=slot.pool),),
                    weights=NodeWeights(
                        held=(HeldWeights(model=slot.pool, tier="ssd", num_bytes=GIB // 2),), measured=(load,)
                    ),
                    workers_memory_bytes=budget_bytes,
                )
                self.agents.beat(told, self.cluster.clock.now_s())
                self.starts.heard(told)
            await asyncio.sleep(BEAT_S)

    def on(self, node: str) -> int:
        """Workers there."""
        numbers = dict(enumerate(self.machines))
        return sum(numbers[int(name.rpartition("-")[2])] == node for name in self.cluster.workers)


def both(machines: dict[str, int | None], night_rps: Callable[[float], float]) -> tuple[Cell, Cell, Counter[str]]:
    """A day model that is asked all the time and may run on all machines, and a night model that can on the first
    alone. With them, at most how many workers each machine had at once."""
    most: Counter[str] = Counter()

    async def main(program: Program) -> tuple[Cell, Cell]:
        room = Room()
        day, night = Cell("day", machines, room), Cell("night", dict(list(machines.items())[:1]), room)

        def watched(rate: float) -> float:
            for node in machines:
                most[node] = max(most[node], day.on(node) + (night.on(node) if node in night.machines else 0))
            return rate

        beating = [asyncio.create_task(cell.beat()) for cell in (day, night)]
        async with day.cluster.scaler, night.cluster.scaler:
            await asyncio.gather(
                day.cluster.serve(120.0, lambda _: watched(1.0)),
                night.cluster.serve(120.0, lambda at_s: watched(night_rps(at_s))),
            )
        for task in beating:
            task.cancel()
        await asyncio.gather(*beating, return_exceptions=True)
        return day, night

    day, night = run(main, seed=1)
    return day, night, most


def test_a_busy_worker_moves_to_another_machine_for_a_model_that_can_run_nowhere_else() -> None:
    day, night, most = both({"a": GIB, "b": None}, lambda at_s: 1.0 if 40.0 <= at_s < 60.0 else 0.0)
    begun = [type(operation) for _, operation in day.cluster.begun]
    assert begun == [StartOperation, MoveOperation], day.cluster.begun
    ((moved_s, move),) = [one for one in day.cluster.begun if isinstance(one[1], MoveOperation)]
    assert isinstance(move, MoveOperation)
    assert (move.worker_id, move.to) == ("day-0", "day-1")
    assert 40.0 < moved_s < 45.0
    assert [type(operation) for _, operation in night.cluster.begun] == [StartOperation]
    # Never two in the memory of one.
    assert most == {"a": 1, "b": 1}
    assert (day.on("a"), day.on("b"), night.on("a")) == (0, 1, 1)
    # Its clients notice nothing; the others wait for the move and a start.
    assert max(day.cluster.waits_s[10:]) < 2.0
    assert len(night.cluster.waits_s) == 20
    assert max(night.cluster.waits_s) < 25.0
    assert any("room is made on a: night from ssd of a in " in line for line in night.cluster.told)
    assert any("day-0 moves to day-1: room for night on a: " in line for line in day.cluster.told)


def test_where_nobody_can_move_the_model_waits_until_the_other_one_is_idle() -> None:
    day, night, most = both({"a": GIB}, lambda at_s: 1.0 if 40.0 <= at_s < 60.0 else 0.0)
    assert [type(operation) for _, operation in day.cluster.begun] == [StartOperation]
    assert night.cluster.begun == []
    assert most == {"a": 1}
    assert any("no_room" in line for line in night.cluster.told)
