"""`tandem simulate` from the command line to the files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, cast

import pytest
from matplotlib.image import imread

from tests.support.layout import ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.commands import Tandem

PLOTS = ("attainment.png", "latency_cdf.png", "timeline.png", "ttft_by_prompt.png")
COSTS = ("--latency", "distserve:opt-13b-tp1")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three hundred requests at four a second."""
    rng = random.Random(7)
    file = tmp_path / "trace.csv"
    now_s = 0.0
    rows = ["Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type"]
    for _ in range(300):
        now_s += rng.expovariate(4.0)
        prompt_tokens, output_tokens = rng.randint(10, 900), rng.randint(1, 60)
        total_tokens = prompt_tokens + output_tokens
        rows.append(f"{now_s:.3f},ChatGPT,{prompt_tokens},{output_tokens},{total_tokens},Conversation log")
    file.write_text("\n".join(rows) + "\n")
    return file


def read_report(folder: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", json.loads((folder / "report.json").read_text()))


def test_a_trace_is_simulated_told_and_written(run_tandem: Tandem, trace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "study"
    arguments = ("--trace", str(trace), "--workers", "2P2D", *COSTS, "--slo", "interactive:250,100")
    done = run_tandem("simulate", *arguments, "--output", str(folder))
    assert (done.status, done.stderr) == (0, "")
    report = read_report(folder)
    metrics = report["metrics"]
    assert metrics["num_requests"] == metrics["num_finished"] == 300
    assert 0 < metrics["attainment"]["joint"] <= 1
    assert metrics["ttft"]["p50_ms"] > 18.1
    assert [pool["num_workers"] for pool in metrics["pools"]] == [2, 2]
    decoded = sum(pool["decode_tokens"] for pool in metrics["pools"])
    assert decoded == metrics["itl"]["count"] > 300
    assert report["study"]["command"].startswith("tandem simulate --trace")
    assert report["study"]["workload"]["summary"]["kind"] == "burstgpt"
    assert set(report["study"]["versions"]) == {"tandem-serve", "python", "numpy"}
    assert f"{100 * metrics['attainment']['joint']:.2f}" in done.stdout
    assert f"wrote {folder}/report.json, latency_cdf.png" in done.stdout
    assert sorted(path.name for path in folder.glob("*.png")) == sorted(PLOTS)
    for name in PLOTS:
        assert imread(folder / name).size > 100_000


def test_prompts_that_repeat_each_other_warn_that_no_cache_is_modelled(run_tandem: Tandem, tmp_path: Path) -> None:
    rows = (
        {"timestamp": 1000 * number, "input_length": 600, "output_length": 10, "hash_ids": [0, 1 + number]}
        for number in range(10)
    )
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ("simulate", "--trace", str(trace), *COSTS, "--no-plots", "--force", "--output", str(tmp_path))
    assert run_tandem(*arguments).status == 0
    (warning,) = read_report(tmp_path)["warnings"]
    assert warning.startswith("no prefix cache is modelled")
    assert f"{9 * 512 / 6000:.1%}" in warning
    assert run_tandem(*arguments, "--requests", "1").status == 0
    assert read_report(tmp_path)["warnings"] == []


def test_a_named_workload_of_chats_warns_of_what_is_assumed(run_tandem: Tandem, tmp_path: Path) -> None:
    arguments = ("--workload", "chat", "--requests", "60", "--rate", "4", "--cancel", "0.1")
    done = run_tandem("simulate", *arguments, *COSTS, "--no-plots", "--output", str(tmp_path))
    assert done.status == 0
    report = read_report(tmp_path)
    assert report["metrics"]["num_requests"] == 60
    assert [each["name"] for each in report["study"]["workload"]["slos"]] == ["chat"]
    assert report["workload"].startswith("chat: drawn chats: 60 requests of ")
    cancelled, assumed, uncached = report["warnings"]
    assert cancelled.startswith("cancellations are not simulated")
    assert assumed.startswith("a chat's next turn comes when its SLO class allows")
    assert uncached.startswith("no prefix cache is modelled")


def test_equal_commands_find_equal_figures(run_tandem: Tandem, tmp_path: Path) -> None:
    drawn = ("--no-plots", "--arrivals", "gamma:8,cv=2", "--requests", "200", *COSTS, "--seed", "3")
    reports: list[dict[str, Any]] = []
    for name in ("first", "second"):
        assert run_tandem("simulate", *drawn, "--output", str(tmp_path / name)).status == 0
        reports.append(read_report(tmp_path / name))
    assert reports[0]["metrics"] == reports[1]["metrics"]
    run_tandem("simulate", *drawn[:-1], "4", "--output", str(tmp_path / "other"))
    assert read_report(tmp_path / "other")["metrics"] != reports[0]["metrics"]


def test_the_goodput_is_searched_for(run_tandem: Tandem, tmp_path: Path) -> None:
    done = run_tandem(
        *("simulate", "--arrivals", "poisson:2", "--prompts", "fixed:200", "--outputs", "fixed:20"),
        *("--requests", "200", *COSTS, "--slo", "chat:200,100", "--find-goodput", "--no-plots"),
        *("--target-attainment", "0.95", "--output", str(tmp_path / "study")),
    )
    assert done.status == 0
    search = read_report(tmp_path / "study")["goodput_search"]
    assert search["converged"]
    assert search["target"] == 0.95
    assert search["goodput_rps"] < search["missed_rps"] <= 1.02 * search["goodput_rps"]
    assert f"{search['goodput_rps']:,.3f} requests/s with attainment >= 95%" in done.stdout
    # A step reads at most 512 tokens, that is 2.56 prompts, and takes 70 ms for them: 36 a second is all there is.
    assert 2.0 < search["goodput_rps"] < 40.0


def test_a_study_is_replaced_only_when_told_so(run_tandem: Tandem, tmp_path: Path) -> None:
    arguments = ("simulate", "--requests", "5", *COSTS, "--no-plots", "--output", str(tmp_path))
    assert run_tandem(*arguments).status == 0
    before = (tmp_path / "report.json").read_bytes()
    refused = run_tandem(*arguments, "--arrivals", "poisson:9")
    assert (refused.status, refused.stdout) == (2, "")
    assert refused.stderr == f"tandem: --output {tmp_path}: holds a study already; --force replaces it\n"
    assert (tmp_path / "report.json").read_bytes() == before
    assert run_tandem(*arguments, "--arrivals", "poisson:9", "--force").status == 0
    assert read_report(tmp_path)["study"]["workload"]["arrivals"] == "poisson:9"


def test_a_replaced_study_leaves_nothing_behind_but_what_was_not_its(run_tandem: Tandem, tmp_path: Path) -> None:
    arguments = ("simulate", "--requests", "5", *COSTS, "--output", str(tmp_path))
    (tmp_path / "notes.txt").write_text("mine")
    assert run_tandem(*arguments).status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "notes.txt", *PLOTS}
    assert run_tandem(*arguments, "--no-plots", "--force").status == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "notes.txt"}


def test_prompts_that_fit_nowhere_are_told_as_such(run_tandem: Tandem, tmp_path: Path) -> None:
    arguments = ("--prompts", "fixed:100", "--requests", "5", "--kv-blocks", "6", *COSTS, "--no-plots")
    assert run_tandem("simulate", *arguments, "--output", str(tmp_path)).status == 0
    report = read_report(tmp_path)
    assert report["metrics"]["num_rejected"] == 5
    unserved, warning = report["warnings"]
    assert unserved.startswith("of 5 requests, 5 refused: latency percentiles leave out")
    assert warning.startswith("5 requests were refused for their length alone: no worker holds more than 96 tokens")


def test_without_output_each_study_has_a_folder_of_its_own(
    run_tandem: Tandem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tandem("simulate", "--requests", "5", *COSTS, "--no-plots").status == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("study-")
    assert [path.name for path in folder.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--workers", "8X"), "--workers 8X: write counts and roles, such as 8P8D or 4P4D2M"),
        (("--model", "llama3"), "--model llama3: no checkpoint folder, and no known model"),
        (("--target-attainment", "2"), "--target-attainment 2: must be above 0, at most 1"),
        (("--trace", "missing.jsonl"), "trace missing.jsonl: cannot be read"),
        (("--output", "caf\udce9"), "file names must be UTF-8"),
        (("--link-latency-ms", "nan", *COSTS), "--link-bandwidth, --link-latency-ms: a link needs finite latency_s"),
        (("--step-overhead-ms", "inf"), "--compute-efficiency, --memory-efficiency, --step-overhead-ms: "),
        (("--requests", "1", "--find-goodput"), "--find-goodput: all requests of the workload come at once"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    run_tandem: Tandem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = run_tandem("simulate", *arguments)
    assert (refused.status, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"tandem: {what}")
    assert refused.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_before_anything_runs(run_tandem: Tandem, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = run_tandem("simulate", *COSTS, "--output", str(tmp_path / "file" / "study"))
    assert refused.status == 2
    assert refused.stderr == f"tandem: --output {tmp_path}/file/study: cannot be written: Not a directory\n"


def test_help_lists_it_without_loading_what_simulates(run_tandem: Tandem) -> None:
    assert [entry.name for entry in entry_points(group="tandem.commands")] == [
        "loadtest",
        "plan",
        "rejects",
        "simulate",
    ]
    assert "Predict how a cluster would serve a workload" in run_tandem("--help").stdout
    assert "--find-goodput" in run_tandem("simulate", "--help").stdout
    heavy = "{'torch', 'numpy', 'matplotlib', 'simulator.heap'}"
    program = f"import sys\nfrom cluster.cli import main\ntry: main()\nfinally: print({heavy} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=90
    )
    assert "simulate" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
