"""`tandem plan` as a user meets it: its answer, the cluster file that it writes, its errors."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING, Any, cast

import pytest
import yaml

from tests.support.commands import PATIENCE_S, PROGRAM
from tests.support.long_tests import only_long
from tests.support.profiles import PROFILE, save_to

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.commands import Tandem

#: A workload that a profile of steps of 10 ms and more serves a few times a second.
SMALL = ("--prompts", "fixed:100", "--outputs", "fixed:10", "--arrivals", "poisson:2", "--requests", "60")
PUBLISHED = ("--latency", "distserve:opt-13b", "--max-pipeline", "1", "--requests", "60")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    save_to(PROFILE, path)
    return path


def read_plan(path: Path) -> dict[str, Any]:
    return cast("dict[str, Any]", yaml.safe_load(path.read_text(encoding="utf-8")))


def test_a_profile_is_planned_with_and_the_file_is_accepted(profile: Path, tmp_path: Path) -> None:
    output = tmp_path / "cluster.yaml"
    targets = ("--slo", "ttft=200ms,tpot=60ms")
    command = (*PROGRAM, "plan", "--profile", str(profile), "--model", "demo", "--gpus", "3", *SMALL, *targets)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*PROGRAM, *arguments] if arguments else [*command, "--output", str(output)],
            env={**clean, "COLUMNS": "200", "NO_COLOR": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_S,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    for word in ("best", "why:", "limit:", "requests/s on", "meet both targets", "binds", f"wrote {output}"):
        assert word in done.stdout, done.stdout
    assert "colocated" in done.stdout or "split" in done.stdout
    tree = read_plan(output)
    assert tree["model"] == "demo"
    assert tree["slo"] == {"default": {"ttft_ms": 200.0, "tpot_ms": 60.0}}
    assert tree["default_slo_class"] == "default"
    assert tree["coordinator"]["dispatch"]["profile"] == str(profile.resolve())
    lengths = {"prompt_tokens": 100.0, "p95_prompt_tokens": 100.0, "answer_tokens": 10.0}
    assert tree["coordinator"]["replan"]["expected"] == lengths, "nobody asked for a rate"
    assert sum(pool["workers"] for pool in tree["pools"]) <= 3
    for pool in tree["pools"]:
        assert (pool["tensor_parallel"], pool["pipeline_parallel"]) == (1, 1)
        assert pool["kv_blocks"] == PROFILE.num_blocks
    accepted = run("config", "validate", str(output))
    assert (accepted.returncode, accepted.stdout) == (0, f"{output}: ok\n")
    again = run()
    assert again.returncode == 2
    assert f"--output {output}: exists already; --force replaces it" in again.stderr


def test_equal_commands_write_equal_files(run_tandem: Tandem, profile: Path, tmp_path: Path) -> None:
    texts: list[str] = []
    for name in ("first", "second"):
        output = tmp_path / name
        arguments = ("plan", "--profile", str(profile), "--gpus", "2", *SMALL, "--output", str(output))
        assert run_tandem(*arguments).status == 0
        texts.append(output.read_text())
    assert texts[0] == texts[1]


@only_long
def test_a_rate_gets_the_fewest_devices_and_too_high_a_one_says_so(
    run_tandem: Tandem, profile: Path, tmp_path: Path
) -> None:
    output = tmp_path / "plan.yaml"
    base = ("plan", "--profile", str(profile), *SMALL, "--slo", "chat:400,60", "--output", str(output), "--force")
    done = run_tandem(*base, "--gpus", "4", "--rate", "1")
    assert done.status == 0, done.stderr
    assert [pool["workers"] for pool in read_plan(output)["pools"]] == [1]
    assert "on 1 device, " in done.stdout
    assert read_plan(output)["coordinator"]["replan"]["expected"]["rate_rps"] == 1.0
    done = run_tandem(*base, "--gpus", "1", "--rate", "1000")
    assert done.status == 1
    assert "no plan on these devices serves 1e+03 requests/s; this is the most they can" in done.stdout


def test_published_fits_are_searched_over_their_parallelism(run_tandem: Tandem, tmp_path: Path) -> None:
    output = tmp_path / "plan.yaml"
    arguments = ("--gpus", "3", "--slo", "chat:400,100", "--output", str(output))
    done = run_tandem("plan", *PUBLISHED, *arguments)
    assert done.status == 0, done.stderr
    assert "DistServe's published fits of opt-13b on A100-80G" in done.stdout
    tree = read_plan(output)
    assert sum(pool["workers"] * pool["tensor_parallel"] for pool in tree["pools"]) <= 3
    if any(pool["tensor_parallel"] > 1 for pool in tree["pools"]):
        assert "tandem serve refuses them" in output.read_text()


def test_a_roofline_drops_what_does_not_fit_and_says_what_it_assumes(run_tandem: Tandem) -> None:
    done = run_tandem(
        *("plan", "--model", "llama-3-70b", "--device", "mi300x", "--gpus", "2", "--max-pipeline", "2"),
        *("--requests", "60", "--slo", "chat:2000,100", "--max-batch-tokens", "2048"),
    )
    assert done.status == 0, done.stderr
    assert "assumed to reach 60% of its compute and 50% of its memory bandwidth" in done.stdout
    assert "a roofline is not fitted to an engine" in done.stdout
    done = run_tandem("plan", "--model", "llama-3-70b", "--device", "h100-sxm", "--gpus", "1", "--requests", "10")
    assert done.status == 2
    assert "no worker on 1 devices can hold the model: TP 1: weights of" in done.stderr


def test_targets_that_nobody_meets_make_no_plan(run_tandem: Tandem, profile: Path, tmp_path: Path) -> None:
    output = tmp_path / "plan.yaml"
    done = run_tandem(
        *("plan", "--profile", str(profile), "--gpus", "2", *SMALL, "--slo", "ttft=1ms,tpot=1ms"),
        *("--output", str(output)),
    )
    assert done.status == 1
    assert "no plan" in done.stdout
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpus", "0"), "--gpus 0: must be between 1 and 1,024"),
        (("--gpus", "9", "--nodes", "2"), "--gpus 9 --nodes 2: 9 devices do not divide among 2 nodes"),
        (("--gpus", "2", "--nodes", "0"), "--nodes 0: must be at least 1"),
        (("--gpus", "2", "--target-attainment", "1.5"), "--target-attainment 1.5: must be above 0, at most 1"),
        (("--gpus", "2", "--latency", "distserve:opt-7b"), "--latency distserve:opt-7b: unknown"),
        (
            ("--gpus", "2", "--latency", "distserve:opt-13b-tp1"),
            "write distserve:MODEL, with a model of opt-13b, opt-66b",
        ),
        (("--gpus", "2", "--device", "h100"), "--device h100: unknown"),
        (("--gpus", "2", "--link-bandwidth", "fast"), "--link-bandwidth: 'fast' is not a number"),
        (("--gpus", "2", "--slo", "ttft=1s"), "SLO 'ttft=1s': not NAME:TTFT_MS,TPOT_MS"),
        (("--gpus", "2", "--slo", "tpot=1s,ttft=1s"), "'tpot=1s' stands where ttft= should"),
        (
            ("--gpus", "2", "--model", "llama-3-8b", "--tensor-parallel", "3"),
            "--tensor-parallel 3: no worker on 2 devices",
        ),
        (("--gpus", "2", "--output", "nowhere/plan.yaml"), "there is no folder nowhere"),
    ],
)
def test_errors_name_the_flag(run_tandem: Tandem, arguments: tuple[str, ...], message: str) -> None:
    done = run_tandem("plan", *arguments)
    assert done.status == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_the_number_of_devices_must_be_said(run_tandem: Tandem) -> None:
    done = run_tandem("plan")
    assert done.status != 0
    assert "--gpus" in done.stdout + done.stderr
