"""What a study prints and writes."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from simulator.heap.results import REFUSALS, Outcome
from simulator.study.metrics import measure
from simulator.study.plots import write_plots
from simulator.study.progress import StudyProgress
from simulator.study.report import Report, RunFigures, report_json, report_text, unserved_warnings
from tests.support.study_results import Row, make_result
from workload.goodput import GoodputSearch, RatePoint
from workload.slo import SloClass

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from simulator.heap.results import StudyResult

SLO = SloClass("interactive", 300.0, 50.0)
ROWS = (
    Row(0.0, ttft_s=0.2, e2e_s=0.6, transfer_s=0.5),
    Row(1.0, ttft_s=0.4, e2e_s=0.8, transfer_s=0.5),
    Row(2.0, outcome=Outcome.REJECTED),
    Row(4.0, outcome=Outcome.TIMED_OUT),
)


def make_report(search: GoodputSearch | None = None, warnings: tuple[str, ...] = ()) -> Report:
    return Report(
        study={"command": "tandem simulate", "versions": {"python": "3"}},
        workload="four requests",
        cluster="2 prefill workers\n1 decode worker",
        latency="made by hand",
        metrics=measure(make_result(*ROWS, transfer_bytes=10**9), [SLO]),
        run=RunFigures(wall_s=0.5, num_events=123, num_steps=70, events_per_s=246.0),
        goodput_search=search,
        warnings=warnings,
    )


def line_of(text: str, start: str) -> list[str]:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found.split()


def test_the_table_says_what_was_measured() -> None:
    text = report_text(make_report())
    assert line_of(text, "interactive") == ["interactive", "300", "50", "4", "25.00", "25.00", "50.00"]
    assert line_of(text, "TTFT ")[1:] == ["300.0", "300.0", "380.0", "390.0", "398.0", "400.0", "2"]
    assert line_of(text, "ITL")[1:] == ["-"] * 6 + ["0"]
    assert "2 of 4 requests finished, 1 refused, 1 timed out; all over after 100.0 s" in text
    assert "0.188 requests/s met both targets, of 0.750 offered; 0.0469 on each of 4 devices" in text
    assert "1.0 GB of KV in 2 handoffs" in text
    assert line_of(text, "prefill")[:7] == ["prefill", "prefill", "2", "2", "40.0", "20.0", "80.0"]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (ROWS, "of 4 requests, 1 refused and 1 timed out: "),
        (ROWS[:3], "of 3 requests, 1 refused: "),
        ((*ROWS[:2], ROWS[3]), "of 3 requests, 1 timed out: "),
    ],
)
def test_latencies_without_the_unserved_are_warned_of(rows: tuple[Row, ...], told: str) -> None:
    (warning,) = unserved_warnings(measure(make_result(*rows), [SLO]))
    assert warning.startswith(f"{told}latency percentiles leave out what these did not reach")


def test_nothing_is_warned_of_where_all_were_served() -> None:
    assert unserved_warnings(measure(make_result(*ROWS[:2]), [SLO])) == ()


def test_columns_stand_under_their_headings_and_long_facts_wrap() -> None:
    lines = report_text(make_report(warnings=("mind this " * 30,))).splitlines()
    heading = next(line for line in lines if line.startswith("latency ms"))
    ttft = next(line for line in lines if line.startswith("TTFT"))
    assert heading.index("p99") + len("p99") == ttft.index("398.0") + len("398.0")
    assert max(map(len, lines)) <= 118
    assert "cluster   2 prefill workers" in lines
    assert "          1 decode worker" in lines


@pytest.mark.parametrize(
    ("met_rps", "missed_rps", "sentence"),
    [
        (2.0, 2.02, "2.000 requests/s with attainment >= 90% (0.5000 per device); 2.020 miss it (2 runs)"),
        (2.0, math.inf, "at least 2.000 requests/s with attainment >= 90% (0.5000 per device): the highest rate"),
        (0.0, 0.1, "no rate: even 0.100 requests/s miss 90% attainment (2 runs)"),
    ],
)
def test_a_search_says_how_it_ended(met_rps: float, missed_rps: float, sentence: str) -> None:
    points = (RatePoint(rate_rps=4.0, attainment=0.25), RatePoint(rate_rps=2.0, attainment=0.95))
    search = GoodputSearch(target=0.9, goodput_rps=met_rps, missed_rps=missed_rps, points=points, converged=True)
    text = report_text(make_report(search))
    assert sentence in text
    tried = text[text.index("requests/s tried") :].splitlines()[1:3]
    assert [line.split() for line in tried] == [["2.000", "95.00"], ["4.000", "25.00"]]


def test_the_json_has_the_same_figures_under_names_with_units() -> None:
    search = GoodputSearch(target=0.9, goodput_rps=2.0, missed_rps=math.inf, points=(), converged=False)
    document = cast("dict[str, Any]", json.loads(report_json(make_report(search, ("careful",)))))
    assert list(document) == [
        "format",
        "study",
        "workload",
        "cluster",
        "latency",
        "metrics",
        "run",
        "goodput_search",
        "warnings",
    ]
    assert document["format"] == "tandem-study-1"
    metrics = document["metrics"]
    assert metrics["goodput_rps"] == 0.1875
    assert metrics["attainment"]["joint"] == 0.25
    assert metrics["ttft"]["p90_ms"] == pytest.approx(380.0)
    assert metrics["pools"][1]["busy_share"] == 0.9
    assert metrics["transfer"]["total_bytes"] == 10**9
    assert metrics["itl"]["p50_ms"] is None
    assert document["goodput_search"]["missed_rps"] is None
    assert document["warnings"] == ["careful"]
    assert document["study"]["command"] == "tandem simulate"


def ink(path: Path) -> float:
    """Share of the pixels of a PNG that are not white."""
    image: NDArray[np.float32] = imread(path)
    assert image.ndim == 3
    assert image.shape[0] > 300
    assert image.shape[1] > 500
    return np.count_nonzero(image[:, :, :3].min(axis=2) < 0.98) / image[:, :, 0].size


@pytest.mark.parametrize(
    "result",
    [
        pytest.param(make_result(*(row._replace(arrival_s=0.0) for row in ROWS)), id="all at once"),
        pytest.param(make_result(*ROWS[2:]), id="nothing was served"),
        pytest.param(
            make_result(*(Row(0.01 * n, ttft_s=0.1 + 1e-5 * n, e2e_s=1.0) for n in range(20_000)), gaps_s=(0.01, 0.05)),
            id="more than a scatter plot shows",
        ),
    ],
)
def test_the_plots_are_pictures_of_something(result: StudyResult, tmp_path: Path) -> None:
    paths = write_plots(result, [SLO], tmp_path)
    assert [path.name for path in paths] == ["latency_cdf.png", "timeline.png", "attainment.png", "ttft_by_prompt.png"]
    assert all(ink(path) > 0.01 for path in paths)
    assert sum(path.stat().st_size for path in paths) < 1_000_000


def test_progress_is_a_line_now_and_then_where_there_is_no_terminal() -> None:
    told = io.StringIO()
    times_s = iter((100.0, 109.9, 110.0, 110.0, 119.0))
    with StudyProgress("simulating", 5000, console=Console(file=told), now_s=lambda: next(times_s)) as progress:
        progress.update(1.0, 10)
        progress.update(2000.0, 1200)
        progress.update(2001.0, 1201)
    assert told.getvalue() == "simulating: 1,200 of 5,000 requests, 2,000 virtual s\n"


def test_progress_is_a_bar_on_a_terminal() -> None:
    told = io.StringIO()
    with StudyProgress("simulating", 5000, console=Console(file=told, force_terminal=True, width=120)) as progress:
        progress.update(2000.0, 1200)
    assert "1200/5000" in told.getvalue()
    assert "2,000 virtual s" in told.getvalue()


def test_refusals_prefixes_and_predictions_are_told_where_there_are_some() -> None:
    assert "predicted  " not in report_text(make_report())
    assert "prefixes  " not in report_text(make_report())
    rows = (
        Row(0.0, ttft_s=0.2, e2e_s=0.6, cached_tokens=50, fetched_tokens=20, fetch_s=0.1, predicted_ttft_s=0.3,
            predicted_tpot_s=0.04),
        Row(2.0, outcome=Outcome.REJECTED, refusal=REFUSALS.index("ttft"), queue_s=math.nan),
    )  # fmt: skip
    text = report_text(replace(make_report(), metrics=measure(make_result(*rows), [SLO])))
    assert "1 refused (ttft 1)" in text
    assert "50.0% of the prompt tokens read were found in a cache, 20.0% had been copied there: 1 copies" in text
    assert "TTFT +100.0 ms in the median (0% came later than predicted" in text
