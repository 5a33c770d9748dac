"""A report of `tandem simulate`, as it writes them, of a study made by hand."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from simulator.study.metrics import measure
from simulator.study.report import Report, RunFigures, report_json
from tests.support.study_results import Row, make_result
from workload.goodput import GoodputSearch, RatePoint
from workload.slo import SloClass

if TYPE_CHECKING:
    from pathlib import Path

_SEARCH = GoodputSearch(
    target=0.9,
    goodput_rps=8.0,
    missed_rps=math.inf,
    points=(RatePoint(rate_rps=4.0, attainment=1.0), RatePoint(rate_rps=8.0, attainment=0.95)),
    converged=False,
)


def write_study(folder: Path) -> Path:
    """A study with a search, without gaps between tokens: its ITL is not known."""
    rows = (Row(0.0, ttft_s=0.2, e2e_s=0.6), Row(1.0, ttft_s=0.4, e2e_s=0.8))
    report = Report(
        study={"command": "tandem simulate"},
        workload="two simulated requests",
        cluster="2 prefill workers",
        latency="made by hand",
        metrics=measure(make_result(*rows), [SloClass("interactive", 300.0, 50.0)]),
        run=RunFigures(wall_s=0.5, num_events=123, num_steps=70, events_per_s=246.0),
        goodput_search=_SEARCH,
    )
    path = folder / "report.json"
    path.write_bytes(report_json(report))
    return path
