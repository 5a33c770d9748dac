"""Which prompts are computed, which wait and which are refused: properties of the pure decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.room import Demand, RoomView, fit
from prefill.admission import (
    LONGEST_RETRY_S,
    SHORTEST_RETRY_S,
    Handoffs,
    PrefillLimits,
    PromptVerdict,
    admit,
    queue_full,
    retry_after_s,
)
from tests.support.roles import BLOCK_TOKENS, IDENTITY

NUM_BLOCKS = 32
demands = st.builds(
    Demand, arrival_s=st.floats(0, 10), num_blocks=st.integers(1, NUM_BLOCKS), growth_blocks=st.integers(0, 8)
)
handoffs = st.builds(
    Handoffs,
    untaken_blocks=st.integers(0, NUM_BLOCKS),
    untaken_count=st.integers(0, 6),
    budget_blocks=st.integers(1, NUM_BLOCKS // 2),
    max_count=st.integers(1, 6),
    is_shared=st.booleans(),
)


@st.composite
def views(draw: st.DrawFn) -> RoomView:
    lent = draw(st.integers(0, NUM_BLOCKS // 2))
    return RoomView(
        num_blocks=NUM_BLOCKS,
        available_blocks=draw(st.integers(0, NUM_BLOCKS - lent)),
        num_admitted=draw(st.integers(0, 2)),
        promised_blocks=draw(st.integers(0, 20)),
        lent_blocks=lent,
        starving=draw(st.booleans()),
        offer=draw(st.none() | demands),
    )


@given(demand=demands, view=views(), budget=st.none() | handoffs)
def test_an_admitted_prompt_fits_and_passes_nobody(demand: Demand, view: RoomView, budget: Handoffs | None) -> None:
    if admit(demand, view, budget) is PromptVerdict.ADMIT:
        assert fit(demand, view).fits
        assert not view.starving
        assert view.offer is None or view.offer.arrival_s >= demand.arrival_s


@given(demand=demands, view=views(), budget=handoffs)
def test_the_budget_holds_after_every_admission(demand: Demand, view: RoomView, budget: Handoffs) -> None:
    if admit(demand, view, budget) is PromptVerdict.ADMIT:
        assert budget.untaken_blocks < budget.budget_blocks
        assert budget.untaken_count < budget.max_count
        assert not budget.is_shared or view.lent_blocks + demand.num_blocks <= budget.budget_blocks


@given(demand=demands, view=views(), budget=handoffs)
def test_once_all_is_taken_and_nothing_runs_every_prompt_of_the_budget_is_admitted(
    demand: Demand, view: RoomView, budget: Handoffs
) -> None:
    """The step of the proof that nobody starves: see docs/backpressure.md."""
    idle = replace(
        view, available_blocks=NUM_BLOCKS, num_admitted=0, promised_blocks=0, lent_blocks=0, starving=False, offer=None
    )
    taken = replace(budget, untaken_blocks=0, untaken_count=0)
    if not budget.is_shared or demand.num_blocks <= budget.budget_blocks:
        assert admit(demand, idle, taken) is PromptVerdict.ADMIT
    assert admit(demand, idle, None) is PromptVerdict.ADMIT


@given(
    waiting=st.integers(0, 20),
    tokens_each=st.integers(1, 100),
    num_tokens=st.integers(1, 5000),
    max_waiting=st.integers(1, 20),
    pools=st.floats(0.1, 20),
)
def test_the_queue_is_bounded_and_never_refuses_when_empty(
    waiting: int, tokens_each: int, num_tokens: int, max_waiting: int, pools: float
) -> None:
    problem = queue_full(
        PrefillLimits(max_waiting=max_waiting, max_waiting_pools=pools),
        IDENTITY.layout,
        num_blocks=NUM_BLOCKS,
        waiting=waiting,
        waiting_tokens=waiting * tokens_each,
        num_tokens=num_tokens,
    )
    if problem is None:
        assert waiting < max_waiting
        assert waiting == 0 or waiting * tokens_each + num_tokens <= pools * NUM_BLOCKS * BLOCK_TOKENS
    else:
        assert waiting > 0


@given(st.floats(0, 1000))
def test_a_refused_client_is_told_a_time_within_bounds(waited_s: float) -> None:
    assert SHORTEST_RETRY_S <= retry_after_s(waited_s) <= LONGEST_RETRY_S


@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_budget_with_which_two_workers_could_wait_for_each_other_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"handoff_share must be in \(0, 0.5\]"):
        PrefillLimits(handoff_share=share)
