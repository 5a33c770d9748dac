"""Who goes away is drawn from the seed and the request's index alone."""

from __future__ import annotations

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from workload.cancel import Cancellations, parse_cancel


@given(st.integers(), st.integers(min_value=0), st.integers(min_value=1, max_value=500))
def test_a_client_goes_before_the_last_token_or_not_at_all(seed: int, index: int, output_tokens: int) -> None:
    for cancel in (Cancellations(seed=seed, share=1.0), parse_cancel("1@lognormal:mean=30,sigma=1", seed)):
        tokens = cancel.after_tokens(index, output_tokens)
        assert tokens is None or 1 <= tokens < output_tokens
        assert tokens == cancel.after_tokens(index, output_tokens)


def test_so_many_go_and_anywhere_in_the_answer() -> None:
    cancel = parse_cancel("0.2", seed=3)
    gone = [tokens for index in range(20_000) if (tokens := cancel.after_tokens(index, 101)) is not None]
    assert len(gone) / 20_000 == pytest.approx(0.2, rel=0.05)
    assert mean(gone) == pytest.approx(50.5, rel=0.05)
    assert (min(gone), max(gone)) == (1, 100)
    plans = ([parse_cancel("0.2", seed).after_tokens(index, 9) for index in range(99)] for seed in (3, 4))
    assert next(plans) != next(plans)


def test_lengths_say_when_and_short_answers_are_taken_whole() -> None:
    cancel = parse_cancel("1@fixed:30", seed=0)
    assert [cancel.after_tokens(0, tokens) for tokens in (1, 30, 31, 500)] == [None, None, 30, 30]
    assert parse_cancel("1", seed=0).after_tokens(0, 1) is None


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("0", "cancel '0': the share must be above 0 and at most 1, got 0"),
        ("1.5", "the share must be above 0 and at most 1, got 1.5"),
        ("nan", "the share must be above 0 and at most 1, got nan"),
        ("many", "could not convert string to float: 'many'; the form is SHARE or SHARE@LENGTHS"),
        ("0.1@", "unknown form ''"),
        ("0.1@lognormal:mean=3", "it needs mean and p95"),
    ],
)
def test_what_cannot_be_is_refused(text: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_cancel(text, seed=0)
