"""When a run says that it measured the client."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadtest.metrics import measure
from loadtest.record import Outcome
from loadtest.validity import ClientUsage, judge
from tests.support.load_records import record
from workload.figures import summarise
from workload.slo import SloClass

if TYPE_CHECKING:
    from loadtest.metrics import LoadMetrics

SLO = SloClass("interactive", 300.0, 50.0)


def client(*, cpu_share: float = 0.5, delay_s: float = 0.001) -> ClientUsage:
    return ClientUsage(cpu_share=cpu_share, loop_delay=summarise(np.full(100, delay_s)))


def measured(*, lag_s: float = 0.001, outcome: Outcome = Outcome.FINISHED, stretch: float = 1.0) -> LoadMetrics:
    """Of 100 requests, due one a second."""
    records = [
        record(float(second), (second + 20.0,), taken_s=second * stretch + lag_s, outcome=outcome)
        for second in range(100)
    ]
    return measure(records, [SLO])


def test_a_client_that_kept_its_times_is_valid() -> None:
    assert judge(measured(), client()).valid
    assert judge(measured(), client()).reasons == ()


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.TIMEOUT, Outcome.HTTP_5XX])
def test_a_server_that_fails_everything_leaves_the_run_valid(outcome: Outcome) -> None:
    assert judge(measured(outcome=outcome), client()).valid


@pytest.mark.parametrize(
    ("metrics", "usage", "reason"),
    [
        (measured(lag_s=0.0101), client(), "the client sent late: p99 of the send lag is 10.1 ms, over 10 ms"),
        (measured(), client(delay_s=0.011), "p99 of its event loop's delay is 11.0 ms, over 10 ms"),
        (measured(), client(cpu_share=0.96), "the client needed 96% of a core, over 95%"),
        (measured(outcome=Outcome.CLIENT_LIMIT), client(), "100 requests failed for want of file descriptors"),
        (measure([], [SLO]), client(), "no request was measured"),
    ],
)
def test_each_limit_makes_it_invalid(metrics: LoadMetrics, usage: ClientUsage, reason: str) -> None:
    (said,) = judge(metrics, usage).reasons
    assert reason in said


def test_a_rate_that_was_not_kept_is_told_beside_the_lag() -> None:
    reasons = judge(measured(stretch=1.05), client()).reasons
    assert [reason.split(":")[0] for reason in reasons] == [
        "the client sent late",
        "the client sent at 95.2% of the planned rate, under 99%",
    ]


def test_the_limit_of_the_lag_can_be_raised() -> None:
    assert judge(measured(lag_s=0.04), client(delay_s=0.04), max_lag_ms=50.0).valid
