"""Two runs of one workload beside each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from loadtest.record import Outcome
from loadtest.report import compare
from loadtest.report.compare import compare_reports, compare_runs
from tests.support.load_records import SLOS, Server, make_report, make_run, record, served

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.record import RequestRecord
    from loadtest.report.compare import Comparison


def ordinary(count: int = 40, ttft_s: float = 0.1) -> list[RequestRecord]:
    """One a second; waits differ from request to request."""
    waits_s = [ttft_s * (1 + row % 7) for row in range(count)]
    return [
        record(float(row), (row + wait_s, row + wait_s + 0.03), index=row, slo_class="batch")
        for row, wait_s in enumerate(waits_s)
    ]


def compared(a: Sequence[RequestRecord], b: Sequence[RequestRecord]) -> Comparison:
    (comparison,) = compare_runs((make_run(a, name="a"), make_run(b, name="b")), SLOS)
    return comparison


def test_a_run_does_not_differ_from_itself() -> None:
    comparison = compared(served(400, 10.0, seed=1), served(400, 10.0, seed=1))
    assert all(each.ratio == each.interval.low == each.interval.high == 1.0 for each in comparison.paired)
    assert comparison.attainment.difference == 0.0
    assert all(each.ratio == pytest.approx(1.0) for each in comparison.aggregates if not math.isnan(each.ratio))
    assert comparison.verdict == (
        "No difference that is more than noise: TTFT, TPOT, longest gap, end to end, attainment.",
    )


def test_each_request_is_compared_with_itself() -> None:
    comparison = compared(ordinary(ttft_s=0.1), ordinary(ttft_s=0.2))
    ttft, tpot, *_ = comparison.paired
    assert (ttft.num_pairs, ttft.ratio) == pytest.approx((40, 2.0))
    assert ttft.interval.low == pytest.approx(2.0)
    assert (ttft.differs, tpot.differs) == (True, False)
    assert "TTFT: b takes 2.000 times as long as a (95 %: 2.000 to 2.000)." in comparison.verdict


def test_the_other_way_round_is_the_reciprocal() -> None:
    fast, slow = served(300, 14.0, seed=2), served(300, 14.0, seed=2, server=Server(num_slots=18))
    for forth, back in zip(compared(fast, slow).paired, compared(slow, fast).paired, strict=True):
        assert forth.num_pairs == back.num_pairs > 200
        assert forth.ratio == pytest.approx(1 / back.ratio, rel=1e-12)
        assert forth.interval.low == pytest.approx(1 / back.interval.high, rel=1e-9)
        assert forth.interval.high == pytest.approx(1 / back.interval.low, rel=1e-9)


def test_a_slower_server_is_found_out() -> None:
    comparison = compared(served(600, 12.0, seed=5), served(600, 12.0, seed=5, server=Server(prefill_s_per_token=3e-4)))
    ttft, tpot, *_ = comparison.paired
    assert ttft.differs
    assert ttft.interval.low < ttft.ratio < ttft.interval.high
    assert 1.3 < ttft.ratio < 1.8
    assert not tpot.differs


def test_requests_that_failed_in_one_run_are_in_no_ratio_and_in_the_attainment() -> None:
    failing = [
        record(each.due_s, outcome=Outcome.REFUSED, end_s=each.due_s, index=each.index) if row < 10 else each
        for row, each in enumerate(ordinary())
    ]
    comparison = compared(ordinary(), failing)
    assert comparison.paired[0].num_pairs == 30
    assert comparison.attainment.num_pairs == 40
    assert comparison.attainment.difference == pytest.approx(-10 / 40)


def test_order_and_warm_up_do_not_matter_to_the_pairs() -> None:
    a, b = ordinary(), ordinary(ttft_s=0.2)
    warm = [replace(each, is_warmup=True) if each.index < 5 else each for each in b]
    comparison = compared(a, list(reversed(warm)))
    assert (comparison.paired[0].num_pairs, comparison.paired[0].ratio) == pytest.approx((35, 2.0))


def test_few_pairs_say_nothing() -> None:
    comparison = compared(ordinary(5), ordinary(5, ttft_s=0.2))
    assert math.isnan(comparison.paired[0].interval.low)
    assert not comparison.paired[0].differs
    assert comparison.verdict == ("Too few pairs to tell (under 20): TTFT, TPOT, longest gap, end to end.",)


def test_many_pairs_are_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "MAX_PAIRS", 30)
    ttft = compared(ordinary(), ordinary(ttft_s=0.2)).paired[0]
    assert (ttft.num_pairs, ttft.num_resampled) == (40, 30)


def test_reports_of_different_workloads_are_not_paired() -> None:
    a, b = make_report(make_run(ordinary()), digest="a"), make_report(make_run(ordinary(ttft_s=0.2)), digest="b")
    (comparison,) = compare_reports(a, b)
    assert comparison.paired == ()
    assert comparison.verdict == (
        "Requests are not paired: the reports are of different workloads. Only the figures of the whole runs are "
        "compared.",
    )
    ratios = {each.name: each.ratio for each in comparison.aggregates}
    assert ratios["ttft_p50_ms"] == pytest.approx(2.0)
    assert ratios["offered_rps"] == pytest.approx(1.0)


def test_runs_of_two_reports_are_matched_by_name() -> None:
    a = make_report(make_run(ordinary(), name="x"), make_run(ordinary(), name="y"))
    b = make_report(make_run(ordinary(), name="y"), make_run(ordinary(), name="z"))
    (comparison,) = compare_reports(a, b)
    assert (comparison.name_a, comparison.name_b) == ("A (y)", "B (y)")
    assert compare_reports(make_report(*a.runs), make_report(make_run(ordinary(), name="z"))) == ()
    (single,) = compare_reports(make_report(make_run(ordinary(), name="x")), make_report(b.runs[0]))
    assert (single.name_a, single.name_b) == ("A (x)", "B (y)")


def test_what_forbids_a_conclusion_comes_first() -> None:
    slow_client = make_run(ordinary(ttft_s=0.2), name="b", cpu_share=0.99)
    (comparison,) = compare_runs((make_run(ordinary(), name="a"), slow_client), SLOS)
    assert comparison.verdict[0].startswith("b is invalid, so nothing follows for its server: the client needed 99%")
    twice = [
        record(each.due_s / 2, [at - each.due_s / 2 for at in each.chunk_s], index=each.index) for each in ordinary()
    ]
    assert compared(ordinary(), twice).verdict[0] == "The offered rates differ: 1.000 and 2.000 requests/s."


def test_a_server_at_its_limit_is_warned_of() -> None:
    overloaded = [record(0.0, outcome=Outcome.TIMEOUT, end_s=9.0, index=row, slo_class="batch") for row in range(40)]
    assert "Under 90% of the requests met their targets" in " ".join(compared(ordinary(), overloaded).verdict)
    assert "Under 90%" not in " ".join(compared(ordinary(), ordinary()).verdict)
