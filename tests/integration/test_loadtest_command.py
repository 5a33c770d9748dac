"""`tandem loadtest` as a user meets it: figures against the server's own log, files, words, and mistakes."""

from __future__ import annotations

import heapq
import json
import math
import re
import socket
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack
from html.parser import HTMLParser
from itertools import groupby, pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest

from tests.support.commands import PATIENCE_S, Tandem, tandem
from tests.support.layout import ROOT
from tests.support.loadtest_runs import pairs, read_csv, read_json, server_log
from tests.support.plain_server import Asked, plain_server
from tests.support.scripted_server import serving_process

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from tests.support.commands import Done
    from tests.support.loadtest_runs import Entry, Row

#: Lengths differ, so that requests.csv and the server's log can be matched request by request.
SHAPE = ("--prompts", "lognormal:mean=60,sigma=1,max=500", "--outputs", "lognormal:mean=8,sigma=0.4,max=20")
CHATS = """\
description: Short chats for a test.
arrivals: poisson:25
prompts: lognormal:mean=20,sigma=0.5,max=60
outputs: lognormal:mean=6,sigma=0.3,max=12
chats: {mean_turns: 2.5, max_turns: 4, think_s: 0.05}
slo: {chat: {ttft_ms: 500, tpot_ms: 60}}
requests: 40
"""


class Servers(NamedTuple):
    a: str
    #: Like A.
    b: str
    #: Twice the time between tokens.
    slow: str
    #: Four at a time, 40 ms each: 100 requests a second.
    queue: str


@pytest.fixture(scope="module")
def servers() -> Generator[Servers]:
    with ExitStack() as stack:

        def start(*arguments: str) -> str:
            return stack.enter_context(serving_process(*arguments))

        usual = ("--ttft-ms", "40", "--itl-ms", "5", "--chat-overhead-tokens", "7")
        yield Servers(
            start(*usual),
            start(*usual),
            start("--ttft-ms", "40", "--itl-ms", "10"),
            start("--ttft-ms", "20", "--itl-ms", "4", "--max-running", "4"),
        )


class Load:
    """Runs the command; files go to `folder`."""

    def __init__(self, run_tandem: Tandem, folder: Path) -> None:
        self._run_tandem = run_tandem
        self.folder = folder / "out"

    def __call__(self, *arguments: str, html: bool = False) -> Done:
        page = () if html else ("--no-html",)
        done = self._run_tandem("loadtest", *arguments, "--output", str(self.folder), "--force", *page)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def measured(self, *arguments: str, html: bool = False) -> Done:
        """A run that took place; a busy machine may have marked it invalid."""
        done = self(*arguments, html=html)
        assert done.status in (0, 3), done.stdout + done.stderr
        return done

    @property
    def rows(self) -> list[Row]:
        return read_csv(self.folder)

    @property
    def report(self) -> dict[str, Any]:
        return read_json(self.folder)

    @property
    def metrics(self) -> dict[str, Any]:
        assert len(self.report["runs"]) == 1
        return cast("dict[str, Any]", self.report["runs"][0]["metrics"])


@pytest.fixture
def load(run_tandem: Tandem, tmp_path: Path) -> Load:
    return Load(run_tandem, tmp_path)


def log_since(base_url: str, before: Sequence[Entry]) -> list[Entry]:
    return server_log(base_url)[len(before) :]


# --- figures ---


def test_figures_agree_with_the_servers_log_within_2_ms(load: Load, servers: Servers) -> None:
    """Request by request, and the report's medians, against what the server did when, by the same clock. A busy machine
    makes a client late: then it is tried again.
    """
    tried: list[dict[str, float]] = []
    for _ in range(3):
        before = server_log(servers.a)
        load.measured(servers.a, "--arrivals", "poisson:60", "--requests", "90", *SHAPE)
        matched = pairs(load.rows, log_since(servers.a, before))
        assert len(matched) == 90
        off_ms = {"ttft": _ttft_off_ms(matched), "tpot": _tpot_off_ms(matched), "e2e": _e2e_off_ms(matched)}
        # No client can see a token before it is sent, but the server may read before the client's clock is read again.
        assert min(off_ms["ttft"]) > -2
        metrics = load.metrics
        assert metrics["itl"]["count"] == sum(len(entry["chunk_s"]) - 1 for _, entry in matched)
        medians_ms = {name: median(map(abs, values)) for name, values in off_ms.items()}
        p50_off_ms = {name: metrics[name]["p50_ms"] - true_ms for name, true_ms in _true_p50_ms(matched).items()}
        if max(*medians_ms.values(), *map(abs, p50_off_ms.values())) < 2:
            return
        tried += [medians_ms, p50_off_ms]
    pytest.fail(f"of each request and of the medians, off by: {tried}")


def _true_p50_ms(matched: Sequence[tuple[Row, Entry]]) -> dict[str, float]:
    """By the server's log. Users wait from when a request was due: what the client was late is part of it."""

    def since_due_ms(index: int) -> float:
        return median(
            float(1e3 * (entry["chunk_s"][index] - entry["arrival_s"])) + float(row["send_lag_ms"])
            for row, entry in matched
        )

    tpot_ms = median(_true_tpot_ms(entry) for _, entry in matched if entry["output_tokens"] > 1)
    return {"ttft": since_due_ms(0), "e2e": since_due_ms(-1), "tpot": tpot_ms}


def _true_tpot_ms(entry: Entry) -> float:
    return float(1e3 * (entry["chunk_s"][-1] - entry["chunk_s"][0]) / (entry["output_tokens"] - 1))


def _ttft_off_ms(matched: Sequence[tuple[Row, Entry]]) -> list[float]:
    return [
        1e3 * (float(row["first_token_s"]) - float(row["sent_s"]) - entry["chunk_s"][0] + entry["arrival_s"])
        for row, entry in matched
    ]


def _tpot_off_ms(matched: Sequence[tuple[Row, Entry]]) -> list[float]:
    return [float(row["tpot_ms"]) - _true_tpot_ms(entry) for row, entry in matched if entry["output_tokens"] > 1]


def _e2e_off_ms(matched: Sequence[tuple[Row, Entry]]) -> list[float]:
    return [
        1e3 * (float(row["last_token_s"]) - float(row["sent_s"]) - entry["chunk_s"][-1] + entry["arrival_s"])
        for row, entry in matched
    ]


def test_percentiles_and_attainment_follow_from_the_rows(load: Load, servers: Servers) -> None:
    """Latencies count from when a request was due. One class is out of reach, the other is not."""
    slos = ("--slo", "easy:5000,1000", "--slo", "hard:5000,4")
    load.measured(servers.a, "--arrivals", "gamma:80,cv=2", "--requests", "60", "--warmup", "10", *SHAPE, *slos)
    rows, metrics = load.rows, load.metrics
    for row in rows:
        due_s = float(row["due_s"])
        assert float(row["sent_s"]) >= due_s
        assert float(row["ttft_ms"]) == pytest.approx(1e3 * (float(row["first_token_s"]) - due_s), abs=0.01)
        assert float(row["e2e_ms"]) == pytest.approx(1e3 * (float(row["last_token_s"]) - due_s), abs=0.01)
    assert [int(row["is_warmup"]) for row in rows] == [1] * 10 + [0] * 50
    counted = rows[10:]
    assert (metrics["num_warmup"], metrics["num_requests"]) == (10, 50)
    for name in ("ttft", "e2e"):
        assert metrics[name]["count"] == 50
        assert metrics[name]["mean_ms"] == pytest.approx(mean(float(row[f"{name}_ms"]) for row in counted), abs=0.01)
        assert metrics[name]["p50_ms"] == pytest.approx(median(float(row[f"{name}_ms"]) for row in counted), abs=0.01)
    classes = {found["name"]: found for found in metrics["classes"]}
    asked = Counter(row["slo_class"] for row in counted)
    assert {name: found["num_requests"] for name, found in classes.items()} == asked
    for name, ttft_ms, tpot_ms in (("easy", 5000, 1000), ("hard", 5000, 4)):
        own = [row for row in counted if row["slo_class"] == name]
        met = sum(float(row["ttft_ms"]) <= ttft_ms and float(row["tpot_ms"] or 0) <= tpot_ms for row in own)
        assert classes[name]["joint"] == pytest.approx(met / len(own))
    joint = sum(classes[name]["joint"] * asked[name] for name in asked)
    assert metrics["attainment"]["joint"] == pytest.approx(joint / 50)
    assert metrics["goodput_rps"] == pytest.approx(metrics["offered_rps"] * joint / 50)


@pytest.mark.parametrize("how", [("completions", "ids"), ("completions", "text"), ("chat", "text")])
def test_prompts_have_the_planned_length_as_the_server_counts(
    load: Load, servers: Servers, how: tuple[str, str]
) -> None:
    """The chat template's own seven tokens are found out and taken off."""
    endpoint, prompts_as = how
    before = server_log(servers.a)
    load.measured(
        servers.a, "--endpoint", endpoint, "--prompts-as", prompts_as, "--arrivals", "poisson:100", "--requests", "30",
        "--prompts", "lognormal:mean=300,sigma=0.7,max=3000", "--outputs", "lognormal:mean=5,sigma=0.3,max=9",
    )  # fmt: skip
    rows, seen = load.rows, log_since(servers.a, before)[-30:]
    assert load.metrics["num_finished"] == 30
    assert len({row["prompt_tokens"] for row in rows}) > 15
    assert Counter(int(row["prompt_tokens"]) for row in rows) == Counter(entry["prompt_tokens"] for entry in seen)
    assert all(row["prompt_tokens"] == row["usage_prompt_tokens"] for row in rows)
    assert all(row["output_tokens"] == row["answered_tokens"] for row in rows)


def test_cancellations_close_the_connection_and_are_no_failures(load: Load, servers: Servers) -> None:
    before = server_log(servers.a)
    load.measured(
        servers.a, "--arrivals", "constant:80", "--requests", "60", "--prompts", "fixed:20", "--outputs", "fixed:30",
        "--cancel", "0.5@fixed:5",
    )  # fmt: skip
    rows, metrics = load.rows, load.metrics
    gone = [row for row in rows if row["cancel_after_tokens"]]
    assert 15 <= len(gone) <= 45
    assert {row["outcome"] for row in gone} == {"cancelled"}
    assert {row["outcome"] for row in rows if not row["cancel_after_tokens"]} == {"finished"}
    assert (metrics["num_cancelled"], metrics["num_finished"], metrics["errors"]) == (len(gone), 60 - len(gone), [])
    assert all(int(row["answered_tokens"]) >= 5 for row in gone)
    matched = pairs(rows, log_since(servers.a, before))
    left = [entry for _, entry in matched if entry["left_s"] is not None]
    assert len(left) == len(gone)
    # At once: the server had not sent much more, not all thirty.
    assert median(sum(entry["chunk_tokens"]) for entry in left) <= 10


# --- rates ---


def test_goodput_search_finds_the_knee_that_a_queue_has(load: Load, servers: Servers) -> None:
    """Four servers of 40 ms each, and the run's own arrivals, squeezed."""
    targets = ("--slo", "x:150,100", "--find-goodput", "--tolerance", "0.1", "--target-attainment", "0.9")
    load.measured(
        servers.queue, "--arrivals", "poisson:60", "--requests", "100", "--prompts", "fixed:8", "--outputs", "fixed:6",
        *targets,
    )  # fmt: skip
    run = load.report["runs"][0]
    search = run["search"]
    assert search["converged"]
    assert len(run["rates"]) == len(search["points"]) >= 4
    assert search["missed_rps"] <= search["goodput_rps"] * 1.11
    rows = load.rows
    due_s = [float(row["due_s"]) for row in rows]
    rate_rps = run["metrics"]["offered_rps"]
    knee_rps = _knee_rps([value * rate_rps for value in due_s])
    assert search["goodput_rps"] == pytest.approx(knee_rps, rel=0.2)
    for point in search["points"]:
        if point["rate_rps"] < 0.75 * knee_rps:
            assert point["attainment"] >= 0.9
        if point["rate_rps"] > 1.3 * knee_rps:
            assert point["attainment"] < 0.9


def _knee_rps(unit_due_s: Sequence[float]) -> float:
    """The highest rate at which nine of ten wait no longer than 130 ms, to half a percent. `unit_due_s` is at 1/s."""

    def attainment(rate_rps: float) -> float:
        free_s = [0.0] * 4
        num_met = 0
        for unit_s in unit_due_s:
            due_s = unit_s / rate_rps
            start_s = max(due_s, heapq.heappop(free_s))
            heapq.heappush(free_s, start_s + 0.040)
            num_met += start_s - due_s <= 0.130
        return num_met / len(unit_due_s)

    low, high = 20.0, 1000.0
    assert attainment(low) >= 0.9 > attainment(high)
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if attainment(middle) >= 0.9 else (low, middle)
    return low


def test_rates_are_swept_in_the_order_given(load: Load, servers: Servers) -> None:
    before = server_log(servers.a)
    done = load.measured(
        servers.a, "--arrivals", "constant:10", "--rates", "50,200", "--requests", "20",
        "--prompts", "fixed:8", "--outputs", "fixed:3",
    )  # fmt: skip
    rates = load.report["runs"][0]["rates"]
    assert [rate["rate_rps"] for rate in rates] == pytest.approx([50, 200])
    arrivals_s = [entry["arrival_s"] for entry in log_since(servers.a, before)][-40:]
    assert 19 / (arrivals_s[19] - arrivals_s[0]) == pytest.approx(50, rel=0.2)
    assert arrivals_s[39] - arrivals_s[20] < 0.6 * (arrivals_s[19] - arrivals_s[0])
    assert "requests/s tried" in done.stdout


def test_a_load_beyond_the_client_is_marked_invalid_with_the_reason(load: Load, servers: Servers) -> None:
    done = load(
        servers.a, "--arrivals", "constant:30000", "--requests", "9000", "--prompts", "fixed:4", "--outputs", "fixed:1"
    )
    assert done.status == 3
    assert re.search(r"^INVALID .*client.*(lag|late)", done.stdout, re.MULTILINE)
    validity = load.report["runs"][0]["validity"]
    assert not validity["valid"]
    assert validity["reasons"]
    assert load.metrics["send_lag"]["p99_ms"] > 10
    # The rate that was asked for, and honest latencies: from when requests were due.
    assert load.metrics["offered_rps"] == pytest.approx(30_000, rel=0.01)
    assert load.metrics["ttft"]["p99_ms"] >= load.metrics["send_lag"]["p99_ms"]


def test_a_closed_loop_has_as_many_in_flight_as_told(load: Load, servers: Servers) -> None:
    before = server_log(servers.a)
    load.measured(servers.a, "--concurrency", "3", "--requests", "30", *SHAPE)
    entries = [entry for _, entry in pairs(load.rows, log_since(servers.a, before))]
    changes = sorted([(entry["arrival_s"], 1) for entry in entries] + [(entry["end_s"], -1) for entry in entries])
    in_flight = highest = 0
    for _, change in changes:
        in_flight += change
        highest = max(highest, in_flight)
    assert highest == 3


# --- several servers, comparison ---


def test_servers_take_turns_and_are_compared_in_pairs(load: Load, servers: Servers) -> None:
    before = {name: server_log(url) for name, url in (("A", servers.a), ("B", servers.slow))}
    done = load.measured(
        "--servers", f"A={servers.a},B={servers.slow}", "--arrivals", "poisson:50", "--requests", "40", "--rounds", "4",
        *SHAPE,
    )  # fmt: skip
    assert [run["name"] for run in load.report["runs"]] == ["A", "B"]
    rows, seen = load.rows, list[tuple[float, str]]()
    for name, url in (("A", servers.a), ("B", servers.slow)):
        own = [row for row in rows if row["run"] == name]
        assert len(own) == 40
        # Without the probe, which came before.
        entries = log_since(url, before[name])[-40:]
        assert Counter(entry["prompt_tokens"] for entry in entries) == Counter(int(r["prompt_tokens"]) for r in own)
        seen += [(entry["arrival_s"], name) for entry in entries]
        seen += [(entry["end_s"], name) for entry in entries]
    # Never both at once, and ABBA ABBA.
    turns = "".join(name for name, _ in groupby(name for _, name in sorted(seen)))
    assert turns == "ABABA"
    (comparison,) = load.report["comparisons"]
    ratios = {paired["name"]: paired["ratio"] for paired in comparison["paired"]}
    assert ratios["TPOT"] == pytest.approx(2, rel=0.15)
    assert ratios["TTFT"] == pytest.approx(1, rel=0.15)
    assert re.search(r"TPOT +(1\.[89]|2\.[0-2])", done.stdout)


def test_two_reports_are_compared_request_by_request(run_tandem: Tandem, tmp_path: Path, servers: Servers) -> None:
    arguments = ("--arrivals", "poisson:60", "--requests", "40", *SHAPE, "--no-html")
    reports: dict[str, str] = {}
    for name, url in (("a", servers.a), ("b", servers.b), ("slow", servers.slow)):
        done = run_tandem("loadtest", url, *arguments, "--output", str(tmp_path / name))
        assert done.status in (0, 3), done.stderr
        reports[name] = str(tmp_path / name / "report.json")
    equal = run_tandem("loadtest", "--compare", reports["a"], reports["b"])
    assert equal.status == 0, equal.stderr
    assert _ratio(equal, "TTFT") == pytest.approx(1, rel=0.15)
    assert _ratio(equal, "TPOT") == pytest.approx(1, rel=0.1)
    slower = run_tandem("loadtest", "--compare", reports["a"], reports["slow"])
    assert slower.status == 0, slower.stderr
    assert _ratio(slower, "TPOT") == pytest.approx(2, rel=0.15)
    turned = run_tandem("loadtest", "--compare", reports["slow"], reports["a"])
    assert _ratio(turned, "TPOT") == pytest.approx(0.5, rel=0.15)
    # Another seed asks other things: no pairs, and it is said.
    run_tandem("loadtest", servers.a, *arguments, "--seed", "1", "--output", str(tmp_path / "other"))
    other = run_tandem("loadtest", "--compare", reports["a"], str(tmp_path / "other" / "report.json"))
    assert re.search(r"workload|differ|same requests", other.stdout + other.stderr)
    assert not re.search(r"^TTFT +\d", other.stdout, re.MULTILINE)


def _ratio(done: Done, name: str) -> float:
    found = re.search(rf"^{name} +([\d.]+)", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return float(found[1])


def test_what_is_no_report_is_not_compared(run_tandem: Tandem, tmp_path: Path) -> None:
    files = {
        "cut.json": '{"format": "tandem-loadtest-1", "runs": [',
        "list.json": "[1, 2]",
        "other.json": '{"hello": "world"}',
        "future.json": '{"format": "tandem-loadtest-99"}',
        "hollow.json": '{"format": "tandem-loadtest-1"}',
        "wrong.json": '{"format": "tandem-loadtest-1", "runs": 3, "slos": {}}',
        "table.csv": "run,index\nserver,0\n",
        "empty.json": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        done = run_tandem("loadtest", "--compare", str(tmp_path / name), str(tmp_path / name))
        assert done.status == 2, name
        assert name in done.stderr
        assert "Traceback" not in done.stderr
    done = run_tandem("loadtest", "--compare", str(tmp_path / "absent.json"), str(tmp_path / "other.json"))
    assert (done.status, "absent.json" in done.stderr) == (2, True)


# --- workloads ---


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_turns_of_a_chat_wait_for_the_answer_and_repeat_it(load: Load, tmp_path: Path, endpoint: str) -> None:
    """Against a server of another make, which keeps what it was sent."""
    (tmp_path / "chats.yaml").write_text(CHATS)
    with plain_server() as server:
        done = load.measured(
            server.base_url, "--workload", str(tmp_path / "chats.yaml"), "--endpoint", endpoint
        )  # fmt: skip
        asked = sorted(server.asked, key=lambda one: one.arrival_s)[-40:]
    rows = load.rows
    assert {row["outcome"] for row in rows} == {"finished"}, done.stdout
    by_chat: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_chat[row["item"]].append(row)
    assert max(map(len, by_chat.values())) > 2
    pauses_s: list[float] = []
    for turns in by_chat.values():
        assert [int(row["turn"]) for row in turns] == list(range(len(turns)))
        for before, after in pairwise(turns):
            pauses_s.append(float(after["due_s"]) - float(before["end_s"]))
            said = int(before["prompt_tokens"]) + int(before["output_tokens"])
            assert int(after["prompt_tokens"]) > said
    assert min(pauses_s) >= 0
    assert 0.01 < mean(pauses_s) < 0.2
    num_continued = 0
    for index, one in enumerate(asked):
        earlier = [
            other
            for other in asked[:index]
            if _said(one).startswith(_said(other).rstrip() + other.answer.rstrip()) and one is not other
        ]
        num_continued += bool(earlier)
        for other in earlier:
            assert other.end_s <= one.arrival_s
    assert num_continued == len(pauses_s)
    if endpoint == "chat":
        for one in asked:
            roles = [message["role"] for message in one.body["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def _said(asked: Asked) -> str:
    """The whole prompt; a chat's messages one after another, as they stand."""
    if "prompt" in asked.body:
        return str(asked.body["prompt"])
    return "".join(message["content"] for message in asked.body["messages"])


def test_prompts_of_a_mooncake_trace_share_what_the_trace_says(load: Load, tmp_path: Path) -> None:
    """Blocks of 512 tokens. The bodies are looked at: as ids, the server takes them."""
    rows = [
        {"timestamp": 0, "input_length": 1100, "output_length": 2, "hash_ids": [0, 1, 2]},
        {"timestamp": 40, "input_length": 1024, "output_length": 2, "hash_ids": [0, 3]},
        {"timestamp": 80, "input_length": 1500, "output_length": 2, "hash_ids": [0, 1, 4]},
        {"timestamp": 120, "input_length": 600, "output_length": 2, "hash_ids": [5, 6]},
    ]
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with plain_server(takes_ids=True) as server:
        load.measured(server.base_url, "--trace", str(trace))
        asked = sorted(server.asked, key=lambda one: one.arrival_s)[-4:]
    prompts = [_tokens(one.body["prompt"]) for one in asked]
    assert [len(prompt) for prompt in prompts] == [row["input_length"] for row in rows]
    assert _num_shared(prompts[0], prompts[1]) == 512
    assert _num_shared(prompts[0], prompts[2]) == 1024
    assert _num_shared(prompts[1], prompts[2]) == 512
    assert _num_shared(prompts[0], prompts[3]) == 0


def test_scaled_lengths_still_share(load: Load, tmp_path: Path, servers: Servers) -> None:
    trace = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": 0, "input_length": 1024, "output_length": 64, "hash_ids": [0, k]} for k in (1, 2)]
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with plain_server(takes_ids=True) as server:
        load.measured(server.base_url, "--trace", str(trace), "--scale-lengths", "0.0625")
        # What the client asks to know itself by may still come in between on a busy machine.
        asked = [one for one in server.asked if one.body.get("max_tokens") == 4]
        first, second = (_tokens(one.body["prompt"]) for one in asked[-2:])
    assert (len(first), len(second), _num_shared(first, second)) == (64, 64, 32)


def _tokens(prompt: str | list[int]) -> list[Any]:
    return prompt.split() if isinstance(prompt, str) else list(prompt)


def _num_shared(a: Sequence[object], b: Sequence[object]) -> int:
    return next((index for index, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


TRACES = {
    "azure.csv": "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:15:46.6805900,40,4\n2023-11-16 18:15:46.7805900,30,5\n2023-11-16 18:15:46.8805900,20,6\n",
    "burstgpt.csv": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,40,4,44,Conversation log\n5,GPT-4,30,5,35,API log\n6,ChatGPT,20,6,26,API log\n",
    "sharegpt.json": json.dumps(
        [
            {
                "id": str(k),
                "conversations": [{"from": "human", "value": f"please {k}"}, {"from": "gpt", "value": "so it is"}],
            }
            for k in range(3)
        ]
    ),
    "mooncake.jsonl": "".join(
        f'{{"timestamp": {100 * k}, "input_length": {20 + k}, "output_length": 4, "hash_ids": [{k}]}}\n'
        for k in range(3)
    ),
}


@pytest.mark.parametrize("name", TRACES)
def test_each_trace_format_is_played(tmp_path: Path, servers: Servers, name: str) -> None:
    (tmp_path / name).write_text(TRACES[name])
    timing = ("--arrivals", "poisson:50") if name.startswith("sharegpt") else ("--speed", "4")
    folder = tmp_path / "out"
    with tandem(
        "loadtest", servers.a, "--trace", str(tmp_path / name), *timing, "--output", str(folder), "--no-html"
    ) as command:
        output, _ = command.process.communicate(timeout=20)
    assert "Traceback" not in output
    assert command.process.returncode in (0, 3), output
    metrics = read_json(folder)["runs"][0]["metrics"]
    assert (metrics["num_finished"], metrics["num_requests"]) == (3, 3)
    if name == "azure.csv":
        due_s = [float(row["due_s"]) for row in read_csv(folder)]
        assert [after - before for before, after in pairwise(due_s)] == pytest.approx([0.025, 0.025], abs=1e-4)


@pytest.mark.parametrize(
    ("name", "line", "bad"),
    [
        ("mooncake.jsonl", 3, '{"timestamp": 200, "input_length": -5, "output_length": 4, "hash_ids": [1]}'),
        ("mooncake.jsonl", 2, '{"timestamp": 200, "input_le'),
        ("azure.csv", 3, "2023-11-16 18:15:46.7805900,many,5"),
        ("burstgpt.csv", 4, "6,ChatGPT"),
    ],
)
def test_a_bad_line_of_a_trace_is_named(
    load: Load, tmp_path: Path, servers: Servers, name: str, line: int, bad: str
) -> None:
    lines = TRACES[name].splitlines()
    lines[line - 1] = bad
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    before = server_log(servers.a)
    done = load(servers.a, "--trace", str(tmp_path / name))
    assert done.status == 2
    assert f"{name}:{line}" in done.stderr
    assert log_since(servers.a, before) == []


@pytest.mark.parametrize("name", ["chat", "code", "summarise", "agents", "long-context", "bursty"])
def test_each_named_workload_is_played(load: Load, servers: Servers, name: str) -> None:
    think = ("--think", "0.05s") if name in ("chat", "agents") else ()
    load.measured(
        servers.b, "--workload", name, "--rate", "60", "--requests", "12", "--outputs", "fixed:4", *think,
        "--max-context", "20000",
    )  # fmt: skip
    metrics = load.metrics
    assert (metrics["num_finished"], metrics["answers"]["num_other_prompt"]) == (12, 0)
    slos = {slo["name"] for slo in load.report["slos"]}
    assert slos != {"interactive"}


# --- other servers ---


def test_a_server_that_knows_nothing_but_the_api_is_measured_all_the_same(load: Load) -> None:
    """No /tokenize, no /metrics, no ignore_eos, no token ids, no kept connections."""
    with plain_server() as server:
        done = load.measured(
            server.base_url + "/v1/", "--arrivals", "poisson:50", "--requests", "25", *SHAPE,
            "--header", "X-Team: blue", "--extra-body", '{"temperature": 0.5}',
        )  # fmt: skip
        asked = sorted(server.asked, key=lambda one: one.arrival_s)[-25:]
    rows, metrics = load.rows, load.metrics
    assert metrics["num_finished"] == 25, done.stdout
    assert metrics["ttft"]["p50_ms"] > 4
    assert metrics["tpot"]["p50_ms"] == pytest.approx(4, abs=2)
    assert all(one.is_whole for one in asked)
    assert {one.headers["x-team"] for one in asked} == {"blue"}
    assert {one.body["temperature"] for one in asked} == {0.5}
    assert Counter(len(one.body["prompt"].split()) for one in asked) == Counter(int(r["prompt_tokens"]) for r in rows)
    # Users are told what could not be had.
    assert "ignore_eos" in done.stdout + done.stderr


def test_answers_that_end_by_themselves_are_told(load: Load) -> None:
    with serving_process("--ttft-ms", "5", "--itl-ms", "1", "--natural-tokens", "3", "--refuse", "ignore_eos") as url:
        done = load.measured(
            url, "--arrivals", "poisson:60", "--requests", "20", "--prompts", "fixed:9", "--outputs", "fixed:8"
        )
    # With min_tokens, if the client thought of it, answers are whole; else they are shorter, and that is counted.
    rows = load.rows
    num_shorter = sum(int(row["answered_tokens"]) < 8 for row in rows)
    assert load.metrics["num_finished"] == 20
    assert load.metrics["answers"]["num_shorter"] == num_shorter
    if num_shorter:
        assert "ignore_eos" in done.stdout + done.stderr


# --- mistakes ---


BAD = {
    "no server": (("{none}",), "{none}"),
    "not a URL": (("ftp://somewhere/v1",), "ftp"),
    "port out of range": (("http://127.0.0.1:99999",), "99999"),
    "unknown host": (("http://no-such-host.invalid:8000",), "no-such-host.invalid"),
    "wrong model": (("{a}", "--model", "gpt-7"), "gpt-7"),
    "rate of nothing": (("{a}", "--arrivals", "poisson:0"), "poisson:0"),
    "unknown arrivals": (("{a}", "--arrivals", "weibull:3"), "weibull"),
    "no tokens": (("{a}", "--prompts", "fixed:0"), "fixed:0"),
    "no requests": (("{a}", "--requests", "0"), "--requests"),
    "cancel share": (("{a}", "--cancel", "1.5"), "1.5"),
    "targets": (("{a}", "--slo", "chat:-1,5"), "chat"),
    "body": (("{a}", "--extra-body", "[1]"), "--extra-body"),
    "body of no JSON": (("{a}", "--extra-body", "{{"), "--extra-body"),
    "header": (("{a}", "--header", "no colon"), "--header"),
    "header lines": (("{a}", "--header", "X: a\r\nContent-Length: 0"), "--header"),
    "rates": (("{a}", "--rates", "1,-2"), "--rates"),
    "attainment": (("{a}", "--find-goodput", "--target-attainment", "1.5"), "--target-attainment"),
    "tolerance": (("{a}", "--find-goodput", "--tolerance", "0"), "--tolerance"),
    "search and rates": (("{a}", "--find-goodput", "--rates", "1,2"), "--rates"),
    "search in a closed loop": (("{a}", "--find-goodput", "--concurrency", "3"), "--concurrency"),
    "timeout": (("{a}", "--timeout", "0s"), "--timeout"),
    "timeout of no unit": (("{a}", "--timeout", "soon"), "--timeout"),
    "concurrency": (("{a}", "--concurrency", "0"), "--concurrency"),
    "retries": (("{a}", "--retries", "-1"), "--retries"),
    "send lag": (("{a}", "--max-send-lag-ms", "nan"), "--max-send-lag-ms"),
    "URL and servers": (("{a}", "--servers", "A={a},B={a}"), "--servers"),
    "names of servers": (("--servers", "A={a},A={a}"), "A"),
    "rounds of one server": (("{a}", "--rounds", "2"), "--rounds"),
    "workload": (("{a}", "--workload", "poetry"), "poetry"),
    "trace": (("{a}", "--trace", "absent.jsonl"), "absent.jsonl"),
    "chat as ids": (("{a}", "--endpoint", "chat", "--prompts-as", "ids"), "token ids"),
    "tokenizer": (("{a}", "--tokenizer", "absent"), "absent"),
    "warm-up of all": (("{a}", "--requests", "5", "--warmup", "5"), "--warmup"),
    "warm-up of all the time": (("{a}", "--requests", "5", "--arrivals", "constant:50", "--warmup", "1h"), "--warmup"),
    "compare and run": (("{a}", "--compare", "x.json", "y.json"), "--compare"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_names_it(load: Load, servers: Servers, case: str) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        none = f"http://127.0.0.1:{closed.getsockname()[1]}"
        arguments, named = BAD[case]
        # Short, should it be no mistake after all.
        short = () if "--requests" in arguments or "--compare" in arguments else ("--requests", "3", "--speed", "20")
        done = load(*(one.format(a=servers.a, none=none) for one in arguments), *short)
    assert done.status in (1, 2), done.stdout + done.stderr
    assert named.format(none=none) in done.stderr
    assert not load.folder.exists()


def test_an_output_that_is_there_is_kept_and_nothing_is_sent(
    run_tandem: Tandem, tmp_path: Path, servers: Servers
) -> None:
    arguments = ("loadtest", servers.a, "--requests", "3", "--arrivals", "constant:50", *SHAPE, "--no-html", "--output")
    assert run_tandem(*arguments, str(tmp_path / "out")).status in (0, 3)
    kept = (tmp_path / "out" / "report.json").read_bytes()
    before = server_log(servers.a)
    done = run_tandem(*arguments, str(tmp_path / "out"))
    assert done.status == 2
    assert "--force" in done.stderr
    # Told before the load, not after an hour of it.
    (tmp_path / "file").write_text("")
    for unwritable in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run_tandem(*arguments, str(unwritable))
        assert done.status == 2
        assert str(tmp_path / "file") in done.stderr
    assert log_since(servers.a, before) == []
    assert (tmp_path / "out" / "report.json").read_bytes() == kept
    assert run_tandem(*arguments, str(tmp_path / "out"), "--force").status in (0, 3)


# --- files, the module ---


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action", "poster") or name.endswith(":href"):
                self.references.append(value or "")


def test_the_page_stands_alone_and_a_hostile_server_writes_nothing_into_it(load: Load, tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=//evil.example/x>"
    rules = ("--fault", "error_event=0.2", "--fault", "reject_seconds=0.2", "--seed", "9")
    pages: list[_Page] = []
    for model in ("scripted", evil):
        with serving_process("--ttft-ms", "5", "--itl-ms", "1", "--model", model, *rules) as url:
            load.measured(url, "--arrivals", "poisson:60", "--requests", "30", *SHAPE, html=True)
        text = (load.folder / "report.html").read_text(encoding="utf-8")
        page = _Page()
        page.feed(text)
        pages.append(page)
        assert page.references == [one for one in page.references if one.startswith(("#", "data:"))]
        assert not re.search(r"@import|url\((?!['\"]?(#|data:))", text)
        assert load.report["runs"][0]["model"] == model
        assert {path.name for path in load.folder.iterdir()} == {"report.json", "requests.csv", "report.html"}
        assert len(load.rows) == 30
    usual, hostile = pages
    assert usual.tags["svg"] + usual.tags["img"] + usual.tags["canvas"] > 0
    assert (hostile.tags["script"], hostile.tags["img"]) == (usual.tags["script"], usual.tags["img"])


def test_the_module_runs_by_itself_without_the_server_side(tmp_path: Path, servers: Servers) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['loadtest', {servers.a!r}, '--requests', '5', '--arrivals', 'constant:50', '--prompts',"
        f" 'fixed:8', '--outputs', 'fixed:3', '--output', {str(tmp_path / 'out')!r}]\n"
        "try:\n    runpy.run_module('loadtest', run_name='__main__')\n"
        "except SystemExit as left:\n    status = left.code\n"
        "print('STATUS', status)\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    lines = {line.partition(" ")[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}
    assert lines["STATUS"] in ("0", "3", "None"), done.stdout + done.stderr
    loaded = set(lines["LOADED"].split())
    server_side = {"torch", "gateway", "coordinator", "engine", "worker", "prefill", "decode", "kvtransfer", "cluster"}
    assert not loaded & (server_side | {"rpc", "grpc", "transformers"})
    assert (tmp_path / "out" / "report.html").exists()
