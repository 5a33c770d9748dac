"""Drawn chats have the rate, the turns and the system prompts that were asked for; flattened they keep their order."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload import Constant, Fixed, LogNormal, Poisson, SloClass, WorkloadRequest, prefix_reuse
from workload.chats import Chat, ChatTurn
from workload.drawn_chats import ChatShape, SystemPrompts, draw_chats
from workload.flatten import BLOCK_TOKENS, flatten

SLOS = {"default": SloClass("default", 500.0, 100.0), "slow": SloClass("slow", 5000.0, 1000.0)}
LENGTHS = LogNormal.from_mean(60, 1.0, 500)


def drawn(
    num_requests: int | None = 200,
    *,
    duration_s: float | None = None,
    rate_rps: float = 2.0,
    mean_turns: float = 3.0,
    max_turns: int = 8,
    seed: int = 0,
) -> list[Chat]:
    return list(
        draw_chats(
            arrivals=Poisson(rate_rps),
            prompts=LENGTHS,
            outputs=LENGTHS,
            shape=ChatShape(mean_turns=mean_turns, max_turns=max_turns, mean_think_s=10.0),
            seed=seed,
            num_requests=num_requests,
            duration_s=duration_s,
            system_prompts=SystemPrompts(count=3, tokens=100),
            slo_mix={"default": 3.0, "slow": 1.0},
        )
    )


def test_prompts_hold_all_that_was_said_before() -> None:
    chat = Chat(0.0, (ChatTurn(10, 5), ChatTurn(20, 7), ChatTurn(1, 1)), system_prompt_tokens=100)
    assert chat.prompt_tokens() == (110, 135, 143)


@given(st.floats(min_value=1, max_value=20), st.integers(min_value=20, max_value=60))
def test_the_probability_to_go_on_gives_the_mean(mean_turns: float, max_turns: int) -> None:
    goes_on = ChatShape(mean_turns=mean_turns, max_turns=max_turns).goes_on
    reaches = [goes_on**turn for turn in range(max_turns)]
    assert sum(reaches) == pytest.approx(mean_turns)


@pytest.mark.parametrize(("mean_turns", "max_turns"), [(1.0, 5), (2.5, 4), (6.0, 6), (3.0, 100)])
def test_turns_have_their_mean_and_their_limit(mean_turns: float, max_turns: int) -> None:
    turns = [len(chat.turns) for chat in drawn(20_000, mean_turns=mean_turns, max_turns=max_turns)]
    assert max(turns) <= max_turns
    assert mean(turns) == pytest.approx(mean_turns, rel=0.05)


def test_requests_come_at_the_rate_asked_for() -> None:
    chats = drawn(None, duration_s=10_000.0)
    assert sum(len(chat.turns) for chat in chats) / 10_000 == pytest.approx(2.0, rel=0.05)
    due = [request.arrival_s for request in flatten(chats, SLOS)]
    assert sum(2000 <= due_s < 8000 for due_s in due) / 6000 == pytest.approx(2.0, rel=0.05)


def test_thinking_system_prompts_and_classes_are_as_asked_for() -> None:
    chats = drawn(20_000)
    thought = [turn.think_s for chat in chats for turn in chat.turns[1:]]
    assert mean(thought) == pytest.approx(10.0, rel=0.05)
    assert all(chat.turns[0].think_s == 0 for chat in chats)
    prompts = Counter(chat.system_prompt for chat in chats)
    assert set(prompts) == {0, 1, 2}
    assert prompts[0] / prompts[2] == pytest.approx(3.0, rel=0.15)
    assert {chat.system_prompt_tokens for chat in chats} == {100}
    classes = Counter(chat.slo_class for chat in chats)
    assert classes["default"] / classes["slow"] == pytest.approx(3.0, rel=0.15)


def test_another_rate_asks_the_same() -> None:
    slow, fast = drawn(rate_rps=1.0), drawn(rate_rps=10.0)
    assert [chat[1:] for chat in slow] == [chat[1:] for chat in fast]
    assert [chat.arrival_s for chat in fast] == pytest.approx([chat.arrival_s / 10 for chat in slow])
    assert drawn() == drawn() != drawn(seed=1)


@given(st.integers(min_value=1, max_value=60))
def test_requests_are_as_many_as_asked_for(num_requests: int) -> None:
    chats = drawn(num_requests)
    assert sum(len(chat.turns) for chat in chats) == num_requests
    longer = drawn(num_requests + 1)
    assert chats[:-1] == longer[: len(chats) - 1]
    assert chats[-1].turns == longer[len(chats) - 1].turns[: len(chats[-1].turns)]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="mean_turns must be between 1 and max_turns 4, got 5"):
        ChatShape(mean_turns=5, max_turns=4)
    with pytest.raises(ValueError, match="max_turns must be between 1 and 1000, got 0"):
        ChatShape(mean_turns=1, max_turns=0)
    with pytest.raises(ValueError, match="mean_think_s must be finite and >= 0, got -1"):
        ChatShape(mean_turns=1, mean_think_s=-1)
    with pytest.raises(ValueError, match="count must be at most 100,000, got 1000000"):
        SystemPrompts(count=1_000_000, tokens=1)
    with pytest.raises(ValueError, match="needs num_requests or duration_s"):
        drawn(None)


def test_turns_follow_answers_that_just_meet_their_targets() -> None:
    first = Chat(1.0, (ChatTurn(20, 11), ChatTurn(5, 1, 2.0), ChatTurn(5, 1, 3.0)))
    second = Chat(2.0, (ChatTurn(7, 2), ChatTurn(9, 2, 0.5)), slo_class="slow")
    flat = list(flatten([first, second], SLOS))
    # 500 ms + 10 x 100 ms for the first answer, 500 ms for the second; 5 s + 1 s in the slow class.
    assert [(each.arrival_s, each.prompt_tokens, each.output_tokens, each.slo_class) for each in flat] == [
        (1.0, 20, 11, "default"),
        (2.0, 7, 2, "slow"),
        (4.5, 36, 1, "default"),
        (8.0, 42, 1, "default"),
        (8.5, 18, 2, "slow"),
    ]


def test_flattened_chats_share_system_prompts_and_what_was_said() -> None:
    told = (ChatTurn(20, 28), ChatTurn(5, 3))
    one, other, alone = (Chat(float(n), told, n // 2, 32) for n in range(3))
    first, second, third, again, *_ = flatten([one, other, alone], SLOS)
    assert [len(each.hash_ids) for each in (first, again)] == [4, 6]
    assert first.hash_ids[:2] == second.hash_ids[:2]
    assert not set(first.hash_ids[2:]) & set(second.hash_ids)
    assert not set(first.hash_ids) & set(third.hash_ids)
    # 52 of its 85 prompt tokens stand in the first prompt: three full blocks of them.
    assert again.hash_ids[:3] == first.hash_ids[:3]
    assert again.hash_ids[3] != first.hash_ids[3]


@given(st.integers())
def test_flattened_requests_are_whole_and_in_order(seed: int) -> None:
    chats = drawn(40, seed=seed)
    flat = list(flatten(chats, SLOS))
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in pairwise(flat))
    assert Counter(each.prompt_tokens for each in flat) == Counter(
        tokens for chat in chats for tokens in chat.prompt_tokens()
    )
    for each in flat:
        assert len(each.hash_ids) == -(-each.prompt_tokens // BLOCK_TOKENS)
        assert each.hash_block_tokens == BLOCK_TOKENS


def test_a_cache_finds_in_flattened_chats_what_was_said_before() -> None:
    chats = list(
        draw_chats(
            arrivals=Constant(1.0),
            prompts=Fixed(16),
            outputs=Fixed(32),
            shape=ChatShape(mean_turns=4, max_turns=4),
            seed=0,
            num_requests=40,
        )
    )
    reuse = prefix_reuse(flatten(chats, SLOS))
    # Prompts of 16, 64, 112 and 160 tokens, of which the prompt before is found, but not its answer.
    assert reuse.hit_tokens == 10 * (16 + 64 + 112)
    assert reuse.prompt_tokens == 10 * (16 + 64 + 112 + 160)


def test_flattening_reads_no_further_than_it_must() -> None:
    endless = (Chat(float(number), (ChatTurn(1, 1),)) for number in iter(int, None))
    first = next(iter(flatten(endless, SLOS)))
    assert first == WorkloadRequest(0.0, 1, 1, (0,), BLOCK_TOKENS)
