"""On which machine a worker is started, by what node agents tell."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from coldstart.estimate import LoadHistory, MeasuredLoad
from contracts.control_messages import AgentBeat, WorkerSlot
from contracts.ids import Incarnation, WorkerId
from contracts.weight_messages import HeldWeights, MeasuredWeights, NodeWeights, WeightsInLine
from coordinator.agents import Agents
from coordinator.policy.start_places import ChosenStart, StartSite, choose
from coordinator.start_knowledge import StartKnowledge

if TYPE_CHECKING:
    from coldstart.estimate import Tier
    from contracts.control_messages import SlotState
    from contracts.weight_messages import WeightTier

GB = 10**9


def history(**bytes_per_s: float) -> LoadHistory:
    """Measured from ssd at the machine of that name; originals come at 0.1 GB/s everywhere."""
    made = LoadHistory({"dram": math.inf})
    for node, speed in bytes_per_s.items():
        for tier, seconds in (("ssd", GB / speed), ("remote", 10.0)):
            made.observe(load(node, tier, seconds))  # type: ignore[arg-type]
    return made


def load(node: str, tier: Tier, seconds: float) -> MeasuredLoad:
    return MeasuredLoad(node_id=node, tier=tier, num_bytes=GB, seconds=seconds, is_direct=True)


def site(node: str, tier: WeightTier, *in_line: WeightsInLine, slots: int = 1, num_bytes: int = 4 * GB) -> StartSite:
    held = HeldWeights(model="m", tier=tier, num_bytes=num_bytes)
    return StartSite(
        node=node,
        worker_ids=tuple(WorkerId(f"{node}-{number}") for number in range(slots)),
        weights=NodeWeights(held=(held,), in_line=in_line),
    )


def line(model: str, tier: WeightTier = "ssd", *, num_bytes: int = 4 * GB, done_bytes: int = 0) -> WeightsInLine:
    return WeightsInLine(models=(model,), tier=tier, num_bytes=num_bytes, done_bytes=done_bytes)


def test_memory_is_nearer_than_a_disk_and_a_disk_than_an_original() -> None:
    sites = [site("a", "remote"), site("b", "ssd"), site("c", "dram")]
    chosen = choose(sites, "m", history(a=2 * GB, b=2 * GB, c=2 * GB), 3, init_s=3.0)
    assert [(one.worker_id, one.takes_s) for one in chosen] == [("c-0", 3.0), ("b-0", 5.0), ("a-0", 43.0)]
    assert chosen[0].reason == "m from dram of c in 3.00 s; b 5.00 s from ssd; a 43.00 s from remote"
    assert chosen[2].reason.endswith("; c 3.00 s from dram, no slot; b 5.00 s from ssd, no slot")


def test_what_stands_in_line_at_a_disk_counts_whatever_it_is() -> None:
    known = history(a=2 * GB, b=1 * GB)
    free, slow = site("a", "ssd"), site("b", "ssd")
    assert choose([free, slow], "m", known, 1)[0].node == "a"
    busy = site("a", "ssd", line("x"), line("y", "remote", num_bytes=GB, done_bytes=GB // 2))
    (chosen,) = choose([busy, slow], "m", known, 1)
    assert (chosen.node, chosen.takes_s) == ("b", 4.0)
    assert "; a 9.00 s from ssd" in chosen.reason


def test_a_load_of_the_model_that_is_in_line_is_waited_for_and_not_one_behind_it() -> None:
    known = history(a=1 * GB, b=1 * GB)
    begun = site("a", "ssd", line("m", done_bytes=3 * GB), line("x"), line("y"), slots=2)
    chosen = choose([begun, site("b", "ssd")], "m", known, 3)
    assert [(one.worker_id, one.takes_s) for one in chosen] == [("a-0", 1.0), ("a-1", 1.0), ("b-0", 4.0)]
    behind = site("a", "ssd", line("x", num_bytes=GB), line("m", num_bytes=4 * GB))
    assert choose([behind], "m", known, 1)[0].takes_s == pytest.approx(5.0)


def test_an_original_counts_by_its_own_size() -> None:
    """In sixteen bits it is half of what is made of it."""
    sites = [site("a", "remote", num_bytes=2 * GB), site("b", "ssd", num_bytes=4 * GB)]
    first, second = choose(sites, "m", history(a=GB, b=GB), 2)
    assert (first.node, second.node) == ("b", "a")
    assert first.takes_s == pytest.approx(4.0)
    assert second.takes_s == pytest.approx(20.0)


def test_what_a_process_does_while_its_weights_come_is_not_waited_for_twice() -> None:
    known = history(a=GB, b=GB)
    sites = [site("a", "ssd"), site("b", "ssd", line("x", num_bytes=GB)), site("c", "dram")]
    for overlap_s, times in ((0.0, (3.0, 7.0, 8.0)), (1.0, (3.0, 6.0, 7.0)), (4.5, (3.0, 3.0, 3.5))):
        chosen = choose(sites, "m", known, 3, init_s=3.0, overlap_s=overlap_s)
        # Of those that are ready at once the one that loads less.
        assert [one.node for one in chosen] == ["c", "a", "b"]
        for one, expected_s in zip(chosen, times, strict=True):
            assert one.takes_s == pytest.approx(expected_s, abs=0.05)


def test_of_equals_the_first_by_name_and_all_slots_are_used_before_machines_that_do_not_tell() -> None:
    silent = StartSite(node="0", worker_ids=(WorkerId("s-0"), WorkerId("s-1")))
    chosen = choose([silent, site("b", "dram"), site("a", "dram")], "m", history(), 9)
    assert [one.worker_id for one in chosen] == ["a-0", "b-0", "s-0", "s-1"]
    assert [one.takes_s for one in chosen] == [0.0, 0.0, None, None]
    assert chosen[2].reason.startswith("in order: ")


def test_where_nothing_was_measured_slots_are_taken_in_order() -> None:
    sites = [site("b", "ssd", slots=2), site("a", "remote")]
    chosen = choose(sites, "m", LoadHistory({"dram": math.inf}), 3)
    assert [one.worker_id for one in chosen] == ["b-0", "b-1", "a-0"]
    assert chosen[0].reason == "in order: no node knows where to load m from"
    assert choose([], "m", history(), 2) == []
    (nobody,) = choose([StartSite(node="a", worker_ids=(WorkerId("a-0"),))], "m", history(), 1)
    assert choose([StartSite(node="a", worker_ids=(WorkerId("a-0"),))], "", history(), 1)[0].reason == ""
    assert nobody == ChosenStart(
        worker_id=WorkerId("a-0"), node="a", takes_s=None, reason="in order: nobody tells of m"
    )


# --- what is learned --------------------------------------------------------------------------------------


def slot(
    number: int,
    state: SlotState = "absent",
    *,
    life: int = 0,
    start_s: float | None = None,
    wait_s: float | None = None,
    due_s: float = 0.0,
) -> WorkerSlot:
    return WorkerSlot(
        worker_id=WorkerId(f"p-{number}"),
        pool="p",
        role="mixed",
        state=state,
        incarnation=Incarnation(life),
        start_s=start_s,
        weights_wait_s=wait_s,
        weights_due_s=due_s,
        model="m",
    )


class Office:
    """Agents of two machines, and what is learned of them."""

    def __init__(self) -> None:
        self.agents = Agents()
        self.starts = StartKnowledge(self.agents)

    def beat(
        self,
        node: str,
        tier: WeightTier | None,
        *measured: MeasuredWeights,
        slots: tuple[WorkerSlot, ...] = (),
        life: int = 1,
    ) -> int:
        weights = None
        if tier is not None:
            held = HeldWeights(model="m", tier=tier, num_bytes=2 * GB)
            weights = NodeWeights(held=(held,), measured=measured)
        beat = AgentBeat(node=node, incarnation=Incarnation(life), address=f"{node}:1", slots=slots, weights=weights)
        self.agents.beat(beat, 0.0)
        return self.starts.heard(beat)

    def next(self, *numbers: int) -> list[ChosenStart]:
        return self.starts.next_starts("p", [WorkerId(f"p-{number}") for number in numbers], len(numbers), 0.0)


def measured(number: int, seconds: float = 1.0, tier: WeightTier = "ssd") -> MeasuredWeights:
    return MeasuredWeights(number=number, tier=tier, num_bytes=GB, seconds=seconds, is_direct=True)


def test_each_measured_load_counts_once_however_often_it_is_told() -> None:
    office = Office()
    assert office.beat("a", "ssd") == 0
    for _ in range(3):
        assert office.beat("a", "ssd", measured(1), measured(2, 3.0)) == 2
    assert office.beat("a", "ssd", measured(2), measured(3)) == 3
    (row,) = office.starts.told(0.0)
    assert [(one.tier, one.num_loads, one.origin) for one in row.speeds] == [("ssd", 3, "measured")]
    # Another life of the agent counts anew.
    assert office.beat("a", "ssd", measured(1), life=2) == 1
    assert office.starts.told(0.0)[0].speeds[0].num_loads == 4


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan])
def test_a_measurement_that_makes_no_sense_is_none(seconds: float) -> None:
    office = Office()
    assert office.beat("a", "ssd", measured(1, seconds)) == 1
    assert office.starts.told(0.0)[0].speeds == ()


def test_a_start_takes_its_load_and_what_the_pools_starts_took_beside_their_weights() -> None:
    office = Office()
    office.beat("a", "ssd", measured(1), slots=(slot(0), slot(1)))
    office.beat("b", "dram", slots=(slot(8, "ready", life=5, start_s=7.0, wait_s=4.0), slot(9)), life=2)
    assert [(one.worker_id, one.takes_s) for one in office.next(0, 9)] == [("p-9", None), ("p-0", None)]
    assert office.next(0)[0].reason == "m from ssd of a in 2.00 s (weights alone)"
    assert office.starts.takes_s("p", [WorkerId("p-0")], 0.0) is None
    office.starts.started(slot(8, "ready", life=5, start_s=7.0, wait_s=4.0))
    assert [(one.worker_id, one.takes_s) for one in office.next(0, 9)] == [("p-9", 3.0), ("p-0", 5.0)]
    assert office.starts.takes_s("p", [WorkerId("p-0"), WorkerId("p-1")], 0.0) == 5.0
    assert office.starts.takes_s("p", [], 0.0) is None


def test_what_goes_on_while_weights_come_is_learned_too() -> None:
    """Two seconds of imports, weights after five, one second more."""
    office = Office()
    office.beat("a", "ssd", measured(1, 2.5), slots=(slot(0),))
    office.starts.started(slot(8, life=1, start_s=6.0, wait_s=3.0, due_s=2.0))
    assert office.starts.takes_s("p", [WorkerId("p-0")], 0.0) == pytest.approx(6.0, abs=0.05)
    office.beat("a", "dram", slots=(slot(0),))
    assert office.starts.takes_s("p", [WorkerId("p-0")], 0.0) == 3.0


def test_how_far_estimates_are_off_is_learned_from_starts_that_were_begun() -> None:
    office = Office()
    office.beat("a", "ssd", measured(1), slots=(slot(0, life=3),))
    office.starts.started(slot(8, life=1, start_s=4.0, wait_s=1.0))
    assert office.starts.spread_s("p") == 0.0
    (chosen,) = office.next(0)
    office.starts.expect(chosen, 0.0)
    assert office.starts.expected_s() == {"p-0": 5.0}
    office.starts.started(slot(0, "ready", life=4, start_s=6.5, wait_s=3.0))
    assert office.starts.spread_s("p") == 1.5
    assert office.starts.expected_s() == {}


def test_a_worker_that_read_its_weights_itself_or_an_agent_that_does_not_tell_teaches_nothing() -> None:
    office = Office()
    office.beat("a", None, slots=(slot(0),))
    office.starts.started(slot(0, "ready", life=1, start_s=4.0))
    (chosen,) = office.next(0)
    assert (chosen.takes_s, chosen.reason) == (None, "in order: nobody tells of m")
    assert office.starts.told(0.0) == ()
