"""Prompts share exactly the tokens that their hash ids share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload import WorkloadRequest
from workload.prompts import PromptMaker

MAKER = PromptMaker(seed=7, low=100, high=100 + 2**31)


def ask(prompt_tokens: int, hash_ids: tuple[int, ...] = ()) -> WorkloadRequest:
    return WorkloadRequest(0, prompt_tokens, 1, hash_ids, 16 if hash_ids else 0)


def shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (one, other) in pairs if one != other), min(len(first), len(second)))


#: Blocks in common, blocks of the first and of the second behind them, and tokens in each last block.
SHAPES = st.tuples(
    st.integers(min_value=0, max_value=4),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=1, max_value=4),
    st.integers(min_value=1, max_value=16),
    st.integers(min_value=1, max_value=16),
)


@given(SHAPES)
def test_prompts_share_exactly_the_blocks_they_have_in_common(shape: tuple[int, int, int, int, int]) -> None:
    common, first, second, first_tail, second_tail = shape
    ids = tuple(range(common))
    one = ask((common + first - 1) * 16 + first_tail, (*ids, *range(1000, 1000 + first)))
    other = ask((common + second - 1) * 16 + second_tail, (*ids, *range(2000, 2000 + second)))
    one_ids, other_ids = MAKER.token_ids(one, 0), MAKER.token_ids(other, 1)
    assert (len(one_ids), len(other_ids)) == (one.prompt_tokens, other.prompt_tokens)
    assert shared(one_ids, other_ids) == 16 * common


@given(st.integers(min_value=1, max_value=16), st.integers(min_value=1, max_value=16))
def test_a_partial_block_is_the_beginning_of_the_whole(few: int, many: int) -> None:
    assert shared(MAKER.token_ids(ask(few, (3,)), 0), MAKER.token_ids(ask(many, (3,)), 1)) == min(few, many)


def test_prompts_without_ids_have_nothing_in_common_and_can_be_made_again() -> None:
    one, other = MAKER.token_ids(ask(50), 0), MAKER.token_ids(ask(50), 1)
    assert shared(one, other) == 0
    assert MAKER.token_ids(ask(50), 0) == one
    assert shared(PromptMaker(8, 100, 100 + 2**31).token_ids(ask(50), 0), one) == 0


def test_tokens_are_the_same_on_every_machine() -> None:
    assert PromptMaker(1, 10, 50_000).token_ids(ask(4), 0) == (1261, 44431, 41989, 43005)
    assert PromptMaker(1, 10, 50_000).token_ids(ask(4, (5,)), 9) == (16049, 1936, 3771, 36505)


@given(st.integers(min_value=0, max_value=1000), st.integers(min_value=1, max_value=40))
def test_tokens_stay_in_the_vocabulary(low: int, size: int) -> None:
    assert set(PromptMaker(1, low, low + size).token_ids(ask(600), 0)) <= set(range(low, low + size))


def test_all_of_the_vocabulary_is_used() -> None:
    assert set(PromptMaker(1, 5, 15).token_ids(ask(600), 0)) == set(range(5, 15))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="0 <= low < high <= 2\\^32, got 5 and 5"):
        PromptMaker(1, 5, 5)
    for prompt_tokens in (16, 33):
        with pytest.raises(ValueError, match=f"request 4: 2 hash ids of 16 tokens for a prompt of {prompt_tokens}"):
            MAKER.token_ids(ask(prompt_tokens, (1, 2)), 4)
