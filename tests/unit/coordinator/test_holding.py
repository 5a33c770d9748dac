"""How long pools keep their last worker, in the words of scaling; and who makes room for whom."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from coldstart.keep_alive import KeepRules, Way
from contracts.ids import WorkerId
from coordinator.holding import LONGEST_FIRST_S, PoolHold, Room
from coordinator.policy.room_moves import RoomPlan, WorkerMove
from coordinator.policy.scaling import decide
from coordinator.policy.scaling_terms import Hold, Look, PoolView, PoolWorker, ScaleMemory, ScaleRules, StartingWorker
from coordinator.pool_views import ScaledPool, needed_together

if TYPE_CHECKING:
    from contracts.messages import Role

GIB = 2**30
RULES = ScaleRules(min_workers=0, max_workers=2, keep=KeepRules(way="histogram", min_times=4), keep_bin_s=10.0)
POOL = ScaledPool(name="night", role="mixed", rules=RULES, worker_bytes=GIB)
RESTED = ScaleMemory(first_look_s=-1e6, up_s=-1e6, down_s=-1e6)


def hold(way: Way, *idle_s: float, price: float = 1e-4) -> PoolHold:
    keep = KeepRules(way=way, min_times=4, wait_s_per_gib_s=price)
    made = PoolHold(replace(POOL, rules=replace(RULES, keep=keep)), resolution_s=4.0)
    for each in idle_s:
        made.came(each)
    return made


def kind(made: PoolHold, idle_s: float, *, num_workers: int, reload_s: float = 5.0) -> str:
    decision = made.decide(made.held(num_workers=num_workers, reload_s=reload_s, idle_s=idle_s, now_s=1e4), 1e4)
    assert decision is not None
    return decision.kind


# --- when ----------------------------------------------------------------------------------------------


def test_a_pool_that_is_asked_for_every_ten_minutes_is_let_go_of_and_warmed() -> None:
    made = hold("histogram", *[605.0] * 8)
    # Away until 600 s less a margin and the start, there until 610 and a margin.
    found = {idle_s: kind(made, idle_s, num_workers=1) for idle_s in (1.0, 5.0, 530.0, 540.0, 670.0, 672.0)}
    assert found == {1.0: "keep", 5.0: "release", 530.0: "release", 540.0: "keep", 670.0: "keep", 672.0: "release"}
    found = {idle_s: kind(made, idle_s, num_workers=0) for idle_s in (5.0, 530.0, 540.0, 672.0)}
    assert found == {5.0: "release", 530.0: "release", 540.0: "warm", 672.0: "release"}


def test_pauses_that_cannot_be_told_from_requests_that_overlap_do_not_count() -> None:
    made = hold("histogram", *[0.5] * 100, *[605.0] * 8)
    assert kind(made, 5.0, num_workers=1) == "release"


def test_nobody_is_warmed_who_was_never_there() -> None:
    for way in ("histogram", "lru", "cost_aware"):
        assert kind(hold(way), 60.0, num_workers=0) == "release"


def test_what_costs_more_than_it_saves_goes() -> None:
    spread = [10.0 * number + 5.0 for number in range(8)]
    cheap, dear = hold("cost_aware", *spread, price=1e-6), hold("cost_aware", *spread, price=10.0)
    assert (kind(cheap, 30.0, num_workers=1), kind(dear, 30.0, num_workers=1)) == ("keep", "release")


def test_fixed_is_left_to_the_rules() -> None:
    made = PoolHold(replace(POOL, rules=replace(RULES, keep=None)), resolution_s=4.0)
    assert made.decide(made.held(num_workers=1, reload_s=5.0, idle_s=1e5, now_s=1e6), 1e6) is None


# --- what scaling makes of it --------------------------------------------------------------------------

HERE = (PoolWorker(worker_id="night-0", memory_tokens=1e4),)


def view(workers: tuple[PoolWorker, ...] = (), **figures: object) -> PoolView:
    return replace(PoolView(pool="night", num_startable=2, start_s=5.0, idle_s=50.0), workers=workers, **figures)  # type: ignore[arg-type]


def test_held_released_and_warmed() -> None:
    released, _ = decide(view(HERE, hold=Hold("release", "because")), RULES, 0.0, RESTED)
    assert (released.why, released.remove) == ("idle", ("night-0",))
    assert "because" in released.reason
    kept, _ = decide(view(HERE, hold=Hold("keep", "so")), RULES, 0.0, RESTED)
    assert kept.kind == "keep"
    warmed, memory = decide(view(hold=Hold("warm", "soon")), RULES, 0.0, RESTED)
    assert (warmed.kind, warmed.why, warmed.num_starts) == ("up", "prewarm", 1)
    assert warmed.reason.startswith("starts 1")
    assert "idle for 50 s (soon)" in warmed.reason
    # Once let go of, what came before calls for nobody.
    late = replace(RESTED, looks=(Look(-2.0, 0.4, 0.4),))
    assert decide(view(hold=Hold("release", "because"), arrivals=9, work_rate=0.3), RULES, 0.0, late)[0].kind == "keep"
    coming = view(hold=Hold("warm", "soon"), starting=(StartingWorker(worker_id="s", age_s=1.0, takes_s=5.0),))
    assert decide(coming, RULES, 1.0, memory)[0].kind == "keep"


def test_whoever_waits_is_not_sent_away_and_no_cooldown_holds_up_who_is_asked_for_room() -> None:
    waits = view(HERE, hold=Hold("release", "because"), unserved_requests=1)
    assert decide(waits, RULES, 0.0, RESTED)[0].kind == "keep"
    fresh = replace(RESTED, up_s=-1.0)
    assert decide(view(HERE, hold=Hold("release", "idle")), RULES, 0.0, fresh)[0].why == "cooldown"
    urgent = view(HERE, hold=Hold("release", "room", is_urgent=True))
    assert decide(urgent, RULES, 0.0, fresh)[0].why == "idle"


def test_nobody_is_started_where_there_is_no_memory() -> None:
    full = view(unserved_requests=1, fits=0)
    decision, _ = decide(full, RULES, 0.0, RESTED)
    assert (decision.kind, decision.why, decision.wanted) == ("keep", "no_room", 1)
    assert decide(replace(full, fits=1), RULES, 0.0, RESTED)[0].num_starts == 1


@pytest.mark.parametrize("wrong", [{"min_workers": 1}, {"to_zero_after_s": 5.0}])
def test_rules_that_contradict_each_other_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="keep needs min_workers = 0, and no to_zero_after_s"):
        replace(RULES, **wrong)  # type: ignore[arg-type]


# --- room ----------------------------------------------------------------------------------------------


def room(*idle_s: float, busy: int = 0) -> Room:
    """Of 4 GiB each pool here has one; `busy` ones cannot go."""
    made = Room(4 * GIB)
    for number, each in enumerate(idle_s):
        own = PoolHold(replace(POOL, name=f"p{number}"), 4.0)
        made.tell(f"p{number}", GIB, own.held(num_workers=1, reload_s=5.0, idle_s=each, now_s=1000.0))
    for number in range(busy):
        made.tell(f"b{number}", GIB, None)
    return made


def test_the_one_makes_room_that_was_used_longest_ago() -> None:
    made = room(50.0, 300.0, 100.0, busy=1)
    assert made.fits("new", GIB) == 0
    assert made.ask("new", GIB, 1000.0) == ("p1",)
    wanted = made.wanted_from("p1", 1001.0)
    assert wanted is not None
    assert (wanted.kind, wanted.is_urgent) == ("release", True)
    assert wanted.reason.startswith("room for new: 1.00 GiB are needed; idle for 300 s")
    assert made.wanted_from("p0", 1001.0) is None
    # Who needed it may have gone.
    assert made.wanted_from("p1", 1100.0) is None
    # It left.
    made.tell("p1", 0, None)
    assert (made.fits("new", GIB), made.wanted_from("p1", 1002.0), made.ask("new", GIB, 1002.0)) == (1, None, ())


def test_nobody_goes_in_vain() -> None:
    made = room(50.0, busy=3)
    assert made.ask("new", 2 * GIB, 1000.0) == ()
    assert made.wanted_from("p0", 1000.0) is None


def test_where_nobody_counts_everything_fits() -> None:
    assert Room().fits("new", GIB) is None
    assert Room().ask("new", GIB, 0.0) == ()
    # What is not known to take memory takes none.
    assert room(1.0).fits("new", 0) is None


# --- who is asked for and has nobody ---------------------------------------------------------------------


def pair(name: str, num_bytes: int = GIB) -> dict[str, int]:
    return {f"{name}-prefill": num_bytes, f"{name}-decode": num_bytes}


def fitting(made: Room, name: str) -> list[int | None]:
    return [made.fits(pool, GIB) for pool in pair(name)]


def test_a_model_has_room_for_all_that_it_needs_or_for_nothing() -> None:
    made = room(busy=3)
    made.line_up("day", pair("day"), 0.0)
    assert fitting(made, "day") == [0, 0], "one of them alone would wait for the other for ever"
    made.tell("b0", 0, None)
    # Each leaves the other's part.
    assert fitting(made, "day") == [1, 1]
    made.tell("b1", 0, None)
    assert fitting(made, "day") == [2, 2]
    # Who has the one is promised the other.
    made.tell("day-prefill", GIB, None)
    made.line_up("day", {"day-decode": GIB}, 1.0)
    made.tell("b3", GIB, None)
    assert (made.fits("night-prefill", GIB), made.fits("day-decode", GIB)) == (0, 1)


def test_models_have_it_in_the_order_in_which_they_were_asked_for() -> None:
    made = room(busy=1)
    for now_s, name in enumerate(("day", "night")):
        made.line_up(name, pair(name), float(now_s))
    assert fitting(made, "day") == [2, 2]
    assert fitting(made, "night") == [0, 0], "3 GiB are free, and 2 are promised"
    assert made.fits("other", GIB) == 0
    made.line_up("day", {}, 2.0)
    assert fitting(made, "night") == [2, 2]
    # Who does not come again for what was promised is forgotten.
    made.line_up("day", pair("day"), 17.0)
    assert fitting(made, "day") == [2, 2]


def test_who_stands_first_in_vain_lets_others_go_first() -> None:
    made = room(busy=3)
    for now_s in range(0, int(LONGEST_FIRST_S), 10):
        made.line_up("day", pair("day"), float(now_s))
        made.line_up("night", {"night-all": GIB}, float(now_s))
        assert made.fits("night-all", GIB) == 0
    made.line_up("day", pair("day"), LONGEST_FIRST_S)
    assert made.fits("night-all", GIB) == 1


def test_a_model_that_can_never_have_room_is_in_nobodys_way() -> None:
    made = room(busy=3)
    made.line_up("huge", pair("huge", 3 * GIB), 0.0)
    assert made.fits("other", GIB) == 1
    assert made.fits("huge-prefill", 3 * GIB) == 0


def test_idle_models_make_room_for_all_that_is_needed_together() -> None:
    made = room(50.0, 300.0, busy=1)
    made.line_up("day", pair("day"), 1000.0)
    # 1 GiB is free.
    assert made.ask("day-prefill", GIB, 1000.0) == ("p1",)
    made.tell("b1", GIB, None)
    assert made.ask("day-decode", GIB, 1000.0) == ("p1", "p0")


@pytest.mark.parametrize(
    ("present", "absent", "expected"),
    [
        ("", "PD", "PD"),
        ("P", "D", "D"),
        ("PD", "M", ""),
        ("", "PDM", "M"),
        ("D", "PM", "P"),
        ("", "PP", ""),
        ("M", "PD", ""),
    ],
)
def test_what_is_needed_is_the_fewest_pools_that_can_serve(present: str, absent: str, expected: str) -> None:
    roles: dict[str, Role] = {"P": "prefill", "D": "decode", "M": "mixed"}

    def pools(letters: str) -> list[ScaledPool]:
        return [replace(POOL, name=letter, role=roles[letter]) for letter in letters]

    assert "".join(pool.name for pool in needed_together(pools(present), pools(absent))) == expected


# --- machines ------------------------------------------------------------------------------------------


def test_each_machine_has_a_memory_of_its_own() -> None:
    room = Room(2 * GIB, "here")
    assert room.at("") is room.at("here") is room
    there = room.at("there")
    assert there is room.at("there")
    there.budget_bytes = GIB
    room.tell("night", 2 * GIB, None)
    assert (room.fits("x", GIB), there.fits("x", GIB), room.at("else").fits("x", GIB)) == (0, 1, None)
    assert [(one.node, one.free_bytes) for one in room.rooms()] == [("here", 0), ("there", GIB), ("else", None)]


def test_a_plan_lets_pools_go_and_tells_each_pool_its_move_once_and_in_time() -> None:
    room = Room()
    move = WorkerMove("day", WorkerId("day-0"), WorkerId("day-1"))
    for one in (room, room.at("a")):
        one.tell("idle", GIB if one.node == "a" else 0, None)
    room.want(RoomPlan(node="a", release=("idle",), moves=(move,), reason="because"), "night", 10.0)
    for one in (room, room.at("a")):
        one.tell("idle", GIB if one.node == "a" else 0, None)
    assert room.wanted_from("idle", 11.0) is None
    assert room.at("a").wanted_from("idle", 11.0) == Hold("release", "room for night: because", is_urgent=True)
    assert room.move_of("night", 11.0) is None
    assert room.move_of("day", 11.0) == (move, "room for night on a: because")
    assert room.move_of("day", 11.0) is None
    room.want(RoomPlan(node="a", release=(), moves=(move,), reason="because"), "night", 20.0)
    # Whoever needed it may be gone.
    assert room.move_of("day", 40.0) is None
