"""The figures of a study, on rows whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from contracts.errors import ConfigError
from simulator.heap.results import REFUSALS, Outcome
from simulator.study.metrics import measure, request_latencies
from tests.support.study_results import Row, make_result
from workload.slo import SloClass

#: TTFT at most 300 ms, TPOT at most 50 ms: an answer of 11 tokens has 0.5 s behind its first token.
SLO = SloClass("interactive", 300.0, 50.0)

GOOD = Row(0.0, ttft_s=0.2, e2e_s=0.6)
LATE_START = Row(1.0, ttft_s=0.4, e2e_s=0.8)
SLOW_TOKENS = Row(2.0, ttft_s=0.2, e2e_s=0.9)


def test_attainment_is_joint_and_each_alone_is_beside_it() -> None:
    attainment = measure(make_result(GOOD, LATE_START, SLOW_TOKENS), [SLO]).attainment
    assert (attainment.ttft_only, attainment.tpot_only) == (2 / 3, 2 / 3)
    assert attainment.joint == 1 / 3
    assert (attainment.ttft_target_ms, attainment.tpot_target_ms) == (300.0, 50.0)


@pytest.mark.parametrize("outcome", [Outcome.REJECTED, Outcome.TIMED_OUT, Outcome.FAILED])
def test_what_did_not_finish_missed_everything_however_early_its_first_token(outcome: Outcome) -> None:
    unfinished = Row(1.0, ttft_s=0.1, e2e_s=0.2, outcome=outcome)
    metrics = measure(make_result(GOOD, unfinished), [SLO])
    assert metrics.attainment.joint == metrics.attainment.ttft_only == metrics.attainment.tpot_only == 0.5
    counts = (metrics.num_finished, metrics.num_rejected, metrics.num_timed_out, metrics.num_failed)
    assert counts == tuple(int(each in (Outcome.FINISHED, outcome)) for each in Outcome)
    assert metrics.tpot.count == metrics.e2e.count == 1


def test_targets_are_met_at_the_very_value() -> None:
    exact = Row(0.0, ttft_s=0.25, e2e_s=0.75, output_tokens=3)
    assert measure(make_result(exact, GOOD), [SloClass("interactive", 250.0, 250.0)]).attainment.joint == 1.0
    assert measure(make_result(exact, GOOD), [SloClass("interactive", 250.0, 249.0)]).attainment.joint == 0.5


def test_an_answer_of_one_token_has_no_tpot_and_meets_any() -> None:
    single = Row(0.0, ttft_s=0.1, e2e_s=0.1, output_tokens=1)
    metrics = measure(make_result(single, single), [SloClass("interactive", 300.0, 1e-9)])
    assert metrics.attainment.joint == 1.0
    assert metrics.tpot.count == 0
    assert math.isnan(metrics.tpot.p99_ms)


def test_goodput_is_the_met_share_of_the_offered_rate() -> None:
    rows = [GOOD._replace(arrival_s=float(second)) for second in range(9)]
    metrics = measure(make_result(*rows, LATE_START._replace(arrival_s=18.0)), [SLO])
    assert metrics.offered_s == 18.0
    assert metrics.offered_rps == pytest.approx(0.5)
    assert metrics.goodput_rps == pytest.approx(0.45)
    assert metrics.num_devices == 4
    assert metrics.goodput_per_device_rps == pytest.approx(0.45 / 4)


def test_requests_that_come_at_once_are_offered_over_the_whole_study() -> None:
    metrics = measure(make_result(GOOD, GOOD, duration_s=4.0), [SLO])
    assert (metrics.offered_s, metrics.offered_rps) == (4.0, 0.5)


def test_each_class_has_its_own_targets() -> None:
    classes = ("interactive", "batch")
    rows = [GOOD, LATE_START, LATE_START._replace(slo_class=1), SLOW_TOKENS._replace(slo_class=1)]
    metrics = measure(make_result(*rows, slo_classes=classes), [SloClass("batch", 1000.0, 60.0), SLO])
    assert [(each.name, each.num_requests, each.joint) for each in metrics.classes] == [
        ("interactive", 2, 0.5),
        ("batch", 2, 0.5),
    ]
    assert metrics.attainment.joint == 0.5
    assert metrics.attainment.ttft_target_ms is None
    with pytest.raises(ConfigError, match="no SLO is given for the class 'batch'; there are interactive"):
        measure(make_result(*rows, slo_classes=classes), [SLO])


def test_percentiles_and_means_are_those_of_numpy() -> None:
    ttfts_s = [0.001 * (number + 1) for number in range(1000)]
    rows = [Row(float(number), ttft_s=ttft_s, e2e_s=ttft_s + 0.1) for number, ttft_s in enumerate(ttfts_s)]
    ttft = measure(make_result(*rows), [SLO]).ttft
    assert ttft.count == 1000
    assert ttft.mean_ms == pytest.approx(500.5)
    assert ttft.p50_ms == pytest.approx(np.quantile(ttfts_s, 0.5) * 1e3)
    assert ttft.p99_ms == pytest.approx(np.quantile(ttfts_s, 0.99) * 1e3)
    assert ttft.max_ms == pytest.approx(1000.0)


def test_the_other_latencies() -> None:
    row = Row(5.0, ttft_s=0.2, e2e_s=0.7, queue_s=0.05, second_token_gap_s=0.03)
    metrics = measure(make_result(row, gaps_s=(0.02, 0.02, 0.04)), [SLO])
    assert metrics.queue.mean_ms == pytest.approx(50.0)
    assert metrics.second_token.mean_ms == pytest.approx(30.0)
    assert metrics.e2e.mean_ms == pytest.approx(700.0)
    assert metrics.tpot.mean_ms == pytest.approx(50.0)
    assert metrics.itl.count == 3
    assert metrics.itl.mean_ms == pytest.approx(80 / 3)
    assert metrics.itl.p50_ms == pytest.approx(20.0, rel=0.01)


def test_pools_sum_their_workers() -> None:
    metrics = measure(make_result(GOOD), [SLO])
    prefill, decode = metrics.pools
    assert (prefill.name, prefill.num_workers, prefill.num_devices) == ("prefill", 2, 2)
    assert (decode.name, decode.num_workers, decode.num_devices) == ("decode", 1, 2)
    assert prefill.busy_share == pytest.approx(80 / 200)
    assert decode.busy_share == pytest.approx(0.9)
    assert [prefill.mean_kv_share, prefill.peak_kv_share] == pytest.approx([0.2, 0.8])
    assert [decode.mean_kv_share, decode.peak_kv_share] == pytest.approx([0.25, 1.0])
    assert prefill.prefill_tokens_per_step == pytest.approx(150.0)
    assert decode.decodes_per_step == pytest.approx(8.0)


def test_transfers_count_the_handoffs_that_went_over_a_wire() -> None:
    rows = [GOOD._replace(transfer_s=0.5), GOOD._replace(transfer_s=1.5), GOOD]
    transfer = measure(make_result(*rows, transfer_bytes=4000, duration_s=10.0), [SLO]).transfer
    assert (transfer.num_transfers, transfer.total_bytes) == (2, 4000)
    assert transfer.mean_ms == pytest.approx(1000.0)
    assert transfer.mean_bytes_per_s == pytest.approx(400.0)
    assert transfer.mean_flow_bytes_per_s == pytest.approx(2000.0)


def test_tokens_per_second_are_those_of_finished_requests() -> None:
    refused = GOOD._replace(outcome=Outcome.REJECTED, prompt_tokens=10_000)
    metrics = measure(make_result(GOOD, GOOD, refused, duration_s=10.0), [SLO])
    assert metrics.prompt_tokens_per_s == pytest.approx(20.0)
    assert metrics.output_tokens_per_s == pytest.approx(2.2)


def test_no_request_has_no_figures() -> None:
    with pytest.raises(ValueError, match="without requests"):
        measure(make_result(), [SLO])


def test_latencies_are_nan_where_a_request_did_not_come_so_far() -> None:
    latencies = request_latencies(make_result(GOOD, Row(1.0, outcome=Outcome.REJECTED)), [SLO])
    assert np.isnan(latencies.ttft_s).tolist() == [False, True]
    assert np.isnan(latencies.e2e_s).tolist() == [False, True]
    assert latencies.met.tolist() == [True, False]


def test_refusals_by_reason() -> None:
    ttft, tpot = (Row(1.0, outcome=Outcome.REJECTED, refusal=REFUSALS.index(reason)) for reason in ("ttft", "tpot"))
    served_later = GOOD._replace(refusal=REFUSALS.index("queue"))
    metrics = measure(make_result(served_later, ttft, tpot, ttft), [SLO])
    assert metrics.rejected_for == {"ttft": 2, "tpot": 1}


def test_prefixes_as_shares_of_what_was_read() -> None:
    cached = GOOD._replace(cached_tokens=60)
    fetched = GOOD._replace(cached_tokens=80, fetched_tokens=40, fetch_s=0.25)
    refused = Row(2.0, outcome=Outcome.REJECTED, queue_s=math.nan, prompt_tokens=1000)
    prefixes = measure(make_result(cached, fetched, GOOD, GOOD, refused), [SLO]).prefixes
    assert (prefixes.cached_share, prefixes.fetched_share) == (0.35, 0.1)
    assert (prefixes.num_fetches, prefixes.fetched_bytes) == (1, 40_000)
    assert prefixes.mean_fetch_ms == pytest.approx(250.0)
    assert math.isnan(measure(make_result(GOOD), [SLO]).prefixes.mean_fetch_ms)


def test_predictions_against_what_came() -> None:
    """Times to the first token of 0.2 s, tokens of 40 ms; one that did not finish says nothing."""
    early, late = (GOOD._replace(predicted_ttft_s=ttft_s, predicted_tpot_s=0.05) for ttft_s in (0.1, 0.5))
    unfinished = GOOD._replace(outcome=Outcome.TIMED_OUT, predicted_ttft_s=9.0, predicted_tpot_s=9.0)
    errors = measure(make_result(early, late, late, unfinished, GOOD), [SLO]).predictions
    assert errors.ttft_median_s == pytest.approx(0.3)
    assert errors.ttft_p90_abs_s == pytest.approx(0.3)
    assert errors.ttft_later_share == pytest.approx(1 / 3)
    assert errors.tpot_median_s == errors.tpot_p90_abs_s == pytest.approx(0.01)
    assert errors.tpot_later_share == 0.0
    assert math.isnan(measure(make_result(GOOD), [SLO]).predictions.ttft_median_s)
