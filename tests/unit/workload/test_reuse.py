"""Prefix reuse is counted as its docstring says; the published trace gives its golden figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.traces import trace_path
from workload import WorkloadRequest, prefix_reuse, read_trace


@pytest.mark.parametrize(("capacity_tokens", "hit_rate"), [(None, 0.374), (10_000_000, 0.291), (3_000_000, 0.138)])
def test_the_mooncake_conversation_hour(capacity_tokens: int | None, hit_rate: float) -> None:
    """Golden figures of an LRU store over blocks of 512 tokens."""
    requests = read_trace(trace_path("mooncake_conversation.jsonl")).requests
    assert prefix_reuse(requests, capacity_tokens).token_hit_rate == pytest.approx(hit_rate, abs=0.001)


def ask(*hash_ids: int, tokens: int | None = None) -> WorkloadRequest:
    return WorkloadRequest(0, 10 * len(hash_ids) if tokens is None else tokens, 1, hash_ids, 10)


def test_only_an_unbroken_run_from_the_start_hits() -> None:
    assert prefix_reuse([ask(1, 2, 3), ask(1, 9, 3)]).hit_tokens == 10
    assert prefix_reuse([ask(1, 2, 3), ask(9, 2, 3)]).hit_tokens == 0


def test_a_partial_last_block_hits_in_its_tokens_and_takes_a_block() -> None:
    assert prefix_reuse([ask(1, 2, tokens=13), ask(1, 2, tokens=13)]).hit_tokens == 13
    assert prefix_reuse([ask(1, 2, tokens=13), ask(3), ask(1)], 20).hit_tokens == 0
    assert prefix_reuse([ask(1, 2, tokens=13), ask(3), ask(1)], 30).hit_tokens == 10


def test_what_was_not_used_for_longest_leaves() -> None:
    requests = [ask(1), ask(2), ask(1), ask(3), ask(1), ask(2)]
    assert prefix_reuse(requests, 20).hit_tokens == 20
    assert prefix_reuse(requests, 20).stored_blocks == 4
    assert prefix_reuse(requests, 30).hit_tokens == 30


def test_requests_without_ids_count_as_prompts_only() -> None:
    reuse = prefix_reuse([WorkloadRequest(0, 70, 1), WorkloadRequest(1, 70, 1), ask(1), ask(1)])
    assert (reuse.num_requests, reuse.prompt_tokens, reuse.hit_tokens) == (4, 160, 10)
    assert prefix_reuse([]).token_hit_rate == 0


CHAINS = st.lists(st.lists(st.integers(min_value=0, max_value=2), min_size=1, max_size=6), max_size=40)


@given(CHAINS)
def test_a_store_without_bound_hits_every_prefix_seen_before(chains: list[list[int]]) -> None:
    ids: dict[tuple[int, ...], int] = {}
    requests = [
        ask(*(ids.setdefault(tuple(chain[: length + 1]), len(ids)) for length in range(len(chain)))) for chain in chains
    ]
    seen: set[tuple[int, ...]] = set()
    hit_tokens = 0
    for chain in chains:
        prefixes = [tuple(chain[: length + 1]) for length in range(len(chain))]
        hit_tokens += 10 * sum(prefix in seen for prefix in prefixes)
        seen.update(prefixes)
    reuse = prefix_reuse(requests)
    assert (reuse.hit_tokens, reuse.stored_blocks) == (hit_tokens, len(seen))
    assert prefix_reuse(requests, 10 * max(1, len(seen))) == reuse


@given(st.lists(st.integers(min_value=0, max_value=8), max_size=60), st.integers(min_value=1, max_value=8))
def test_a_larger_store_never_hits_less(ids: list[int], blocks: int) -> None:
    """LRU has the inclusion property (Mattson et al., 1970) for requests of one block."""
    requests = [ask(each) for each in ids]
    assert prefix_reuse(requests, 10 * blocks).hit_tokens <= prefix_reuse(requests, 10 * blocks + 10).hit_tokens


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity_tokens 9 is less than a block of 10"):
        prefix_reuse([ask(1)], 9)
    with pytest.raises(ValueError, match="blocks of 10 and of 16 tokens do not mix"):
        prefix_reuse([ask(1), WorkloadRequest(0, 5, 1, (1,), 16)])
