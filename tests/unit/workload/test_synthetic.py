"""Synthetic workloads: bounded, repeatable, and with the shared prefixes they promise."""

from __future__ import annotations

import tracemalloc
from collections import Counter, deque
from itertools import pairwise
from statistics import mean
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload import Fixed, LogNormal, Poisson, SharedPrefixes, WorkloadRequest, prefix_reuse, synthetic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PROMPTS = LogNormal(300, 1.0, 4096)
OUTPUTS = LogNormal(80, 1.0, 2048)


def make(
    *,
    rate_rps: float = 4.0,
    seed: int = 1,
    num_requests: int | None = 2000,
    duration_s: float | None = None,
    prefixes: SharedPrefixes | None = None,
    slo_mix: Mapping[str, float] | None = None,
) -> Iterator[WorkloadRequest]:
    return synthetic(
        arrivals=Poisson(rate_rps),
        prompts=PROMPTS,
        outputs=OUTPUTS,
        seed=seed,
        num_requests=num_requests,
        duration_s=duration_s,
        prefixes=prefixes,
        slo_mix=slo_mix,
    )


CHAT = SharedPrefixes(num_system_prompts=4, system_prompt_tokens=256, mean_turns=3, hash_block_tokens=64)


@given(st.integers(), st.sampled_from([None, CHAT]))
def test_a_seed_gives_one_workload(seed: int, prefixes: SharedPrefixes | None) -> None:
    once = list(make(seed=seed, num_requests=40, prefixes=prefixes))
    assert once == list(make(seed=seed, num_requests=40, prefixes=prefixes))
    assert once != list(make(seed=seed + 1, num_requests=40, prefixes=prefixes))
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in pairwise(once))


def test_another_rate_asks_the_same() -> None:
    slow, fast = (list(make(rate_rps=rate_rps, slo_mix={"a": 1, "b": 1})) for rate_rps in (1, 50))
    assert [each[1:] for each in slow] == [each[1:] for each in fast]
    assert slow[-1].arrival_s == pytest.approx(50 * fast[-1].arrival_s)


def test_count_and_duration_bound_it() -> None:
    assert len(list(make(num_requests=17))) == 17
    within = list(make(num_requests=None, duration_s=100))
    assert within[-1].arrival_s < 100
    assert within == list(make(num_requests=5000, duration_s=100))
    assert within[:50] == list(make(num_requests=50, duration_s=100))


def test_slo_classes_are_mixed_by_weight() -> None:
    drawn = Counter(each.slo_class for each in make(num_requests=8000, slo_mix={"interactive": 3, "batch": 1}))
    assert drawn["interactive"] / 8000 == pytest.approx(0.75, abs=0.02)
    assert drawn["batch"] / 8000 == pytest.approx(0.25, abs=0.02)
    assert {each.slo_class for each in make(num_requests=10)} == {"default"}


def test_a_long_workload_is_not_held_in_memory() -> None:
    def peak_bytes(read: Callable[[Iterator[WorkloadRequest]], object]) -> int:
        tracemalloc.start()
        try:
            read(make(num_requests=2000, prefixes=CHAT))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(lambda requests: deque(requests, maxlen=1)) < peak_bytes(list) / 3


@given(
    st.builds(
        SharedPrefixes,
        num_system_prompts=st.integers(min_value=1, max_value=5),
        system_prompt_tokens=st.integers(min_value=0, max_value=4).map(lambda blocks: 32 * blocks),
        mean_turns=st.floats(min_value=1, max_value=10),
        mean_think_s=st.floats(min_value=0.1, max_value=100),
        max_prompt_tokens=st.integers(min_value=200, max_value=3000),
        hash_block_tokens=st.just(32),
    )
)
def test_hash_ids_cover_the_prompt_and_never_part_again(prefixes: SharedPrefixes) -> None:
    """Once two prompts differ in a block they share none behind it: an id stands for all before it, too."""
    before: dict[int, tuple[int, ...]] = {}
    for request in make(num_requests=80, prefixes=prefixes):
        assert prefixes.system_prompt_tokens < request.prompt_tokens <= prefixes.max_prompt_tokens
        assert len(request.hash_ids) == -(-request.prompt_tokens // 32)
        for index, hash_id in enumerate(request.hash_ids):
            assert before.setdefault(hash_id, request.hash_ids[:index]) == request.hash_ids[:index]


def test_the_next_prompt_of_a_conversation_holds_the_earlier_ones() -> None:
    prefixes = SharedPrefixes(mean_turns=1e9, mean_think_s=1e-9, hash_block_tokens=1, max_prompt_tokens=1_000_000)
    requests = list(
        synthetic(arrivals=Poisson(1), prompts=Fixed(10), outputs=Fixed(5), seed=1, num_requests=30, prefixes=prefixes)
    )
    assert [each.prompt_tokens for each in requests] == [10 + 15 * turn for turn in range(30)]
    for earlier, later in pairwise(requests):
        assert later.hash_ids[: earlier.prompt_tokens] == earlier.hash_ids


def test_conversations_have_their_mean_of_turns_and_think_before_they_go_on() -> None:
    prefixes = SharedPrefixes(mean_turns=4, mean_think_s=20, hash_block_tokens=1)
    turns: dict[int, list[float]] = {}
    requests = synthetic(
        arrivals=Poisson(5), prompts=Fixed(3), outputs=Fixed(2), seed=5, num_requests=20_000, prefixes=prefixes
    )
    for request in requests:
        turns.setdefault(request.hash_ids[0], []).append(request.arrival_s)
    assert mean(map(len, turns.values())) == pytest.approx(4, rel=0.05)
    thought = [later - earlier for times in turns.values() for earlier, later in pairwise(times)]
    assert min(thought) > 0
    assert mean(thought) == pytest.approx(20, rel=0.15)


def test_system_prompts_are_popular_by_zipfs_law() -> None:
    prefixes = SharedPrefixes(num_system_prompts=5, system_prompt_tokens=64, zipf_exponent=1.2, hash_block_tokens=64)
    drawn = Counter(each.hash_ids[0] for each in make(num_requests=20_000, prefixes=prefixes))
    weights = [rank**-1.2 for rank in range(1, 6)]
    for number in range(5):
        assert drawn[number] / 20_000 == pytest.approx(weights[number] / sum(weights), abs=0.015)


def test_one_turn_and_a_system_prompt_reuse_just_that() -> None:
    prefixes = SharedPrefixes(system_prompt_tokens=512)
    requests = list(make(num_requests=500, prefixes=prefixes))
    assert prefix_reuse(requests).hit_tokens == 499 * 512


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_system_prompts": 0}, "num_system_prompts must be finite and > 0"),
        ({"mean_turns": 0.5}, "mean_turns must be >= 1, got 0.5"),
        ({"system_prompt_tokens": 100}, "100 must be a multiple of hash_block_tokens 512"),
        ({"system_prompt_tokens": 1024, "max_prompt_tokens": 1024}, "1024 must be below max_prompt_tokens 1024"),
    ],
)
def test_prefixes_that_cannot_be_are_refused(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SharedPrefixes(**change)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"num_requests": None}, "needs num_requests or duration_s"),
        ({"num_requests": 0}, "num_requests must be finite and > 0, got 0"),
        ({"duration_s": -1}, "duration_s must be finite and > 0, got -1"),
    ],
)
def test_a_workload_needs_a_bound(bounds: dict[str, int | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(num_requests=bounds.get("num_requests", 5), duration_s=bounds.get("duration_s"))


def test_a_class_needs_a_weight() -> None:
    with pytest.raises(ValueError, match="batch must be finite and > 0, got 0"):
        make(slo_mix={"interactive": 1, "batch": 0})
