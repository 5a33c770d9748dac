"""What a load test prints and writes for people: the table, the lines of requests, the page."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from loadtest.record import Outcome
from loadtest.report.beside import read_beside
from loadtest.report.compare import compare_runs
from loadtest.report.csv_file import requests_csv
from loadtest.report.document import RateResult, ServerGauges
from loadtest.report.html import report_html
from loadtest.report.plots import report_plots
from loadtest.report.table import comparison_text, report_text
from tests.support.load_records import SLOS, make_report, make_run, record, served
from tests.support.study_report import write_study
from workload.goodput import GoodputSearch

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.record import RequestRecord
    from loadtest.report.document import LoadReport, ServerRun

RECORDS = (
    record(0.0, (0.2, 0.24, 0.28), usage=(100, 3), index=0),
    record(1.0, (1.6, 1.7), usage=(100, 2), index=1),
    record(2.0, outcome=Outcome.REJECTED, end_s=2.1, index=2, detail="too\nmany \x1b[31m requests"),
    record(4.0, outcome=Outcome.TIMEOUT, end_s=9.0, index=3),
)
HOSTILE = '<script>alert("x")</script><img src=http://example.org/x>&"\''


def with_rates(run: ServerRun) -> ServerRun:
    rates = tuple(RateResult.simulated(rate, 1.0 - rate / 40, 500) for rate in (5.0, 10.0, 20.0))
    search = GoodputSearch(target=0.9, goodput_rps=5.0, missed_rps=10.0, points=(), converged=True)
    gauges = ServerGauges(at_s=np.arange(9.0), running=np.arange(9.0), waiting=np.arange(9.0))
    return msgspec.structs.replace(run, rates=rates, search=search, gauges=gauges)


@pytest.fixture(scope="module")
def two_servers(tmp_path_factory: pytest.TempPathFactory) -> LoadReport:
    study: Path = tmp_path_factory.mktemp("study")
    runs = (
        with_rates(make_run(served(300, 14.0, seed=1), name="alpha")),
        make_run(served(300, 14.0, seed=1), name="beta", cpu_share=0.99),
    )
    return make_report(*runs, comparisons=compare_runs(runs, SLOS), beside=read_beside(write_study(study)))


@pytest.fixture(scope="module")
def page_of_two(two_servers: LoadReport) -> str:
    return report_html(two_servers)


def stale() -> RequestRecord:
    return replace(record(0.0, (0.1,)), num_stale_connections=1)


def cached(tokens: int) -> RequestRecord:
    return replace(record(0.0, (0.1,), usage=(100, 1)), usage_cached_tokens=tokens)


def tried(rate_rps: float, offered_rps: float, num_given_up: int = 0) -> RateResult:
    known = {"offered_rps": offered_rps, "num_given_up": num_given_up, "ttft_p99_ms": 1234.0, "tpot_p99_ms": 5.0}
    return msgspec.structs.replace(RateResult.simulated(rate_rps, 0.5, 500), **known)


def with_tried(*rates: RateResult, name: str = "server") -> ServerRun:
    return msgspec.structs.replace(make_run(RECORDS, name=name), rates=rates)


def line_of(text: str, start: str) -> list[str]:
    (found,) = (line for line in text.splitlines() if line.startswith(start))
    return found.split()


# --- the table ------------------------------------------------------------------------------------


def test_the_table_says_what_was_measured() -> None:
    text = report_text(make_report(make_run(RECORDS)))
    assert "server    server: tiny at http://127.0.0.1:8000, completions" in text
    assert (
        "2 of 4 requests finished, 1 refused (429), 1 timed out; 9.0 s, of which 5.0 s after the last was due" in text
    )
    assert line_of(text, "interactive") == ["interactive", "400", "40", "4", "25.00", "25.00", "25.00"]
    assert line_of(text, "TTFT  ")[1:4] == ["400.0", "400.0", "560.0"]
    assert line_of(text, "TTFT  ")[-1] == "2"
    assert line_of(text, "timeout") == ["timeout", "1"]
    assert "0.188 requests/s met both targets, of 0.750 offered: 25.00 % (95 %: 4.56 to 69.94)" in text
    assert "warning   mind this" in text
    assert "INVALID" not in text


def test_the_table_tells_moves_and_replays_where_the_server_does() -> None:
    assert "replays" not in report_text(make_report(make_run(RECORDS)))
    moved = replace(record(0.0, (0.1,)), num_moves=3, num_replays=0)
    replayed = replace(record(0.0, (0.1,)), num_moves=1, num_replays=2)
    text = report_text(make_report(make_run([moved, replayed, record(0.0, (0.1,))])))
    assert "2 of 2 requests moved to another one while they were written (4 moves), 1 were taken up again" in text
    assert "(2 replays)" in text


def test_what_a_server_says_cannot_move_the_cursor() -> None:
    text = report_text(make_report(make_run(RECORDS)))
    assert "rejected: too many \N{REPLACEMENT CHARACTER}[31m requests" in text
    assert "\x1b" not in text


def test_the_table_of_two_servers(two_servers: LoadReport) -> None:
    text = report_text(two_servers)
    assert "INVALID   the client needed 99% of a core, over 95%" in text
    assert "5.000 requests/s with attainment >= 90%; 10.000 miss it (0 runs)" in text
    assert "compare   A = alpha, B = beta; ratios are B / A, below 1 B is faster" in text
    assert "No difference that is more than noise" in text
    assert max(map(len, text.splitlines())) <= 118


def test_an_empty_run_can_be_told() -> None:
    report = make_report(make_run([record(0.0, outcome=Outcome.UNSENT)]))
    assert "INVALID   no request was measured" in report_text(report)
    assert "nan" not in report_text(report)
    assert "no request was measured" in report_html(report)
    assert "nan" not in visible_text(report_html(report))


def test_a_comparison_of_other_workloads_has_no_pairs(two_servers: LoadReport) -> None:
    apart = msgspec.structs.replace(two_servers.comparisons[0], paired=(), unpaired_because="they differ")
    assert "of each request" in comparison_text(two_servers.comparisons[0])
    assert "of each request" not in comparison_text(apart)


@pytest.mark.parametrize(
    ("records", "note"),
    [
        (RECORDS, "2 of 4 requests failed: latency percentiles leave out what these did not reach"),
        ((record(0.0, (0.1, 0.2)),), "1 answers came without usage"),
        (
            (record(0.0, (0.1, 0.2), output_tokens=9, usage=(100, 2)),),
            "1 answers were shorter than asked for, 0 longer",
        ),
        ((record(0.0, (0.1,), usage=(150, 1)),), "of 1 requests; its sum is 1.500 of ours"),
        ((record(0.0, (0.1,), output_tokens=4, usage=(100, 4)),), "4.00 tokens came in a chunk"),
        ((record(0.0, (0.1,), output_tokens=4, usage=(100, 4)),), "came in one chunk: they have no TPOT"),
        ((record(0.0, (0.1,)), record(1.0, outcome=Outcome.INTERRUPTED)), "1 requests were interrupted and 0 never"),
        ((record(0.0, (0.1,)), record(1.0, (9.0,))), "requests went on for 8.0 s after the last was due"),
        ((record(0.0, (3.0,)), record(9.0, (12.0,), part=1)), "6.0 s after the last was due (sums over 2 parts)"),
        ((record(0.0, (0.1,)), record(0.0, outcome=Outcome.GIVEN_UP, end_s=9.0)), "1 of 2 requests were given up"),
        ((stale(),), "1 requests were sent again because the server had closed the kept connection"),
        ((cached(51),), "the server had 51% of the prompt tokens in its cache"),
    ],
)
def test_what_must_be_known_is_told(records: tuple[RequestRecord, ...], note: str) -> None:
    text = " ".join(report_text(make_report(make_run(records))).split())
    assert note in text


def test_a_cache_that_held_a_little_is_not_remarked_upon() -> None:
    assert "in its cache" not in report_text(make_report(make_run([cached(50)])))


def test_what_was_given_up_is_no_failure_of_the_server() -> None:
    given_up = [record(float(row), outcome=Outcome.GIVEN_UP, end_s=row + 5.0) for row in range(2)]
    report = make_report(make_run([record(0.0, (0.1, 0.2)), *given_up]))
    text, page = report_text(report), visible_text(report_html(report))
    assert "1 of 3 requests finished, 2 given up; " in text
    assert "failed" not in text
    assert "failed 0 of 3 requests, 2 given up" in page
    ttft_p99 = f"{report.runs[0].metrics.ttft.p99_ms:,.1f}"
    assert f"p99 > {ttft_p99} ms" in page
    assert f"TTFT p99, ms > {ttft_p99}" in page


def test_a_rate_that_was_not_offered_stands_beside_the_one_that_was() -> None:
    report = make_report(with_tried(tried(20.0, 3.669), tried(1.0, 0.96)))
    text, page = report_text(report), visible_text(report_html(report))
    assert line_of(text, "requests/s tried")[2] == "offered"
    assert line_of(text, "20.000")[:3] == ["20.000", "3.669", "50.00"]
    assert "server 20.000 3.669 50.00 %" in page
    for told in (" ".join(text.split()), page):
        assert "requests/s that were really offered: 3.669 for 20.000." in told


def test_rates_that_were_offered_as_planned_are_told_once() -> None:
    text = report_text(make_report(with_tried(tried(20.0, 19.1), RateResult.simulated(5.0, 0.5, 9))))
    assert "offered" not in line_of(text, "requests/s tried")
    assert "really offered" not in text


def test_a_ttft_is_a_lower_bound_where_requests_were_given_up() -> None:
    report = make_report(with_tried(tried(4.0, 4.0), tried(8.0, 8.0, num_given_up=3)))
    text, page = report_text(report), visible_text(report_html(report))
    assert "> 1,234.0" in " ".join(line_of(text, "8.000"))
    assert ">" not in line_of(text, "4.000")
    assert page.count("> 1,234.0") == 1
    plain = make_report(with_tried(tried(4.0, 4.0), tried(8.0, 8.0)))
    drawn, without = (
        {plot.title: plot.svg for plot in report_plots(each)["Attainment by rate"]} for each in (report, plain)
    )
    assert len(drawn["TTFT p99"]) > len(without["TTFT p99"])
    assert drawn["TPOT p99"] == without["TPOT p99"]
    assert 'a TTFT p99 with ">" is a lower bound' in text


def test_goodputs_of_servers_stand_side_by_side() -> None:
    runs = [with_tried(tried(4.0, 4.0), tried(8.0, 8.0), name="alpha"), with_tried(tried(4.0, 2.0), name="beta")]
    text = report_text(make_report(*runs))
    assert line_of(text, "goodput, requests/s")[2:] == ["alpha", "beta"]
    assert line_of(text, "at 4.000 tried")[3:] == ["2.000", "1.000"]
    assert "at 8.000 tried" not in text
    assert "highest found" not in text
    found = [with_rates(runs[0]), msgspec.structs.replace(runs[1], search=None)]
    assert line_of(report_text(make_report(*found)), "highest found") == ["highest", "found", "5.000", "-"]
    assert "goodput, requests/s" not in report_text(make_report(runs[0]))


# --- the lines of requests ------------------------------------------------------------------------


def test_each_request_is_a_line() -> None:
    first = record(0.0, (0.2, 0.24, 0.28), usage=(100, 3), detail="=SUM(A1)")
    first.server_phases_ms = {"queue_ms": 12.5}
    first.taken_s, first.part, first.num_moves = 0.015, 2, 3
    lines = list(csv.DictReader(io.StringIO(requests_csv(make_report(make_run([first, *RECORDS[1:]]))))))
    assert len(lines) == 4
    assert (lines[0]["run"], lines[0]["outcome"], lines[0]["answered_tokens"]) == ("server", "finished", "3")
    assert (lines[0]["ttft_ms"], lines[0]["tpot_ms"], lines[0]["longest_gap_ms"]) == ("200.0", "40.0", "40.0")
    assert (lines[0]["taken_s"], lines[0]["send_lag_ms"], lines[0]["part"]) == ("0.015", "15.0", "2")
    assert (lines[0]["server_queue_ms"], lines[1]["server_queue_ms"]) == ("12.5", "")
    assert (lines[0]["num_moves"], lines[0]["num_replays"], lines[1]["num_moves"]) == ("3", "", "")
    assert lines[0]["detail"] == "'=SUM(A1)"
    assert lines[2]["detail"] == RECORDS[2].detail
    assert (lines[3]["first_token_s"], lines[3]["usage_output_tokens"], lines[3]["end_s"]) == ("", "", "9.0")


def test_lines_of_two_servers_have_the_same_columns(two_servers: LoadReport) -> None:
    lines = list(csv.reader(io.StringIO(requests_csv(two_servers))))
    assert {len(line) for line in lines} == {len(lines[0])}
    assert [line[0] for line in lines[1:]] == ["alpha"] * 300 + ["beta"] * 300


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a browser would make of it: tags with their attributes, text outside of style and drawings."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open and "svg" not in self._open:
            self.text.append(data)

    @property
    def is_closed(self) -> bool:
        return not self._open


def visible_text(html: str) -> str:
    return " ".join(" ".join(Page(html).text).split())


def test_the_page_needs_nothing_else_and_is_well_formed(page_of_two: str) -> None:
    page = Page(page_of_two)
    assert page.is_closed
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image", "base"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert (value or "").startswith("#")
    assert not re.search(r"@import|url\((?!#)", page_of_two)


def test_the_page_has_every_section_and_every_server(page_of_two: str) -> None:
    text = visible_text(page_of_two)
    for title in (
        "Figures",
        "Latency",
        "Attainment by rate",
        "Over time",
        "Where the time went",
        "Rates tried",
        "Errors",
    ):
        assert f"<h2>{title}</h2>" in page_of_two
    for plot in ("TTFT", "TPOT", "ITL", "End to end", "Attainment", "As the client counts", "As the server counts"):
        assert f"<h3>{plot}</h3>" in page_of_two
    assert page_of_two.count("<svg") == 4 + 1 + 3 + 2
    assert "beta: this run is invalid. It measured the client, not the server. the client needed 99%" in text
    assert "(simulated)" in text
    assert "beta against alpha" in text


def test_figures_of_the_page_are_those_of_the_report(two_servers: LoadReport, page_of_two: str) -> None:
    text = visible_text(page_of_two)
    metrics = two_servers.runs[0].metrics
    assert f"TTFT p99, ms {metrics.ttft.p99_ms:,.1f} {metrics.ttft.p99_ms:,.1f} 398.0" in text
    assert f"Both targets met {100 * metrics.attainment.joint:.2f} %" in text
    assert metrics.takeovers.num_moves > metrics.takeovers.num_replays > 0
    assert f"Moves to other workers {metrics.takeovers.num_moves}" in text
    assert f"Replays at other workers {metrics.takeovers.num_replays}" in text


def test_what_others_wrote_is_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x>"
    folder.mkdir()
    runs = tuple(
        msgspec.structs.replace(
            make_run([record(0.0, outcome=Outcome.HTTP_5XX, end_s=1.0, detail=HOSTILE), *RECORDS[:2]]),
            name=f"{HOSTILE}{number} $x_1$",
            model=HOSTILE,
            base_url=HOSTILE,
            notes=(HOSTILE,),
        )
        for number in range(2)
    )
    report = make_report(
        *runs, workload=HOSTILE, digest=HOSTILE, comparisons=compare_runs(runs, SLOS), warnings=(HOSTILE,),
        beside=read_beside(write_study(folder)),
    )  # fmt: skip
    page = Page(report_html(report))
    assert page.is_closed
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert HOSTILE in " ".join(page.text)


def test_many_requests_still_make_a_page_of_moderate_size() -> None:
    assert len(report_html(make_report(make_run(served(20_000, 14.0, seed=6))))) < 3_000_000
