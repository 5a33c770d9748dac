"""Which offers get blocks: properties of the pure decision, and the two cases that keep two workers from waiting
for each other."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from decode.admission import LONGEST_RETRY_S, SHORTEST_RETRY_S, OfferVerdict, admit, may_resume, retry_after_s
from engine.room import Demand, RoomView, fit

NUM_BLOCKS = 32
demands = st.builds(
    Demand, arrival_s=st.floats(0, 10), num_blocks=st.integers(1, NUM_BLOCKS), growth_blocks=st.integers(0, 8)
)


@st.composite
def views(draw: st.DrawFn) -> RoomView:
    lent = draw(st.integers(0, NUM_BLOCKS))
    return RoomView(
        num_blocks=NUM_BLOCKS,
        available_blocks=draw(st.integers(0, NUM_BLOCKS - lent)),
        num_admitted=draw(st.integers(0, 2)),
        promised_blocks=draw(st.integers(0, 20)),
        lent_blocks=lent,
        starving=draw(st.booleans()),
        prompt=draw(st.none() | demands),
    )


@given(demand=demands, view=views())
def test_nothing_is_reserved_that_does_not_fit(demand: Demand, view: RoomView) -> None:
    if admit(demand, view) is OfferVerdict.RESERVE:
        assert fit(demand, view).fits


@given(demand=demands, view=views())
def test_what_is_held_up_by_others_waits_for_this_workers_own_work_only(demand: Demand, view: RoomView) -> None:
    verdict = admit(demand, view)
    if verdict is OfferVerdict.STARVING:
        assert view.starving
        assert view.lent_blocks == 0
    if verdict is OfferVerdict.OLDER_PROMPT:
        assert view.prompt is not None
        assert view.prompt.arrival_s < demand.arrival_s
        assert not view.starving, "a starving worker admits no prompt: to wait for one would be for ever"
        assert view.prompt.num_blocks <= view.own_blocks


@given(demand=demands, view=views())
def test_a_worker_where_nothing_runs_takes_every_offer_that_its_own_blocks_hold(demand: Demand, view: RoomView) -> None:
    """The step of the proof that there is no deadlock: see docs/backpressure.md."""
    idle = replace(view, available_blocks=view.own_blocks, num_admitted=0, promised_blocks=0, prompt=None)
    if demand.num_blocks <= idle.own_blocks and (idle.lent_blocks or not idle.starving):
        assert admit(demand, idle) is OfferVerdict.RESERVE


@given(demand=demands, view=views())
def test_a_preempted_answer_comes_back_once_the_worker_is_its_own(demand: Demand, view: RoomView) -> None:
    alone = replace(view, available_blocks=NUM_BLOCKS, num_admitted=0, promised_blocks=0, lent_blocks=0, starving=True)
    assert may_resume(demand, alone)
    if may_resume(demand, view):
        assert fit(demand, view).fits


def test_an_answer_does_not_come_back_to_be_preempted_for_every_block_that_it_grows() -> None:
    demand = Demand(arrival_s=0.0, num_blocks=10, growth_blocks=4)
    view = RoomView(num_blocks=32, available_blocks=12, lent_blocks=16, starving=True)
    assert not may_resume(demand, view)
    assert may_resume(demand, replace(view, available_blocks=14))
    assert may_resume(demand, replace(view, lent_blocks=0))


@given(waited_s=st.floats(0, 1000), ttl_s=st.floats(0.1, 60))
def test_a_refused_holder_asks_again_within_its_term(waited_s: float, ttl_s: float) -> None:
    assert min(SHORTEST_RETRY_S, ttl_s / 4) <= retry_after_s(waited_s, ttl_s) <= min(LONGEST_RETRY_S, ttl_s / 4)
