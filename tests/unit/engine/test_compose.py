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
