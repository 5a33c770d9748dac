"""A report that was written is read as it was; what is none is refused with the file's name."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np
import pytest

from contracts.errors import ConfigError
from loadtest.columns import UNKNOWN
from loadtest.metrics import Takeovers
from loadtest.record import Outcome
from loadtest.report.beside import read_beside
from loadtest.report.compare import compare_runs
from loadtest.report.document import LoadReport, RateResult, ServerGauges, read_report, report_json
from tests.support.load_records import SLOS, make_report, make_run, record, served
from tests.support.study_report import write_study
from workload.goodput import GoodputSearch, RatePoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEARCH = GoodputSearch(
    target=0.9,
    goodput_rps=8.0,
    missed_rps=math.inf,
    points=(RatePoint(rate_rps=8.0, attainment=0.95),),
    converged=False,
)


def full_report(folder: Path) -> LoadReport:
    """With something in every field."""
    run = make_run(served(120, 14.0, seed=1), name="a")
    run = msgspec.structs.replace(
        run,
        search=SEARCH,
        rates=(RateResult.of(8.0, run.metrics, run.validity), RateResult.simulated(9.0, 0.5, 100)),
        gauges=ServerGauges(at_s=np.array([0.0, 1.0]), running=np.array([1.0, 2.0]), waiting=np.array([0.0, 3.0])),
        notes=("it takes no token ids",),
    )
    other = make_run(served(120, 14.0, seed=1), name="b")
    (folder / "study").mkdir()
    beside = read_beside(write_study(folder / "study"))
    return make_report(run, other, comparisons=compare_runs((run, other), SLOS), beside=beside)


def report_of_nothing(folder: Path) -> LoadReport:
    return make_report(make_run([]))


def report_of_a_failure(folder: Path) -> LoadReport:
    return make_report(make_run([record(0.0, outcome=Outcome.REFUSED, end_s=0.1)]))


def written(folder: Path, report: LoadReport | dict[str, Any]) -> Path:
    path = folder / "report.json"
    path.write_bytes(report_json(report) if isinstance(report, LoadReport) else json.dumps(report).encode())
    return path


@pytest.mark.parametrize(
    "make",
    [
        full_report,
        report_of_nothing,
        report_of_a_failure,
    ],
    ids=["full", "of nothing", "of one failure"],
)
def test_what_was_written_is_read(make: Callable[[Path], LoadReport], tmp_path: Path) -> None:
    report = make(tmp_path)
    again = read_report(written(tmp_path, report))
    assert report_json(again) == report_json(report)
    for run, same in zip(report.runs, again.runs, strict=True):
        for name in ("due_s", "connect_s", "first_token_s", "usage_output_tokens", "is_warmup", "longest_gap_s"):
            before, after = getattr(run.requests, name), getattr(same.requests, name)
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        assert (same.metrics.num_requests, same.search) == (run.metrics.num_requests, run.search)


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    document = cast("dict[str, Any]", json.loads(report_json(full_report(tmp_path)), parse_constant=pytest.fail))
    assert document["format"] == "tandem-loadtest-1"
    requests = document["runs"][0]["requests"]
    assert None in requests["connect_s"]
    assert -1 not in requests["usage_output_tokens"]
    assert document["runs"][0]["search"]["missed_rps"] is None


def test_a_report_from_before_moves_were_told_is_read(tmp_path: Path) -> None:
    document = cast("dict[str, Any]", json.loads(report_json(make_report(make_run([record(0.0, (0.1,))])))))
    del document["runs"][0]["metrics"]["takeovers"]
    for name in ("num_moves", "num_replays"):
        del document["runs"][0]["requests"][name]
    (run,) = read_report(written(tmp_path, document)).runs
    assert run.metrics.takeovers == Takeovers()
    assert run.requests.num_moves.tolist() == run.requests.num_replays.tolist() == [UNKNOWN]


def _cut_column(document: dict[str, Any]) -> None:
    del document["runs"][0]["requests"]["sent_s"][0]


def _bad_code(document: dict[str, Any]) -> None:
    document["runs"][0]["requests"]["outcome"]["codes"][0] = 99


def _text_in_column(document: dict[str, Any]) -> None:
    document["runs"][0]["requests"]["sent_s"][0] = "soon"


def _no_metrics(document: dict[str, Any]) -> None:
    del document["runs"][0]["metrics"]


def _text_for_number(document: dict[str, Any]) -> None:
    document["runs"][0]["metrics"]["num_requests"] = "many"


def _other_format(document: dict[str, Any]) -> None:
    document["format"] = "tandem-loadtest-99"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_cut_column, r"run 'server': sent_s has 1 rows, index 2"),
        (_bad_code, r"run 'server': outcome has codes without a value"),
        (_text_in_column, r"a column of float holds something else"),
        (_no_metrics, r"missing required field `metrics` - at `\$.runs\[0\]`"),
        (_text_for_number, r"Expected `int`, got `str` - at `\$.runs\[0\].metrics.num_requests`"),
        (_other_format, r"its format is 'tandem-loadtest-99', not 'tandem-loadtest-1'"),
    ],
)
def test_what_is_no_report_is_refused_by_name(
    spoil: Callable[[dict[str, Any]], None], said: str, tmp_path: Path
) -> None:
    report = make_report(make_run([record(0.0, (0.1,)), record(1.0, (1.1,), index=1)]))
    document = cast("dict[str, Any]", json.loads(report_json(report)))
    spoil(document)
    path = written(tmp_path, document)
    with pytest.raises(ConfigError, match=said) as refused:
        read_report(path)
    assert str(path) in refused.value.message


@pytest.mark.parametrize(("content", "said"), [(b"{", "no JSON"), (b"[1]", "no JSON object"), (None, "No such file")])
def test_a_file_that_holds_no_document_is_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    for read in (read_report, read_beside):
        with pytest.raises(ConfigError, match=said):
            read(path)


def test_a_simulation_is_shown_by_its_own_figures(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    (beside,) = read_beside(path)
    study = cast("dict[str, Any]", json.loads(path.read_bytes()))
    assert beside.is_simulated
    assert (beside.name, beside.workload) == (tmp_path.name, "two simulated requests")
    assert beside.itl.count == 0
    assert math.isnan(beside.itl.p50_ms)
    assert beside.search is not None
    assert beside.search.missed_rps == math.inf
    assert beside.attainment == study["metrics"]["attainment"]["joint"]
    assert beside.ttft.p99_ms == study["metrics"]["ttft"]["p99_ms"]
    assert [point.rate_rps for point in beside.rates] == [
        point["rate_rps"] for point in study["goodput_search"]["points"]
    ]
    assert all(each.interval.low <= each.attainment <= each.interval.high for each in beside.rates)


def test_another_load_test_is_shown_beside_too(tmp_path: Path) -> None:
    report = full_report(tmp_path)
    path = written(tmp_path, report)
    first, second = read_beside(path)
    assert (first.name, second.name) == (f"{tmp_path.name} (a)", f"{tmp_path.name} (b)")
    assert first.ttft == report.runs[0].metrics.ttft
    assert first.search == SEARCH
    assert not first.is_simulated
