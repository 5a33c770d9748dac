"""Transformations keep what they do not name, and count what they take away."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.support.traces import trace_path
from workload import (
    ContextClip,
    WorkloadRequest,
    at_rate,
    at_speed,
    mean_rate_rps,
    prefix_reuse,
    read_trace,
    repeat,
    window,
)
from workload.chats import Chat, ChatTurn
from workload.prompts import PromptMaker
from workload.transform import scaled_block_tokens, scaled_lengths, spread_ties


@st.composite
def workloads(draw: st.DrawFn) -> list[WorkloadRequest]:
    times = sorted(draw(st.lists(st.floats(min_value=0, max_value=1e5), min_size=2, max_size=20)))
    requests: list[WorkloadRequest] = []
    for arrival_s in times:
        prompt_tokens = draw(st.integers(min_value=1, max_value=200))
        first_id = draw(st.integers(min_value=0, max_value=3))
        hash_ids = tuple(range(first_id, first_id + -(-prompt_tokens // 16)))
        output_tokens = draw(st.integers(min_value=1, max_value=200))
        requests.append(WorkloadRequest(arrival_s, prompt_tokens, output_tokens, hash_ids, 16))
    assume(times[-1] - times[0] > 1e-3)
    return requests


SPEEDS = st.floats(min_value=1e-3, max_value=1e3)


@given(workloads(), SPEEDS)
def test_speed_is_undone_by_its_inverse(requests: list[WorkloadRequest], speed: float) -> None:
    faster = list(at_speed(requests, speed))
    assert [each[1:] for each in faster] == [each[1:] for each in requests]
    for back, request in zip(at_speed(faster, 1 / speed), requests, strict=True):
        assert back.arrival_s == pytest.approx(request.arrival_s)


@given(workloads(), SPEEDS)
def test_a_target_rate_is_met(requests: list[WorkloadRequest], rate_rps: float) -> None:
    assert mean_rate_rps(list(at_rate(requests, rate_rps))) == pytest.approx(rate_rps)


@given(workloads(), st.floats(min_value=0, max_value=1e5), st.floats(min_value=0, max_value=1e5))
def test_two_windows_that_meet_are_one(requests: list[WorkloadRequest], first_s: float, second_s: float) -> None:
    middle_s, end_s = sorted((first_s, second_s))
    assume(0 < middle_s < end_s)
    early, late = list(window(requests, 0, middle_s)), list(window(requests, middle_s, end_s))
    both = list(window(requests, 0, end_s))
    assert [each[1:] for each in early + late] == [each[1:] for each in both]
    assert all(0 <= each.arrival_s <= end_s - middle_s for each in late)


def test_a_window_counts_from_its_start_and_reads_no_further() -> None:
    def requests() -> list[WorkloadRequest]:
        return [WorkloadRequest(float(second), 1, 1) for second in range(10)]

    assert [each.arrival_s for each in window(requests(), 3, 6)] == [0, 1, 2]
    rest = iter(requests())
    list(window(rest, 0, 2))
    assert next(rest).arrival_s == 3


@given(workloads(), st.booleans())
def test_rounds_follow_each_other(requests: list[WorkloadRequest], fresh_prefixes: bool) -> None:
    round_s = requests[-1].arrival_s + 1 / mean_rate_rps(requests)
    repeated = list(repeat(requests, 2.5 * round_s, fresh_prefixes=fresh_prefixes))
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in pairwise(repeated))
    assert repeated[-1].arrival_s < 2.5 * round_s
    for number in range(2):
        for request, original in zip(repeated[number * len(requests) :], requests, strict=False):
            assert request.arrival_s == pytest.approx(number * round_s + original.arrival_s)
            assert request[1:3] == original[1:3]


@given(workloads())
def test_fresh_prefixes_reuse_as_one_round_and_the_same_ones_reuse_all(requests: list[WorkloadRequest]) -> None:
    once = prefix_reuse(requests)
    rounds = 3 * len(requests)
    fresh = prefix_reuse(islice(repeat(requests, 1e9, fresh_prefixes=True), rounds))
    assert (fresh.hit_tokens, fresh.prompt_tokens) == (3 * once.hit_tokens, 3 * once.prompt_tokens)
    same = prefix_reuse(islice(repeat(requests, 1e9, fresh_prefixes=False), rounds))
    assert same.hit_tokens == once.hit_tokens + 2 * once.prompt_tokens


@given(workloads(), st.integers(min_value=2, max_value=300))
def test_clipped_requests_fit_and_what_is_gone_is_counted(requests: list[WorkloadRequest], limit: int) -> None:
    clip = ContextClip(limit)
    clipped = list(clip.apply(requests))
    for request, original in zip(clipped, requests, strict=True):
        assert request.prompt_tokens >= 1
        assert request.output_tokens >= 1
        assert request.prompt_tokens + request.output_tokens <= limit
        blocks = -(-request.prompt_tokens // 16)
        assert request.hash_ids == original.hash_ids[:blocks]
        if original.prompt_tokens + original.output_tokens <= limit:
            assert request == original
    assert clip.num_clipped == sum(a != b for a, b in zip(clipped, requests, strict=True))
    assert clip.clipped_prompt_tokens == sum(each[1] for each in requests) - sum(each[1] for each in clipped)
    assert clip.clipped_output_tokens == sum(each[2] for each in requests) - sum(each[2] for each in clipped)


def test_the_prompt_gives_way_before_the_answer() -> None:
    assert list(ContextClip(100).apply([WorkloadRequest(0, 90, 30), WorkloadRequest(1, 5, 200)])) == [
        WorkloadRequest(0, 70, 30),
        WorkloadRequest(1, 1, 99),
    ]


CHATS = st.builds(
    Chat,
    st.floats(min_value=0, max_value=1e5),
    st.lists(
        st.builds(
            ChatTurn,
            st.integers(min_value=1, max_value=300),
            st.integers(min_value=1, max_value=300),
            st.floats(min_value=0, max_value=60),
            st.sampled_from([None, "words"]),
        ),
        min_size=1,
        max_size=6,
    ).map(tuple),
    st.integers(min_value=0, max_value=3),
    st.integers(min_value=0, max_value=50),
)


@given(CHATS, st.integers(min_value=60, max_value=2000))
def test_a_chat_ends_before_the_first_turn_that_does_not_fit(chat: Chat, limit: int) -> None:
    clip = ContextClip(limit)
    (clipped,) = clip.apply([chat])
    needed = [tokens + turn.output_tokens for tokens, turn in zip(chat.prompt_tokens(), chat.turns, strict=True)]
    fitting = next((number for number, tokens in enumerate(needed) if tokens > limit), len(needed))
    assert clip.num_dropped_turns == len(chat.turns) - len(clipped.turns) == len(chat.turns) - max(fitting, 1)
    assert clip.num_clipped == (fitting == 0)
    if fitting:
        assert clipped == chat._replace(turns=chat.turns[:fitting])
        return
    (turn,) = clipped.turns
    assert min(turn.new_tokens, turn.output_tokens) >= 1
    assert chat.system_prompt_tokens + turn.new_tokens + turn.output_tokens == limit
    assert turn.text is None
    assert clip.clipped_prompt_tokens == chat.turns[0].new_tokens - turn.new_tokens
    assert clip.clipped_output_tokens == chat.turns[0].output_tokens - turn.output_tokens


#: Of blocks of 16 tokens.
GOOD_FACTORS = st.integers(min_value=1, max_value=16).map(lambda tokens: tokens / 16)


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many leading elements agree."""
    differing = (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))


@given(workloads(), GOOD_FACTORS)
def test_scaled_prompts_share_the_same_blocks(requests: list[WorkloadRequest], factor: float) -> None:
    scaled = list(scaled_lengths(requests, factor))
    block_tokens = round(16 * factor)
    for request, original in zip(scaled, requests, strict=True):
        assert (request.arrival_s, request.hash_ids) == (original.arrival_s, original.hash_ids)
        assert request.hash_block_tokens == block_tokens
        assert 0 < request.prompt_tokens - (len(request.hash_ids) - 1) * block_tokens <= block_tokens
        assert abs(request.prompt_tokens - original.prompt_tokens * factor) <= 1
        assert abs(request.output_tokens - original.output_tokens * factor) <= 1
    maker = PromptMaker(seed=1, low=0, high=2**31)
    prompts = [maker.token_ids(request, number) for number, request in enumerate(scaled)]
    for first, request in zip(prompts, scaled, strict=True):
        for second, other in zip(prompts, scaled, strict=True):
            shared = common(request.hash_ids, other.hash_ids) * block_tokens
            assert common(first, second) == min(shared, len(first), len(second))


def test_a_scaled_public_trace_is_reused_as_the_whole_one() -> None:
    requests = read_trace(trace_path("mooncake_conversation.jsonl")).requests[:3000]
    scaled = list(scaled_lengths(requests, 0.0625))
    whole, shorter = prefix_reuse(requests), prefix_reuse(scaled)
    assert shorter.stored_blocks == whole.stored_blocks
    assert shorter.prompt_tokens == pytest.approx(whole.prompt_tokens / 16, rel=1e-3)
    assert shorter.token_hit_rate == pytest.approx(whole.token_hit_rate, abs=1e-3)


@given(workloads(), CHATS, st.floats(min_value=1e-3, max_value=1))
def test_lengths_are_scaled_and_never_nothing(requests: list[WorkloadRequest], chat: Chat, factor: float) -> None:
    plain = [request._replace(hash_ids=(), hash_block_tokens=0) for request in requests]
    for scaled, original in zip(scaled_lengths(plain, factor), plain, strict=True):
        assert scaled[1:3] == tuple(max(1, round(tokens * factor)) for tokens in original[1:3])
    (shorter,) = scaled_lengths([chat], factor)
    assert shorter._replace(turns=(), system_prompt_tokens=0) == chat._replace(turns=(), system_prompt_tokens=0)
    assert (shorter.system_prompt_tokens == 0) == (chat.system_prompt_tokens == 0)
    for turn, before in zip(shorter.turns, chat.turns, strict=True):
        assert (turn.think_s, turn.text) == (before.think_s, None)
        assert turn[:2] == tuple(max(1, round(tokens * factor)) for tokens in before[:2])


@given(st.integers(min_value=1, max_value=4096), st.floats(min_value=1e-4, max_value=1))
def test_the_factor_that_is_named_works(block_tokens: int, factor: float) -> None:
    try:
        assert scaled_block_tokens(block_tokens, factor) == pytest.approx(block_tokens * factor, abs=2e-6)
    except ValueError as error:
        nearest = float(str(error).rsplit(" ", 1)[1])
        assert scaled_block_tokens(block_tokens, nearest) == max(1, round(block_tokens * factor))


def test_what_cannot_be_scaled_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0.3 of a block of 512 tokens is 153.6 tokens.* works is 0.30078125$"):
        list(scaled_lengths([WorkloadRequest(0, 10, 1, (1,), 512)], 0.3))
    with pytest.raises(ValueError, match="the factor must be above 0 and at most 1, got 2"):
        scaled_lengths([WorkloadRequest(0, 10, 1)], 2)
    with pytest.raises(ValueError, match="a system prompt of 99 tokens leaves no room in a context of 100"):
        list(ContextClip(100).apply([Chat(0, (ChatTurn(1, 1),), 0, 99)]))


def test_faster_chats_think_as_long() -> None:
    chat = Chat(8.0, (ChatTurn(1, 1), ChatTurn(1, 1, 30.0)))
    assert list(at_speed([chat], 4)) == [chat._replace(arrival_s=2.0)]


def test_what_cannot_be_is_refused() -> None:
    one = [WorkloadRequest(1, 1, 1)]
    with pytest.raises(ValueError, match="speed must be finite and > 0, got 0"):
        at_speed(one, 0)
    with pytest.raises(ValueError, match="arrivals at two different times, got 1 requests"):
        at_rate(one, 5)
    with pytest.raises(ValueError, match="arrivals at two different times, got 0 requests"):
        repeat([], 5, fresh_prefixes=True)
    with pytest.raises(ValueError, match="must end after it begins, got 5 s to 5 s"):
        window(one, 5, 5)
    with pytest.raises(ValueError, match="max_context_tokens must be >= 2, got 1"):
        ContextClip(1)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40).map(sorted))
def test_ties_are_spread_up_to_the_next_time_in_order(ticks: list[int]) -> None:
    spread = list(spread_ties([WorkloadRequest(3.0 * tick, 1 + number, 1) for number, tick in enumerate(ticks)]))
    arrivals_s = [request.arrival_s for request in spread]
    assert [request.prompt_tokens for request in spread] == [1 + number for number in range(len(ticks))]
    assert arrivals_s == sorted(arrivals_s)
    if len(set(ticks)) > 1:
        assert len(set(arrivals_s)) == len(arrivals_s)
    for tick, arrival_s in zip(ticks, arrivals_s, strict=True):
        later = [other for other in ticks if other > tick]
        assert 3.0 * tick <= arrival_s
        assert not later or arrival_s < 3.0 * min(later)


def test_ties_at_equal_steps() -> None:
    spread = spread_ties([WorkloadRequest(time_s, 1, 1) for time_s in (0.0, 0.0, 0.0, 3.0, 9.0, 9.0)])
    assert [request.arrival_s for request in spread] == [0.0, 1.0, 2.0, 3.0, 9.0, 12.0]
