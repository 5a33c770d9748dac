"""What a store would have had of real prompts, by the eviction that it ships. A trace gives golden figures."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.hitrate_store import belady, replay
from contracts.config import EvictionPolicyName
from tests.support.traces import trace_path
from workload import WorkloadRequest, prefix_reuse, read_trace

if TYPE_CHECKING:
    from collections.abc import Sequence

POLICIES: tuple[EvictionPolicyName, ...] = get_args(EvictionPolicyName)
BLOCKS_3M, BLOCKS_10M = 3_000_000 // 512, 10_000_000 // 512


@cache
def conversation_hour() -> Sequence[WorkloadRequest]:
    return read_trace(trace_path("mooncake_conversation.jsonl")).requests


@pytest.mark.parametrize(("num_blocks", "rate"), [(200_000, 0.374), (BLOCKS_10M, 0.291), (BLOCKS_3M, 0.138)])
def test_lru_has_the_published_hit_rates(num_blocks: int, rate: float) -> None:
    assert replay(conversation_hour(), "lru", num_blocks).whole == pytest.approx(rate, abs=0.003)


def test_the_default_beats_lru_on_what_it_has_not_seen() -> None:
    """The first 20 minutes; nothing is known when they begin."""
    requests = conversation_hour()[:4000]
    lru, ours, bound = (
        replay(requests, "lru", BLOCKS_3M),
        replay(requests, "cost_aware", BLOCKS_3M),
        belady(requests, BLOCKS_3M),
    )
    assert ours.whole > 1.2 * lru.whole
    assert ours.second_half > 1.25 * lru.second_half
    assert bound.whole > ours.whole


def test_beladys_rate_on_the_trace() -> None:
    assert belady(conversation_hour(), BLOCKS_3M).whole == pytest.approx(0.36, abs=0.003)


def prompts(chains: list[list[int]]) -> list[WorkloadRequest]:
    """Blocks of ten tokens, named by their prefixes."""
    ids: dict[tuple[int, ...], int] = {}
    named = [[ids.setdefault(tuple(chain[: end + 1]), len(ids)) for end in range(len(chain))] for chain in chains]
    return [WorkloadRequest(5.0 * at, 10 * len(chain), 1, tuple(chain), 10) for at, chain in enumerate(named)]


CHAINS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5), min_size=2, max_size=40)


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=40)
@given(chains=CHAINS, num_blocks=st.integers(5, 30))
def test_no_policy_beats_beladys_and_a_larger_store_than_all_has_everything(
    policy: EvictionPolicyName, chains: list[list[int]], num_blocks: int
) -> None:
    requests = prompts(chains)
    assert replay(requests, policy, num_blocks, look_ahead=3).whole <= belady(requests, num_blocks).whole + 1e-12
    everything = prefix_reuse(requests).token_hit_rate
    assert replay(requests, policy, 200).whole == belady(requests, 200).whole == pytest.approx(everything)
