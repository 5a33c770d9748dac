"""How many requests were in which state, counted from their times."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loadtest.columns import columns_of
from loadtest.metrics import is_failed
from loadtest.record import Outcome
from loadtest.report.timeline import POINTS, ended, in_flight
from tests.support.load_records import record, served


def test_states_of_two_requests() -> None:
    line = in_flight(columns_of([record(0.0, (4.0, 10.0)), record(2.0, outcome=Outcome.TIMEOUT, end_s=6.0)]))
    assert (len(line.at_s), line.at_s[0], line.at_s[-1]) == (POINTS, 0.0, 10.0)
    for at_s, waiting, streaming in ((1.0, 1, 0), (3.0, 2, 0), (5.0, 1, 1), (7.0, 0, 1)):
        point = int(np.searchsorted(line.at_s, at_s))
        assert (line.waiting[point], line.streaming[point]) == (waiting, streaming)
    assert (line.waiting[-1], line.streaming[-1]) == (0, 0)


@given(st.integers(0, 2**16), st.integers(1, 60))
def test_open_requests_are_those_between_due_and_end(seed: int, count: int) -> None:
    records = served(count, 20.0, seed=seed)
    columns = columns_of(records)
    line = in_flight(columns)
    due_s, end_s = columns.due_s, columns.end_s
    for point in range(0, POINTS, 57):
        at_s = line.at_s[point]
        assert line.waiting[point] + line.streaming[point] == ((due_s <= at_s) & (end_s > at_s)).sum()


def test_ends_are_counted_by_what_they_were() -> None:
    columns = columns_of(served(500, 14.0, seed=4))
    failed = is_failed(columns)
    line = ended(columns, failed)
    width_s = line.edges_s[1] - line.edges_s[0]
    assert round(float(line.due_rps.sum() * width_s)) == 500
    assert round(float(line.failed_rps.sum() * width_s)) == failed.sum() > 0
    assert round(float(line.finished_rps.sum() * width_s)) == columns.is_finished.sum()


def test_requests_given_up_are_no_failures_of_the_server() -> None:
    columns = columns_of([record(0.0, outcome=kind, end_s=1.0) for kind in (Outcome.GIVEN_UP, Outcome.TURN_LOST)])
    assert is_failed(columns).tolist() == [False, True]


def test_nothing_and_everything_at_once() -> None:
    nothing = columns_of([record(0.0, outcome=Outcome.UNSENT)])
    nothing.due_s[:] = np.nan
    assert len(in_flight(nothing).at_s) == len(ended(nothing, is_failed(nothing)).edges_s) == 0
    refused = columns_of([record(5.0, outcome=Outcome.REFUSED, end_s=5.0)] * 3)
    line = ended(refused, is_failed(refused))
    assert line.failed_rps.max() == line.due_rps.max() == 3 * len(line.due_rps)
