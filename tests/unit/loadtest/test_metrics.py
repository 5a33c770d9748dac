"""Figures of records written by hand, against numbers computed by hand; and what holds of any records."""

from __future__ import annotations

import math
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from loadtest.columns import columns_of, token_gaps_s
from loadtest.metrics import Takeovers, measure, wilson
from loadtest.record import Outcome, RequestRecord
from tests.support.load_records import SLOS, record, served
from workload.slo import SloClass

if TYPE_CHECKING:
    from loadtest.metrics import LoadMetrics

SLO = SloClass("interactive", 300.0, 50.0)


def test_figures_of_four_requests() -> None:
    metrics = measure(
        [
            # TTFT 200 ms, TPOT 40 ms: met.
            record(0.0, (0.2, 0.24, 0.28), usage=(110, 3)),
            # TTFT 300 ms, exactly the target; TPOT 100 ms: missed.
            record(1.0, (1.3, 1.4), usage=(100, 2)),
            # Answer of one token: no TPOT, met.
            record(2.0, (2.1,), usage=(100, 1)),
            record(4.0, outcome=Outcome.REJECTED, end_s=4.5),
        ],
        [SLO],
    )
    assert (metrics.num_requests, metrics.num_finished, metrics.num_rejected) == (4, 3, 1)
    assert (metrics.attainment.joint, metrics.attainment.ttft_only, metrics.attainment.tpot_only) == (0.5, 0.75, 0.5)
    assert metrics.offered_s == 4.0
    assert metrics.offered_rps == pytest.approx(3 / 4)
    assert metrics.duration_s == pytest.approx(4.5)
    assert metrics.tail_s == pytest.approx(0.5)
    assert metrics.goodput_rps == pytest.approx(0.75 * 0.5)
    assert metrics.finished_rps == pytest.approx(3 / 4.5)
    assert (metrics.ttft.count, metrics.ttft.mean_ms, metrics.ttft.max_ms) == pytest.approx((3, 200.0, 300.0))
    assert (metrics.tpot.count, metrics.tpot.mean_ms) == pytest.approx((2, 70.0))
    assert (metrics.itl.count, metrics.itl.mean_ms) == pytest.approx((3, 60.0))
    assert (metrics.second_token.count, metrics.second_token.max_ms) == pytest.approx((2, 100.0))
    assert (metrics.e2e.count, metrics.e2e.mean_ms) == pytest.approx((3, (280 + 400 + 100) / 3))
    assert metrics.prompt_tokens_per_s == pytest.approx(310 / 4.5)
    assert metrics.output_tokens_per_s == pytest.approx(6 / 4.5)
    assert (metrics.chunks_per_s, metrics.tokens_per_chunk) == pytest.approx((6 / 4.5, 1.0))


@pytest.mark.parametrize(
    ("cancelled", "num_judged", "joint"),
    [
        (record(0.0, (0.2, 0.24), outcome=Outcome.CANCELLED), 1, 1.0),
        (record(0.0, (0.2, 0.4), outcome=Outcome.CANCELLED), 1, 0.0),
        (record(0.0, (0.4,), outcome=Outcome.CANCELLED), 1, 0.0),
        # Without a token: only who had waited too long by then is a miss.
        (record(0.0, outcome=Outcome.CANCELLED, end_s=0.31), 1, 0.0),
        (record(0.0, outcome=Outcome.CANCELLED, end_s=0.30), 0, math.nan),
    ],
)
def test_a_cancelled_request_is_judged_by_what_came_of_it(
    cancelled: RequestRecord, num_judged: int, joint: float
) -> None:
    metrics = measure([cancelled], [SLO])
    assert (metrics.num_cancelled, metrics.num_failed) == (1, 0)
    assert metrics.attainment.num_requests == num_judged
    assert metrics.attainment.joint == pytest.approx(joint, nan_ok=True)


def test_warm_up_and_what_the_end_cut_off_are_counted_and_in_no_figure() -> None:
    ordinary = [record(float(second), (second + 0.1, second + 0.12)) for second in range(3)]
    others = [
        record(-5.0, (9.0, 19.0), is_warmup=True),
        record(-4.0, outcome=Outcome.REFUSED, end_s=-3.0, is_warmup=True),
        record(3.0, (50.0, 60.0), outcome=Outcome.INTERRUPTED, end_s=99.0),
        record(4.0, outcome=Outcome.UNSENT),
    ]
    alone, together = measure(ordinary, [SLO]), measure([*others, *ordinary], [SLO], num_planned=10)
    assert (together.num_warmup, together.num_interrupted, together.num_unsent) == (2, 1, 4)
    counts = {"num_warmup": 2, "num_interrupted": 1, "num_unsent": 4}
    assert plain(together) == plain(msgspec.structs.replace(alone, **counts))


def test_failures_are_counted_by_kind_with_examples() -> None:
    records = [
        *(record(0.0, outcome=Outcome.HTTP_5XX, end_s=1.0, detail=f"fault {number % 5}") for number in range(10)),
        record(0.0, (0.1,), outcome=Outcome.TIMEOUT, end_s=9.0),
        record(0.0, outcome=Outcome.CONNECT_TIMEOUT, end_s=1.0),
    ]
    metrics = measure(records, [SLO])
    assert [(each.kind, each.count) for each in metrics.errors] == [
        ("http_5xx", 10),
        ("connect_timeout", 1),
        ("timeout", 1),
    ]
    assert metrics.errors[0].examples == ("fault 0", "fault 1", "fault 2")
    assert (metrics.num_timed_out, metrics.num_failed, metrics.attainment.joint) == (2, 10, 0.0)


def test_each_class_is_judged_by_its_own_targets() -> None:
    records = [
        record(0.0, (1.0,), slo_class="interactive"),
        record(1.0, (2.0,), slo_class="batch"),
        record(2.0, (9.0,), slo_class="batch"),
    ]
    metrics = measure(records, SLOS)
    assert [(each.name, each.num_requests, each.joint) for each in metrics.classes] == [
        ("interactive", 1, 0.0),
        ("batch", 2, 0.5),
    ]
    assert metrics.attainment.joint == pytest.approx(1 / 3)
    with pytest.raises(ConfigError, match="no SLO is given for the class 'batch'; there are interactive"):
        measure(records, SLOS[:1])


def test_answers_that_are_not_as_planned_are_counted() -> None:
    retried = replace(record(0.0, (0.1, 0.2), usage=(100, 2)), num_retries=1)
    metrics = measure(
        [
            record(0.0, (0.1, 0.2), output_tokens=5),
            record(0.0, (0.1, 0.2), output_tokens=1, usage=(120, 2)),
            record(0.0, (0.1,), output_tokens=4, usage=(100, 4)),
            retried,
        ],
        [SLO],
    )
    answers = metrics.answers
    assert (answers.num_without_usage, answers.num_shorter, answers.num_longer) == (1, 1, 1)
    assert (answers.num_other_prompt, answers.prompt_tokens_ratio) == pytest.approx((1, 320 / 300))
    assert (answers.num_in_one_chunk, answers.num_retried) == (1, 1)
    assert metrics.tokens_per_chunk == pytest.approx(10 / 7)
    # What was sent again because the server had asked for it says as much about the client's lag, but has no phases.
    assert (metrics.send_lag.count, metrics.phases.send_lag.count) == (4, 3)


def test_moves_and_replays_are_counted_where_the_server_tells_them() -> None:
    told = [(2, 0), (0, 1), (None, None), (1, None), (0, 0)]
    records = [replace(record(0.0, (0.1,)), num_moves=moves, num_replays=replays) for moves, replays in told]
    warm_up = replace(record(0.0, (0.1,), is_warmup=True), num_moves=5, num_replays=5)
    found = measure([*records, warm_up], [SLO]).takeovers
    assert found == Takeovers(num_told=4, num_moved=2, num_moves=3, num_replayed=1, num_replays=1)
    assert measure([record(0.0, (0.1,))], [SLO]).takeovers == Takeovers()


def test_lag_is_until_the_client_takes_it_up_and_connecting_is_not_in_it() -> None:
    late = record(0.0, (0.5,), taken_s=0.02)
    late.sent_s, late.connect_s, late.headers_s = 0.07, 0.05, 0.1
    metrics = measure([late], [SLO])
    assert metrics.send_lag.mean_ms == pytest.approx(20.0)
    assert metrics.ttft_from_sending.mean_ms == pytest.approx(430.0)
    phases = metrics.phases
    means_ms = [getattr(phases, name).mean_ms for name in phases.__struct_fields__]
    assert means_ms == pytest.approx([20.0, 50.0, 30.0, 400.0, 0.0])
    assert sum(means_ms) == pytest.approx(metrics.e2e.mean_ms)


def test_a_client_that_falls_behind_sends_at_a_lower_rate() -> None:
    records = [record(float(second), (second + 1.0,), taken_s=1.25 * second) for second in range(5)]
    assert measure(records, [SLO]).sending_rate_ratio == pytest.approx(4 / 5)
    assert math.isnan(measure(records[:1], [SLO]).sending_rate_ratio)


def test_a_client_that_stood_still_while_it_connected_sent_late_all_the_same() -> None:
    late = record(0.0, (0.5,), taken_s=0.3)
    # Of the 300 ms, the client's loop ascribes all to connecting.
    late.connect_s = 0.3
    assert measure([late], [SLO]).send_lag.mean_ms == pytest.approx(300.0)


def part_of_three(part: int, drain_s: float, start_s: float) -> list[RequestRecord]:
    """Due one a second; the last ends `drain_s` after it was due."""
    due_s = [start_s + second for second in range(3)]
    return [record(at_s, (at_s + drain_s,), part=part, taken_s=at_s + 0.5 * (at_s - start_s)) for at_s in due_s]


def test_a_slow_server_was_offered_as_much_in_its_parts_as_a_fast_one() -> None:
    fast = measure([*part_of_three(0, 1.0, 0.0), *part_of_three(1, 1.0, 3.0)], [SLO])
    slow = measure([*part_of_three(0, 10.0, 0.0), *part_of_three(1, 10.0, 12.0)], [SLO])
    for each in (fast, slow):
        assert (each.num_parts, each.offered_s, each.offered_rps) == (2, 4.0, 1.0)
        assert each.sending_rate_ratio == pytest.approx(4 / 6)
    # What each took to answer is in its duration.
    assert (fast.duration_s, fast.tail_s, fast.finished_rps) == pytest.approx((6.0, 2.0, 1.0))
    assert (slow.duration_s, slow.tail_s, slow.finished_rps) == pytest.approx((24.0, 20.0, 0.25))


@given(st.integers(0, 2**16), st.floats(0.0, 1e4))
def test_how_long_passes_between_parts_changes_no_figure(seed: int, pause_s: float) -> None:
    first, second = served(20, 20.0, seed=seed), served(20, 20.0, seed=seed + 1)
    times = ("due_s", "taken_s", "sent_s", "headers_s", "end_s")
    later = [
        replace(
            each,
            part=1,
            chunk_s=array("d", [at_s + pause_s for at_s in each.chunk_s]),
            **{name: getattr(each, name) + pause_s for name in times},
        )
        for each in second
    ]
    before = plain(measure([*first, *(replace(each, part=1) for each in second)], SLOS))
    after = plain(measure([*first, *later], SLOS))
    for name, value in before.items():
        close = pytest.approx(value, rel=1e-4, abs=5e-3) if isinstance(value, float) else value
        assert after[name] == close, name


def test_parts_of_a_single_request_are_offered_over_the_whole_duration() -> None:
    metrics = measure([record(0.0, (2.0,), part=0), record(5.0, (7.0,), part=1)], [SLO])
    assert (metrics.offered_s, metrics.offered_rps, metrics.duration_s) == (4.0, 0.5, 4.0)


def test_what_a_search_gave_up_is_missed_and_no_error() -> None:
    metrics = measure(
        [
            record(0.0, (0.1,)),
            record(0.0, outcome=Outcome.GIVEN_UP, end_s=5.0),
            record(0.0, outcome=Outcome.REFUSED, end_s=0.1),
        ],
        [SLO],
    )
    assert (metrics.num_requests, metrics.num_given_up, metrics.num_failed) == (3, 1, 1)
    assert [each.kind for each in metrics.errors] == ["refused"]
    assert metrics.attainment.joint == pytest.approx(1 / 3)
    # How long it had waited is less than its TTFT would have been.
    assert (metrics.ttft.count, metrics.ttft.max_ms) == pytest.approx((2, 5000.0))


def test_turns_of_a_broken_chat_are_failures() -> None:
    lost = RequestRecord(
        index=1, item=0, turn=1, slo_class="interactive", prompt_tokens=100, output_tokens=5, due_s=1.0, end_s=1.0,
        outcome=Outcome.TURN_LOST, detail="an earlier turn of the chat failed",
    )  # fmt: skip
    metrics = measure([record(0.0, outcome=Outcome.HTTP_5XX, end_s=1.0), lost, record(2.0, (2.1,))], [SLO])
    assert (metrics.num_requests, metrics.num_failed) == (3, 2)
    assert {each.kind: each.count for each in metrics.errors} == {"http_5xx": 1, "turn_lost": 1}
    assert (metrics.attainment.num_requests, metrics.attainment.joint) == pytest.approx((3, 1 / 3))
    assert (metrics.offered_rps, metrics.send_lag.count) == (1.0, 2)


def test_all_at_once_are_offered_over_the_whole_duration() -> None:
    metrics = measure([record(3.0, (3.1,)), record(3.0, (5.0,))], [SLO])
    assert (metrics.offered_s, metrics.offered_rps) == (2.0, 1.0)


def test_without_a_request_nothing_is_known() -> None:
    metrics = measure([], [SLO])
    assert metrics.num_requests == 0
    assert math.isnan(metrics.attainment.joint)
    assert math.isnan(metrics.offered_rps)
    assert metrics.ttft.count == metrics.itl.count == 0


def test_gaps_are_within_answers_and_not_between_them() -> None:
    records = [record(0.0, (1.0, 3.0, 4.0)), record(0.0, (9.0,)), record(0.0), record(0.0, (2.0, 7.0))]
    assert token_gaps_s(records).tolist() == [2.0, 1.0, 5.0]
    np.testing.assert_equal(columns_of(records).longest_gap_s, [2.0, math.nan, math.nan, 5.0])


def test_texts_beyond_the_limit_are_told_as_one() -> None:
    records = [record(0.0, outcome=Outcome.HTTP_5XX, end_s=1.0, detail=f"request {number}") for number in range(1500)]
    detail = columns_of(records).detail
    assert detail[999] == "request 999"
    assert {detail[row] for row in range(1000, 1500)} == {"(more of other wording)"}


@pytest.mark.parametrize(
    ("share", "count", "low", "high"), [(0.9, 100, 0.8256, 0.9448), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0)]
)
def test_wilson_intervals_are_those_of_the_tables(share: float, count: int, low: float, high: float) -> None:
    interval = wilson(share, count)
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=1e-4)
    assert math.isnan(wilson(math.nan, 0).low)


# --- of any records -------------------------------------------------------------------------------

_gap_s = st.floats(0.001, 0.2)


@st.composite
def any_record(draw: st.DrawFn) -> RequestRecord:
    due_s = draw(st.floats(0.0, 100.0))
    outcome = draw(st.sampled_from(Outcome))
    gaps = draw(st.lists(_gap_s, max_size=5))
    if outcome is Outcome.FINISHED and not gaps:
        gaps = [0.1]
    chunk_s = (due_s + np.cumsum(gaps)).tolist()
    return record(
        due_s,
        chunk_s,
        outcome=outcome,
        end_s=chunk_s[-1] if chunk_s else due_s + draw(_gap_s) * 5,
        slo_class=draw(st.sampled_from(["interactive", "batch"])),
        is_warmup=draw(st.booleans()),
    )


@given(st.lists(any_record(), max_size=12))
def test_shares_are_shares_and_counts_add_up(records: list[RequestRecord]) -> None:
    metrics = measure(records, SLOS)
    for each in (metrics.attainment, *metrics.classes):
        if each.num_requests:
            assert 0 <= each.joint <= min(each.ttft_only, each.tpot_only) <= 1
    if metrics.attainment.num_requests:
        interval = metrics.attainment_interval
        assert 0 <= interval.low <= metrics.attainment.joint <= interval.high <= 1
    ends = (metrics.num_finished, metrics.num_cancelled, metrics.num_rejected, metrics.num_timed_out)
    assert sum(ends) + metrics.num_given_up + metrics.num_failed == metrics.num_requests
    assert metrics.num_requests + metrics.num_interrupted + metrics.num_unsent + metrics.num_warmup == len(records)


@given(
    st.lists(any_record(), min_size=1, max_size=12), st.sampled_from([kind for kind in Outcome if kind.is_failure]),
    st.data(),
)  # fmt: skip
def test_a_failure_never_raises_attainment(records: list[RequestRecord], kind: Outcome, data: st.DataObject) -> None:
    before = measure(records, SLOS).attainment
    row = data.draw(st.integers(0, len(records) - 1))
    worse = [replace(each, outcome=kind) if number == row else each for number, each in enumerate(records)]
    for failing in (worse, [*records, record(50.0, outcome=kind, end_s=51.0)]):
        after = measure(failing, SLOS).attainment
        if before.num_requests and after.num_requests:
            assert after.joint <= before.joint + 1e-12


@given(st.data())
def test_the_order_of_records_does_not_matter(data: st.DataObject) -> None:
    records = data.draw(st.lists(any_record(), max_size=12))
    shuffled = data.draw(st.permutations(records))
    before, after = plain(measure(records, SLOS)), plain(measure(shuffled, SLOS))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert after[name] == (pytest.approx(value) if isinstance(value, float) else value), name


def test_columns_say_of_each_request_what_its_record_says() -> None:
    records = served(300, 14.0, seed=3)
    columns = columns_of(records)
    for row, each in enumerate(records):
        first_s, last_s = (each.chunk_s[0], each.chunk_s[-1]) if each.chunk_s else (math.nan, math.nan)
        gaps = each.answered_tokens - 1
        tpot_s = (last_s - first_s) / gaps if len(each.chunk_s) > 1 else math.nan
        figures = (columns.ttft_s[row], columns.tpot_s[row], columns.e2e_s[row])
        expected = (first_s - each.due_s, tpot_s, last_s - each.due_s)
        assert figures == pytest.approx(expected, abs=2e-6, nan_ok=True)
        assert (columns.outcome[row], columns.detail[row]) == (each.outcome, each.detail)


def plain(metrics: LoadMetrics) -> dict[str, object]:
    """Figures by their path: `ttft.p50_ms`; those that are not known are None."""
    found: dict[str, object] = {}

    def walk(path: str, node: object) -> None:
        if isinstance(node, dict):
            for name, value in cast("dict[str, object]", node).items():
                walk(f"{path}.{name}", value)
        elif isinstance(node, list):
            for number, value in enumerate(cast("list[object]", node)):
                walk(f"{path}.{number}", value)
        else:
            found[path] = node

    walk("", msgspec.json.decode(msgspec.json.encode(metrics)))
    return found
