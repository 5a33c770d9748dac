"""The order of an answer: every token once, in order, whatever comes, in whatever order, of however many tries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import RequestId
from contracts.requests import TokenDelta, TokenLogprobs
from gateway.delivery import Delivery

if TYPE_CHECKING:
    from contracts.requests import FinishReason


def delta(index: int, *token_ids: int, finish: FinishReason | None = None) -> TokenDelta:
    logprobs = tuple(TokenLogprobs(-float(token_id)) for token_id in token_ids)
    return TokenDelta(request_id=RequestId("r"), index=index, token_ids=token_ids, logprobs=logprobs, finish=finish)


def piece(start: int, stop: int, length: int) -> TokenDelta:
    """Tokens `[start, stop)` of an answer that counts up to `length`."""
    return delta(start, *range(start, stop), finish="length" if stop == length else None)


@st.composite
def tries(draw: st.DrawFn) -> tuple[int, list[list[TokenDelta]]]:
    """An answer's length, and the deltas of each try in the order of arrival. All but the last try may stop
    anywhere, with gaps; all may overlap and repeat. A try starts where delivery stood, which the test cuts out."""
    length = draw(st.integers(1, 25))
    spans = st.tuples(st.integers(0, length - 1), st.integers(1, 6)).map(
        lambda span: (span[0], min(length, span[0] + span[1]))
    )
    lost = [draw(st.lists(spans, max_size=12)) for _ in range(draw(st.integers(0, 3)))]
    last = draw(st.permutations([*draw(st.lists(spans, max_size=8)), *((n, n + 1) for n in range(length))]))
    return length, [[piece(*span, length) for span in spans_of_try] for spans_of_try in [*lost, last]]


@given(tries())
def test_any_interleaving_of_any_tries_gives_each_token_once_in_order(case: tuple[int, list[list[TokenDelta]]]) -> None:
    length, attempts = case
    delivery = Delivery()
    seen: list[TokenDelta] = []
    for number, deltas in enumerate(attempts):
        delivery.forget_early()
        first = delivery.next_index
        assert not delivery.has_gap
        for each in deltas:
            is_of_this_try = each.index >= first or number == 0
            if is_of_this_try and delivery.is_news(each) and not (seen and seen[-1].finish):
                seen += delivery.take(each)
    token_ids = [token_id for each in seen for token_id in each.token_ids]
    assert token_ids == delivery.token_ids == list(range(length))
    assert [each.index for each in seen] == [sum(len(one.token_ids) for one in seen[:n]) for n in range(len(seen))]
    logprobs = [one.logprob for each in seen for one in each.logprobs or ()]
    assert logprobs == [-float(token_id) for token_id in token_ids]
    assert [each.finish for each in seen if each.finish] == ["length"]
    assert seen[-1].finish == "length"


def test_early_tokens_wait_and_are_counted() -> None:
    delivery = Delivery()
    assert delivery.take(delta(2, 12, 13)) == []
    assert delivery.take(delta(5, 15)) == []
    assert (delivery.has_gap, delivery.num_early_tokens) == (True, 3)
    assert [each.token_ids for each in delivery.take(delta(0, 10, 11))] == [(10, 11), (12, 13)]
    assert (delivery.has_gap, delivery.num_early_tokens) == (True, 1)
    assert delivery.token_ids == [10, 11, 12, 13]


def test_the_longer_of_two_early_deltas_is_kept() -> None:
    delivery = Delivery()
    for each in (delta(1, 11, 12), delta(1, 11)):
        assert delivery.take(each) == []
    assert [each.token_ids for each in delivery.take(delta(0, 10))] == [(10,), (11, 12)]


def test_what_was_early_is_forgotten_and_what_was_delivered_stays() -> None:
    delivery = Delivery()
    delivery.take(delta(0, 10))
    delivery.take(delta(2, 99))
    delivery.forget_early()
    assert (delivery.has_gap, delivery.next_index) == (False, 1)
    assert [each.token_ids for each in delivery.take(delta(1, 11))] == [(11,)]


def test_logprobs_are_cut_with_their_tokens() -> None:
    delivery = Delivery()
    delivery.take(delta(0, 5))
    assert delivery.take(delta(0, 5, 6)) == [delta(1, 6)]


def test_nothing_follows_the_end() -> None:
    delivery = Delivery()
    delivery.take(delta(2, 12))
    delivery.take(delta(1, finish="stop"))
    assert delivery.take(delta(0, 10)) == [delta(0, 10), delta(1, finish="stop")]
