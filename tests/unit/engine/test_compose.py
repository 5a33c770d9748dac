"""Properties of the batch composition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engine.compose import Candidate, Grant, GrantReason, StepBudget, compose

_ARRIVALS = st.integers(0, 5)


@st.composite
def _queues(draw: st.DrawFn) -> tuple[list[Candidate], list[Candidate]]:
    ids = draw(st.lists(st.integers(0, 100), max_size=20, unique=True))
    num_decodes = draw(st.integers(0, len(ids)))
    decodes = [Candidate(sequence_id=each, num_tokens=1, arrival=draw(_ARRIVALS)) for each in ids[:num_decodes]]
    chunks = [
        Candidate(
            sequence_id=each,
            num_tokens=draw(st.integers(1, 40)),
            arrival=draw(_ARRIVALS),
            started=draw(st.booleans()),
        )
        for each in ids[num_decodes:]
    ]
    return decodes, chunks


_BUDGETS = st.builds(StepBudget, max_tokens=st.integers(1, 60), max_sequences=st.integers(1, 12))


@given(_queues(), _BUDGETS)
def test_the_budget_is_never_exceeded(queues: tuple[list[Candidate], list[Candidate]], budget: StepBudget) -> None:
    grants = compose(*queues, budget)
    assert sum(grant.num_tokens for grant in grants) <= budget.max_tokens
    assert len(grants) <= budget.max_sequences
    assert len({grant.sequence_id for grant in grants}) == len(grants)


@given(_queues(), _BUDGETS)
def test_decodes_never_wait_for_prompts(queues: tuple[list[Candidate], list[Candidate]], budget: StepBudget) -> None:
    grants = compose(*queues, budget)
    decoding = sum(grant.reason is GrantReason.DECODE for grant in grants)
    assert decoding == min(len(queues[0]), budget.max_tokens, budget.max_sequences)


@given(_queues(), _BUDGETS)
def test_nobody_is_passed_within_a_class(queues: tuple[list[Candidate], list[Candidate]], budget: StepBudget) -> None:
    """Whoever waits arrived no earlier than everyone granted of its class; only the last chunk is partial."""
    by_id = {each.sequence_id: each for each in (*queues[0], *queues[1])}
    grants = compose(*queues, budget)
    granted = {grant.sequence_id for grant in grants}
    for grant in grants:
        served = by_id[grant.sequence_id]
        peers = queues[0] if grant.reason is GrantReason.DECODE else queues[1]
        for other in peers:
            if other.sequence_id not in granted and other.started == served.started:
                assert (served.arrival, served.sequence_id) < (other.arrival, other.sequence_id)
    assert all(grant.num_tokens == by_id[grant.sequence_id].num_tokens for grant in grants[:-1])


@given(_queues(), _BUDGETS)
def test_the_budget_is_used_while_somebody_waits(
    queues: tuple[list[Candidate], list[Candidate]], budget: StepBudget
) -> None:
    grants = compose(*queues, budget)
    tokens = sum(grant.num_tokens for grant in grants)
    everything = sum(each.num_tokens for each in (*queues[0], *queues[1]))
    full = tokens == budget.max_tokens or len(grants) == budget.max_sequences
    assert full or tokens == everything


def test_order_and_reasons() -> None:
    decodes = [Candidate(sequence_id=5, num_tokens=1, arrival=9.0)]
    chunks = [
        Candidate(sequence_id=1, num_tokens=10, arrival=1.0),
        Candidate(sequence_id=2, num_tokens=30, arrival=2.0, started=True),
        Candidate(sequence_id=3, num_tokens=10, arrival=3.0),
    ]
    assert compose(decodes, chunks, StepBudget(max_tokens=45, max_sequences=8)) == (
        Grant(sequence_id=5, num_tokens=1, reason=GrantReason.DECODE),
        Grant(sequence_id=2, num_tokens=30, reason=GrantReason.CONTINUE),
        Grant(sequence_id=1, num_tokens=10, reason=GrantReason.ADMIT),
        Grant(sequence_id=3, num_tokens=4, reason=GrantReason.ADMIT),
    )


@given(st.integers(1, 3000), st.integers(1, 600), st.integers(0, 20))
def test_a_prompt_takes_as_many_steps_as_its_tokens_need(length: int, max_tokens: int, decodes: int) -> None:
    """Sarathi's bound: no step holds more than the budget, however long the prompt."""
    budget = StepBudget(max_tokens=max_tokens + decodes, max_sequences=100)
    running = [Candidate(sequence_id=1 + each, num_tokens=1, arrival=0) for each in range(decodes)]
    remaining, steps = length, 0
    while remaining:
        prompt = Candidate(sequence_id=0, num_tokens=remaining, arrival=0, started=steps > 0)
        grants = compose(running, [prompt], budget)
        assert len(grants) == decodes + 1
        remaining -= grants[-1].num_tokens
        steps += 1
    assert steps == -(-length // max_tokens)


def _new(*num_tokens: int) -> list[Candidate]:
    return [Candidate(sequence_id=each, num_tokens=tokens, arrival=each) for each, tokens in enumerate(num_tokens)]


def _granted(decodes: list[Candidate], chunks: list[Candidate], budget: StepBudget) -> list[tuple[int, int]]:
    return [(grant.sequence_id, grant.num_tokens) for grant in compose(decodes, chunks, budget)]


def test_new_prompts_share_a_step_up_to_saturation_and_a_longer_one_has_its_own() -> None:
    budget = StepBudget(max_tokens=100, max_sequences=8, saturation_tokens=30)
    assert _granted([], _new(10, 20, 5), budget) == [(0, 10), (1, 20)]
    assert _granted([], _new(10, 21, 5), budget) == [(0, 10)], "nobody is passed by a later arrival"
    assert _granted([], _new(70, 5), budget) == [(0, 70)]
    assert _granted([], _new(170, 5), budget) == [(0, 100)], "longer ones are cut as ever"


def test_saturation_counts_prompts_only_and_what_began_goes_on() -> None:
    budget = StepBudget(max_tokens=100, max_sequences=80, saturation_tokens=30)
    decodes = [Candidate(sequence_id=50 + each, num_tokens=1, arrival=0) for each in range(25)]
    begun = [Candidate(sequence_id=90 + each, num_tokens=20, arrival=each, started=True) for each in range(2)]
    assert _granted(decodes, _new(10, 20, 1), budget)[25:] == [(0, 10), (1, 20)]
    assert _granted([], [*begun, *_new(5)], budget) == [(90, 20), (91, 20)]
    assert _granted([], [*begun[:1], *_new(10, 1)], budget) == [(90, 20), (0, 10)]


@given(_queues(), _BUDGETS, st.integers(1, 60))
def test_saturation_only_ever_leaves_new_prompts_out(
    queues: tuple[list[Candidate], list[Candidate]], budget: StepBudget, saturation_tokens: int
) -> None:
    limits = StepBudget(
        max_tokens=budget.max_tokens, max_sequences=budget.max_sequences, saturation_tokens=saturation_tokens
    )
    without, grants = compose(*queues, budget), compose(*queues, limits)
    assert grants == without[: len(grants)]
    assert all(grant.reason is GrantReason.ADMIT for grant in without[len(grants) :])
    assert bool(grants) == bool(without)
    prompts = [grant for grant in grants if grant.reason is not GrantReason.DECODE]
    shares = len(prompts) > 1 and prompts[-1].reason is GrantReason.ADMIT
    assert not shares or sum(grant.num_tokens for grant in prompts) <= saturation_tokens
