"""`tandem simulate` as a user meets it: a process of its own, its files, its figures against hand calculations."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from tests.support.commands import PATIENCE_S, PROGRAM
from tests.support.layout import ROOT
from tests.support.profiles import PROFILE, save_to
from tests.support.traces import trace_path

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

#: A step of it is a formula that fits on a line, see `prefill_ms`.
COSTS = ("--latency", "distserve:opt-13b-tp1")
#: Keys and values of OPT-13B: 40 layers of 5,120 dimensions, two bytes each.
KV_TOKEN_BYTES = 2 * 40 * 5120 * 2

MOONCAKE_ROW = '{"timestamp": 0, "input_length": 600, "output_length": 9, "hash_ids": [0, 1]}\n'


def environ(**extra: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    return {**clean, "COLUMNS": "200", "NO_COLOR": "1", **extra}


def simulate(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, "simulate", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environ(**extra), capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )


def figures(*arguments: str, cwd: Path, name: str = "study", **extra: str) -> dict[str, Any]:
    """The report of a study that must succeed; made without plots."""
    done = simulate(*arguments, "--no-plots", "--output", name, cwd=cwd, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    return read_report(cwd / name)


def read_report(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((folder / "report.json").read_text(encoding="utf-8")))


def prefill_ms(coefficients: dict[str, float], prompt_tokens: int) -> float:
    """DistServe's fit (OSDI'24) of one prompt that is read in one step."""
    square = coefficients["prefill_square_s"] * prompt_tokens**2
    return 1e3 * (coefficients["prefill_base_s"] + coefficients["prefill_token_s"] * prompt_tokens + square)


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred requests, three at a time; each prompt begins like all others. The folder's name is not ASCII."""
    file = tmp_path_factory.mktemp("dosé ☃") / "träce.jsonl"
    rows = (
        {"timestamp": 1000 * (i // 3), "input_length": 768, "output_length": 1 + i % 30, "hash_ids": [0, i + 1]}
        for i in range(200)
    )
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return file


def test_a_trace_on_a_cluster_file_is_reported_in_words_figures_and_pictures(trace: Path) -> None:
    cluster = ("--config", str(ROOT / "configs" / "local.yaml"), "--workers", "2P3D", "--kv-blocks", "4000", *COSTS)
    targets = ("--slo", "interactive:170,100", "--find-goodput", "--target-attainment", "0.6")
    done = simulate("--trace", str(trace), *cluster, *targets, "--output", "study ☃", cwd=trace.parent)
    assert done.returncode == 0, done.stderr
    for word in ("goodput", "attainment", "TTFT", "TPOT", "ITL", "p50", "p99", "busy %", "transfer", "handoffs"):
        assert word in done.stdout, word
    folder = trace.parent / "study ☃"
    pictures = sorted(folder.glob("*.png"))
    assert len(pictures) >= 3
    assert all(picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for picture in pictures)

    report = read_report(folder)
    metrics = report["metrics"]
    assert metrics["num_requests"] == metrics["num_finished"] == metrics["ttft"]["count"] == 200
    assert [(pool["role"], pool["num_workers"]) for pool in metrics["pools"]] == [("prefill", 2), ("decode", 3)]
    assert all(0 < pool["busy_share"] <= 1 for pool in metrics["pools"])
    assert metrics["itl"]["count"] == sum(i % 30 for i in range(200))
    attainment = metrics["attainment"]
    # Two workers read a prompt each, in two steps of 72 ms at most; the third ends in a third step of its worker.
    # All is over, and heartbeats have said so, when the next three come.
    assert attainment["joint"] == attainment["ttft_only"] == 134 / 200
    assert attainment["tpot_only"] == 1
    assert metrics["goodput_rps"] == pytest.approx(134 / 200 * 199 / 66)
    # Answers of one token end at the prefill worker.
    num_handoffs = sum(i % 30 > 0 for i in range(200))
    assert metrics["transfer"]["num_transfers"] == num_handoffs
    assert metrics["transfer"]["total_bytes"] == num_handoffs * 768 * KV_TOKEN_BYTES
    search = report["goodput_search"]
    assert search["target"] == 0.6
    assert metrics["offered_rps"] <= search["goodput_rps"] < search["missed_rps"]
    # The first block of 512 tokens, of all but the first.
    assert any(f"{512 * 199 / (768 * 200):.1%} of the prompt tokens repeat" in text for text in report["warnings"])


def test_equal_commands_find_equal_figures_and_other_seeds_others(tmp_path: Path) -> None:
    drawn = ("--arrivals", "gamma:8,cv=2", "--requests", "300", *COSTS)
    first = figures(*drawn, cwd=tmp_path, name="first", PYTHONHASHSEED="1")
    again = figures(*drawn, cwd=tmp_path, name="again", PYTHONHASHSEED="2")
    assert again["metrics"] == first["metrics"]
    assert figures(*drawn, "--seed", "1", cwd=tmp_path, name="other")["metrics"] != first["metrics"]


def test_an_idle_cluster_takes_what_the_latency_model_says(tmp_path: Path) -> None:
    shape = ("--arrivals", "constant:0.5", "--prompts", "fixed:320", "--outputs", "fixed:21", "--requests", "40")
    report = figures(*shape, *COSTS, "--link-bandwidth", "10GB", "--link-latency-ms", "0", cwd=tmp_path)
    metrics, coefficients = report["metrics"], report["study"]["cluster"]["latency"]["coefficients"]
    alone_ms = prefill_ms(coefficients, 320)
    assert alone_ms < metrics["ttft"]["mean_ms"] < alone_ms + 2.0
    assert metrics["ttft"]["p50_ms"] == pytest.approx(metrics["ttft"]["max_ms"])
    handoff_ms = 1e3 * 320 * KV_TOKEN_BYTES / 10e9
    step_ms = 1e3 * (
        coefficients["decode_base_s"] + coefficients["sequence_s"] + 330.5 * coefficients["context_token_s"]
    )
    assert metrics["tpot"]["mean_ms"] == pytest.approx(step_ms + handoff_ms / 20, rel=0.01)
    assert metrics["transfer"]["mean_ms"] == pytest.approx(handoff_ms)
    assert metrics["transfer"]["total_bytes"] == 40 * 320 * KV_TOKEN_BYTES
    assert metrics["attainment"]["joint"] == 1.0


def test_a_prefill_worker_is_a_queue_with_one_server(tmp_path: Path) -> None:
    rate_rps = 8.0
    shape = ("--arrivals", f"poisson:{rate_rps}", "--prompts", "fixed:512", "--outputs", "fixed:1")
    report = figures(*shape, *COSTS, "--requests", "30000", cwd=tmp_path)
    metrics = report["metrics"]
    service_ms = prefill_ms(report["study"]["cluster"]["latency"]["coefficients"], 512)
    utilisation = metrics["offered_rps"] * service_ms / 1e3
    assert metrics["pools"][0]["busy_share"] == pytest.approx(utilisation, rel=0.005)
    # M/D/1 (Pollaczek and Khinchine); a message to the coordinator and one to the worker come on top.
    waiting_ms = service_ms * utilisation / (2 * (1 - utilisation))
    assert metrics["queue"]["mean_ms"] == pytest.approx(waiting_ms + 0.9, rel=0.05)


def test_twice_the_workers_take_a_rate_that_one_pair_cannot(tmp_path: Path) -> None:
    # 20 prompts a second of 72 ms each are 1.44 workers.
    shape = ("--arrivals", "poisson:20", "--prompts", "fixed:512", "--outputs", "fixed:32", "--requests", "2000")
    one = figures(*shape, *COSTS, "--workers", "1P1D", cwd=tmp_path, name="one")["metrics"]
    two = figures(*shape, *COSTS, "--workers", "2P2D", cwd=tmp_path, name="two")["metrics"]
    assert one["attainment"]["joint"] < 0.1
    assert two["attainment"]["joint"] > 0.99
    assert one["ttft"]["mean_ms"] > 20 * two["ttft"]["mean_ms"]
    assert one["pools"][0]["busy_share"] > 0.95
    assert two["pools"][0]["busy_share"] == pytest.approx(0.72, rel=0.05)


def test_a_hundredfold_overload_ends_with_every_request_accounted_for(tmp_path: Path) -> None:
    # One decode worker writes the answers of those that found room in the queue in 800 s; clients wait 600 s.
    shape = ("--arrivals", "poisson:1000", "--prompts", "fixed:2000", "--outputs", "fixed:700", "--requests", "2000")
    metrics = figures(*shape, *COSTS, "--workers", "1P1D", cwd=tmp_path)["metrics"]
    outcomes = {name: metrics[f"num_{name}"] for name in ("finished", "rejected", "timed_out", "failed")}
    assert sum(outcomes.values()) == metrics["num_requests"] == 2000
    assert outcomes["rejected"] > 1000
    assert outcomes["finished"] > 0
    assert outcomes["timed_out"] > 0
    assert metrics["attainment"]["joint"] < 0.05


@pytest.mark.parametrize("name", ["mooncake_conversation.jsonl", "azure_llm_2023_code.csv"])
def test_public_traces_are_read(name: str, tmp_path: Path) -> None:
    rows = ("--trace", str(trace_path(name)), "--requests", "60")
    metrics = figures(*rows, "--workers", "2P2D", "--model", "llama-3-8b", cwd=tmp_path)["metrics"]
    assert metrics["num_finished"] == metrics["num_requests"] == 60


BAD_FILES = {
    "empty.jsonl": "",
    "torn.jsonl": MOONCAKE_ROW + MOONCAKE_ROW[:40],
    "negative.jsonl": MOONCAKE_ROW + MOONCAKE_ROW.replace("600", "-600"),
    "columns.csv": "when,prompt,answer\n0,10,5\n",
}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--trace", "empty.jsonl"), "empty.jsonl"),
        (("--trace", "torn.jsonl"), "torn.jsonl:2"),
        (("--trace", "negative.jsonl"), "negative.jsonl:2"),
        (("--trace", "columns.csv"), "columns.csv:1"),
        (("--workers", "0P1D"), "--workers 0P1D"),
        (("--device", "abacus"), "--device abacus"),
        (("--speed", "1e-300", "--requests", "9"), "days"),
        (("--output", "held"), "--output held"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_is_told_in_one_line_that_names_it(arguments: tuple[str, str], told: str, tmp_path: Path) -> None:
    for name, content in BAD_FILES.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "report.json").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    done = simulate(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("tandem: ")
    assert told in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "held" / "report.json").read_text() == "precious"


def test_a_profile_whose_fit_is_bad_is_refused(tmp_path: Path) -> None:
    save_to(PROFILE, tmp_path / "profile.json")
    profile = json.loads((tmp_path / "profile.json").read_text())
    profile["errors"]["decode"] = 0.051
    (tmp_path / "profile.json").write_text(json.dumps(profile))
    done = simulate("--profile", "profile.json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("tandem: profile_refused: profile profile.json:")
    assert "5.1% for decode (at most 5%)" in done.stderr


@contextmanager
def on_a_terminal(*arguments: str, cwd: Path) -> Generator[tuple[subprocess.Popen[str], int]]:
    """The process, killed at the end, and the terminal that its stderr is."""
    terminal, theirs = os.openpty()
    command = [*PROGRAM, "simulate", *arguments]
    process = subprocess.Popen(
        command, cwd=cwd, env=environ(TERM="xterm"), stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    os.close(theirs)
    with process:
        try:
            yield process, terminal
        finally:
            process.kill()
            os.close(terminal)


def test_ctrl_c_in_a_long_study_leaves_the_earlier_one(tmp_path: Path) -> None:
    figures("--requests", "3", *COSTS, cwd=tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()}
    long = ("--requests", "100000", "--prompts", "fixed:9", "--outputs", "fixed:300", "--force", "--output", "study")
    with on_a_terminal(*long, *COSTS, cwd=tmp_path) as (process, terminal):
        shown = b""
        while b"virtual s" not in shown:
            shown += os.read(terminal, 4096)
        assert "simulating" in shown.decode()
        assert "/100000" in shown.decode()
        process.send_signal(signal.SIGINT)
        stdout, _ = process.communicate(timeout=PATIENCE_S)
        after = os.read(terminal, 65536).decode(errors="replace")
    assert (process.returncode, stdout) == (128 + signal.SIGINT, "")
    assert "Traceback" not in after
    assert {path.name: path.read_bytes() for path in (tmp_path / "study").iterdir()} == before
