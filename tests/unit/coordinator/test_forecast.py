"""How many answers are expected when: reported ones that end, placed ones that begin."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.forecast import DecodeForecast
from coordinator.policy.outlook import NUM_SLOTS, Pace

#: Slots of a quarter of a second, for 16 s; an answer takes 4 s.
WIDTH_S = 0.25
ANSWER_S = 4.0


def forecast(rows: int = 2, now_s: float = 0.0) -> DecodeForecast:
    made = DecodeForecast(WIDTH_S * NUM_SLOTS / 1.5, Pace(answer_tokens=100.0, token_s=ANSWER_S / 100))
    assert made.slots.width_s == WIDTH_S
    for row in range(rows):
        made.insert(row, now_s)
    made.advance(now_s)
    return made


def at(made: DecodeForecast, time_s: float, row: int = 0) -> tuple[float, float]:
    count, tokens = made.table[row, made.slots.index_at(time_s)]
    return float(count), float(tokens)


def test_reported_answers_end_and_grow() -> None:
    made = forecast()
    made.report(0, 10, 1000, 0.0)
    assert at(made, 0.0) == (10.0, 1000.0)
    count, tokens = at(made, ANSWER_S)
    assert count == pytest.approx(10 / math.e)
    assert tokens == pytest.approx((1000 + 10 * 100) / math.e), "each that is still written has 100 tokens more"
    assert at(made, 1.0, row=1) == (0.0, 0.0)


def test_placed_answers_count_from_when_they_begin() -> None:
    made = forecast()
    made.add(0, 2.0, 50)
    assert at(made, 1.9) == (0.0, 0.0)
    assert at(made, 2.0) == (1.0, 50.0)
    assert at(made, 2.0 + ANSWER_S)[0] == pytest.approx(1 / math.e)
    made.add(0, 1000.0, 50)
    assert at(made, 500.0)[0] == pytest.approx(1 + math.exp(-(15.75 - 2.0) / ANSWER_S)), "in the last slot there is"


def test_a_report_contains_what_has_begun() -> None:
    made = forecast()
    for begin_s in (0.3, 0.8, 3.0):
        made.add(0, begin_s, 50)
    made.advance(1.0)
    made.report(0, 2, 110, 1.0)
    assert at(made, 1.0) == (2.0, 110.0)
    assert at(made, 3.0)[0] == pytest.approx(1 + 2 * math.exp(-2.0 / ANSWER_S))


def test_of_the_present_slot_a_part_has_begun() -> None:
    made = forecast()
    for _ in range(8):
        made.add(0, 1.1, 50)
    made.advance(1.0)
    for now_s, left in ((1.0625, 6.0), (1.125, 4.0), (1.1875, 2.0), (1.25, 0.0)):
        made.advance(now_s)
        made.report(0, 0, 0, now_s)
        assert at(made, now_s)[0] == pytest.approx(left)


def test_time_without_reports() -> None:
    made = forecast()
    made.add(0, 2.0, 50)
    made.advance(4.0)
    assert at(made, 4.0)[0] == pytest.approx(math.exp(-2.0 / ANSWER_S)), "it has begun, though nobody told"
    made.advance(1e6)
    assert at(made, 1e6)[0] < 0.1
    made.report(0, 0, 0, 1e6)
    assert not made.table[0].any()


def test_rows_come_and_go() -> None:
    made = forecast(rows=2)
    made.report(0, 1, 10, 0.0)
    made.report(1, 2, 20, 0.0)
    made.insert(1, 0.0)
    assert [at(made, 0.0, row)[0] for row in range(3)] == [1.0, 0.0, 2.0]
    made.delete(0)
    assert [at(made, 0.0, row)[0] for row in range(2)] == [0.0, 2.0]
    made.report(1, 5, 50, 0.0)
    assert at(made, 0.0, 1) == (5.0, 50.0)


@given(
    begins=st.lists(st.tuples(st.floats(0.0, 15.0), st.integers(1, 500)), max_size=20),
    reports=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50), st.integers(0, 9999)), max_size=4),
    when=st.integers(0, NUM_SLOTS - 1),
)
def test_beside_one_by_one(begins: list[tuple[float, int]], reports: list[tuple[int, int, int]], when: int) -> None:
    """Placements and reports at one time, in any order: the sum over all answers."""
    made = forecast()
    reported = {0: (0, 0), 1: (0, 0)}
    for begin_s, tokens in begins[::2]:
        made.add(0, begin_s, tokens)
    for row, num_decodes, context_tokens in reports:
        made.report(row, num_decodes, context_tokens, 0.0)
        reported[row] = num_decodes, context_tokens
    for begin_s, tokens in begins[1::2]:
        made.add(0, begin_s, tokens)
    time_s = when * WIDTH_S
    answers = [(0.0, count, tokens) for count, tokens in [reported[0]]]
    answers += [(begin_s // WIDTH_S * WIDTH_S, 1, tokens) for begin_s, tokens in begins]
    expected_count = expected_tokens = 0.0
    for begin_s, count, tokens in answers:
        if begin_s <= time_s:
            age_s = time_s - begin_s
            still = math.exp(-age_s / ANSWER_S)
            expected_count += count * still
            expected_tokens += (tokens + count * age_s / (ANSWER_S / 100)) * still
    told_count, told_tokens = at(made, time_s)
    assert told_count == pytest.approx(expected_count, abs=1e-9)
    assert told_tokens == pytest.approx(expected_tokens, abs=1e-6)


@pytest.mark.parametrize("extra_slots", [0, 1, 2, 50])
def test_after_a_long_pause_nothing_is_about_to_begin(extra_slots: int) -> None:
    """The coordinator stood still for longer than the table reaches."""
    made = forecast()
    made.add(0, WIDTH_S * (NUM_SLOTS - 0.5), 50)
    begun, _ = at(made, WIDTH_S * (NUM_SLOTS - 0.5))
    now_s = WIDTH_S * (NUM_SLOTS + extra_slots)
    made.advance(now_s)
    assert at(made, now_s)[0] == pytest.approx(begun * math.exp(-(extra_slots + 1) * WIDTH_S / ANSWER_S))
    made.report(0, 0, 0, now_s)
    assert at(made, now_s + 1.0) == (0.0, 0.0), "what the worker does not tell by now is over"
