"""`python -m loadtest` against the scripted server: its figures are the server's own, and whatever the server does is
counted by kind, in the denominator, without a crash or a hang.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from loadtest.report.document import LoadReport, read_report
from tests.support.layout import ROOT
from tests.support.scripted_server import Behaviour, Fault, FaultRule, ScriptedServer, serving

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from loadtest.metrics import LoadMetrics

#: Long enough for a machine under load; nothing waits for it when all is well.
PATIENCE_S = 100.0
#: Requests that the probe may send before the run; no fault meets these.
NUM_SPARED = 40

SHORT = ("--prompts", "fixed:8", "--outputs", "fixed:6", "--no-html")

#: What the command says of each fault; None: the answer is whole.
OUTCOMES = {
    Fault.NEVER_ANSWERS: "first_token_timeout",
    Fault.MALFORMED_HTTP: "malformed_http",
    Fault.REJECT_SECONDS: "rejected",
    Fault.REJECT_DATE: "rejected",
    Fault.UNAVAILABLE: "http_5xx",
    Fault.SERVER_ERROR: "http_5xx",
    Fault.NOT_FOUND: "http_4xx",
    Fault.HTML: "malformed_sse",
    Fault.RESET_MID_STREAM: "reset_mid_stream",
    Fault.STALLS: "timeout",
    Fault.TRUNCATED: "truncated",
    Fault.MALFORMED_SSE: "malformed_sse",
    Fault.MALFORMED_JSON: "malformed_json",
    Fault.ERROR_EVENT: "error_event",
    Fault.EMPTY_ANSWER: "no_output",
    Fault.SLOW_HEADERS: None,
    Fault.NO_USAGE: None,
    Fault.NO_DONE: None,
    Fault.NO_LAST_CHUNK: None,
    Fault.COMMENTS: None,
    Fault.CRLF: None,
    Fault.USAGE_IN_EVERY_CHUNK: None,
    Fault.BYTE_BY_BYTE: None,
}


@dataclass(frozen=True)
class Run:
    status: int
    output: str
    report: LoadReport

    @property
    def metrics(self) -> LoadMetrics:
        return self.report.runs[0].metrics

    @property
    def errors(self) -> dict[str, int]:
        return {error.kind: error.count for error in self.metrics.errors}


async def start(base_url: str, folder: Path, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest", base_url, "--output", str(folder), *arguments,
        cwd=ROOT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip


async def finish(process: asyncio.subprocess.Process, folder: Path) -> Run:
    try:
        output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    finally:
        if process.returncode is None:
            process.kill()
    text = output.decode()
    assert (folder / "report.json").exists(), text
    assert process.returncode is not None
    return Run(process.returncode, text, read_report(folder / "report.json"))


async def load(server: ScriptedServer, folder: Path, *arguments: str) -> Run:
    return await finish(await start(server.base_url, folder, *SHORT, *arguments), folder)


async def test_every_fault_is_counted_by_its_kind(tmp_path: Path) -> None:
    """300 requests, of which each fault meets about ten; the server's log says whom."""
    first, last, step = NUM_SPARED, NUM_SPARED + 400, 3 * len(OUTCOMES) // 2
    rules = tuple(
        FaultRule(fault, numbers=frozenset(range(first + index, last, step))) for index, fault in enumerate(OUTCOMES)
    )
    async with serving(Behaviour(ttft_ms=10, itl_ms=1, faults=rules)) as server:
        run = await load(
            server, tmp_path, "--arrivals", "poisson:100", "--requests", "300",
            "--timeout", "4s", "--first-token-timeout", "2s",
        )  # fmt: skip
        met = Counter(Fault(entry.fault) for entry in server.log.entries if entry.fault is not None)
    assert set(met) == set(OUTCOMES)
    expected = Counter[str]()
    for fault, count in met.items():
        if (kind := OUTCOMES[fault]) is not None:
            expected[kind] += count
    assert run.errors == expected
    assert run.metrics.num_requests == 300
    assert run.metrics.num_finished == 300 - expected.total()
    assert run.metrics.attainment.num_requests == 300
    assert run.metrics.answers.num_without_usage == met[Fault.NO_USAGE]
    for kind in expected:
        assert kind in run.output


async def test_a_server_that_breaks_every_connection_fails_every_request(tmp_path: Path) -> None:
    """On kept connections that may be a stale one, so it is asked again; in the end each request has failed once."""
    rule = FaultRule(Fault.RESET_BEFORE_STATUS, numbers=frozenset(range(NUM_SPARED, 10_000)))
    async with serving(Behaviour(ttft_ms=10, itl_ms=1, faults=(rule,))) as server:
        run = await load(server, tmp_path, "--arrivals", "constant:100", "--requests", "100")
        spared = sum(entry.fault is None for entry in server.log.entries)
    assert run.errors["reset_before_answer"] >= 100 - spared
    assert run.metrics.num_finished + run.errors["reset_before_answer"] == 100


async def test_a_server_that_stops_listening_in_mid_run_refuses_the_rest(tmp_path: Path) -> None:
    async with serving(Behaviour(ttft_ms=10, itl_ms=1)) as server:
        process = await start(server.base_url, tmp_path, *SHORT, "--arrivals", "constant:50", "--requests", "100")
        while server.log.num_requests < 60:  # noqa: ASYNC110 - the server has no events for tests
            await asyncio.sleep(0.005)
    run = await finish(process, tmp_path)
    assert set(run.errors) <= {"refused", "reset_before_answer", "reset_mid_stream"}
    assert run.errors["refused"] > 0
    assert run.metrics.num_finished + sum(run.errors.values()) == 100


async def test_connections_that_the_server_closes_when_idle_cost_no_request(tmp_path: Path) -> None:
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, idle_close_ms=600)) as server:
        # Idle for 600 ms between two: the server closes just when the next request is sent.
        run = await load(server, tmp_path, "--arrivals", "constant:1.645", "--requests", "8")
    assert (run.errors, run.metrics.num_finished) == ({}, 8)


async def test_rejected_requests_are_asked_again_when_told_to(tmp_path: Path) -> None:
    rule = FaultRule(Fault.REJECT_SECONDS, numbers=frozenset(range(NUM_SPARED, NUM_SPARED + 5)))
    async with serving(Behaviour(ttft_ms=10, itl_ms=1, faults=(rule,))) as server:
        run = await load(server, tmp_path, "--arrivals", "constant:50", "--requests", "60", "--retries", "1")
    assert (run.errors, run.metrics.num_finished, run.metrics.answers.num_retried) == ({}, 60, 5)
    # Latencies count from the first time.
    assert run.metrics.ttft.max_ms > 1000


async def test_figures_are_the_servers_own(tmp_path: Path) -> None:
    """Within 2 ms of what the server did by its own clock, and of its script: never less, and more only where the
    machine was busy, which it is not for every request.
    """
    async with serving(Behaviour(ttft_ms=80, itl_ms=8)) as server:
        run = await load(server, tmp_path, "--arrivals", "constant:30", "--requests", "150")
        entries = list(server.log.entries)[-150:]
    metrics, requests = run.metrics, run.report.runs[0].requests
    assert metrics.num_finished == 150
    arrival_s = np.array([entry.arrival_s for entry in entries])
    first_s, last_s = (np.array([entry.chunk_s[index] for entry in entries]) for index in (0, -1))
    assert_little_more(requests.ttft_s, first_s - arrival_s)
    assert_little_more(requests.ttft_s, np.full(150, 0.080))
    assert_little_more(requests.e2e_s, last_s - arrival_s)
    assert_little_more(requests.e2e_s, np.full(150, 0.080 + 5 * 0.008))
    assert metrics.tpot.p50_ms == pytest.approx(8, abs=0.4)
    assert metrics.answers.num_other_prompt == 0
    assert {entry.prompt_tokens for entry in entries} == {8}


def assert_little_more(seen_s: NDArray[np.float64], true_s: NDArray[np.float64]) -> None:
    """A tenth of them at most 2 ms more; none less, up to the microsecond that the report is rounded to."""
    more_s = seen_s - true_s
    assert more_s.min() > -2e-6
    assert np.quantile(more_s, 0.1) < 0.002


async def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    async with serving(Behaviour(ttft_ms=10, itl_ms=1)) as server:
        process = await start(server.base_url, tmp_path, *SHORT, "--arrivals", "constant:50", "--requests", "5000")
        while server.log.num_requests < 80:  # noqa: ASYNC110 - the server has no events for tests
            await asyncio.sleep(0.005)
        process.send_signal(signal.SIGINT)
        run = await finish(process, tmp_path)
    assert run.status == 130
    assert 20 < run.metrics.num_finished < 1000
    assert run.metrics.num_unsent + run.metrics.num_interrupted + run.metrics.num_finished == 5000
    assert "TTFT" in run.output
    assert "Traceback" not in run.output


async def test_nobody_there_is_one_clear_sentence(tmp_path: Path) -> None:
    async with serving() as server:
        pass
    process = await start(server.base_url, tmp_path / "out", *SHORT)
    output, _ = await asyncio.wait_for(process.communicate(), PATIENCE_S)
    assert process.returncode == 2
    assert server.base_url in output.decode()
    assert "Traceback" not in output.decode()
