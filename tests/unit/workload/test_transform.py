"""Transformations keep what they do not name, and count what they take away."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from workload import ContextClip, WorkloadRequest, at_rate, at_speed, mean_rate_rps, prefix_reuse, repeat, window


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
