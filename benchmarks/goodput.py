"""What 1P1D and one chunked mixed worker can serve on equal cores, measured from outside, and what was predicted.

    python -m benchmarks.goodput [--quick] [--trace FILE] [--output DIR] [--profiles DIR]

The Mooncake conversation trace, its lengths scaled by 1/16 and its time to what two cores can carry, against real
clusters of the 88 M shape: 1P1D with a core each, and one chunked mixed worker on both cores. First
`tandem profile` and `tandem simulate` say what each should do; then `tandem loadtest` sends the workload to both in
turns (ABBA), and searches each one's goodput. The page of the load test, with the predictions beside what was
measured, is left in the output folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from benchmarks.cluster import running
from benchmarks.handoff import cluster, mixed, split
from benchmarks.models import random_88m
from benchmarks.report import finish, print_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
#: 512-token blocks of the trace become 32.
SCALE = 1 / 16
MAX_CONTEXT_TOKENS = 2048
#: Of the chunk sizes 64, 128 and 512 the one with the highest goodput by the simulator's word.
CHUNK_TOKENS = 512
#: Twice what the longest prompt takes on one idle core, and about four decode steps.
SLO = "interactive:8000,50"
PROFILE_ATTEMPTS = 3
LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """Requests of the runs in turns, and of each run of a search."""

    num_paired: int
    num_searched: int
    rate_rps: float
    rounds: int
    tolerance: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder; default: random weights, 88 M")
    parser.add_argument("--trace", type=Path, default=TRACE)
    parser.add_argument("--output", type=Path, default=Path("goodput"), help="folder for all reports")
    parser.add_argument("--profiles", type=Path, help="folder with 1.json and 2.json, by threads; default: made now")
    parser.add_argument("--quick", action="store_true", help="no search, one short pair; needs --profiles for 60 s")
    arguments = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("this comparison needs two cores: one for each pool")
    effort = (
        Effort(num_paired=6, num_searched=0, rate_rps=0.3, rounds=2, tolerance=0.2)
        if arguments.quick
        else Effort(num_paired=48, num_searched=48, rate_rps=0.3, rounds=4, tolerance=0.15)
    )
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        model = random_88m(arguments.model or Path(scratch) / "model")
        sides = {"1P1D": split(cores[:1], cores[1:]), "mixed": [mixed(CHUNK_TOKENS, cores)]}
        profiles = arguments.profiles or profile(model, output)
        beside = predict(sides, profiles, arguments.trace, output, effort)
        asyncio.run(measure(sides, model, arguments.trace, beside, output, effort))
    report(output, beside, effort)


def profile(model: Path, output: Path) -> Path:
    """Of one thread, as the workers of 1P1D have, and of two."""
    for threads in (1, 2):
        command = ["cluster", "profile", str(model), "--threads", str(threads), "--max-context", "4096"]
        for _ in range(PROFILE_ATTEMPTS):
            # A machine that is busy for a moment gives points that no fit meets, and such a profile is refused.
            if not tandem(*command, "--output", str(output / f"{threads}.json"), check=False):
                break
        else:
            raise SystemExit("no profile: the machine is too busy")
    return output


def predict(
    sides: Mapping[str, Sequence[dict[str, Any]]], profiles: Path, trace: Path, output: Path, effort: Effort
) -> dict[str, Path]:
    """Reports of the simulator, by side."""
    beside: dict[str, Path] = {}
    for name, pools in sides.items():
        config = output / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"max_model_len": MAX_CONTEXT_TOKENS, "pools": list(pools)}))
        folder = output / f"{name} predicted"
        threads = pools[0]["threads"]
        tandem(
            "cluster", "simulate", "--config", str(config), "--profile", str(profiles / f"{threads}.json"),
            *workload(trace, effort.num_searched or effort.num_paired, effort.rate_rps),
            "--find-goodput", "--no-plots", "--output", str(folder), "--force",
        )  # fmt: skip
        beside[name] = folder / "report.json"
    return beside


async def measure(
    sides: Mapping[str, Sequence[dict[str, Any]]],
    model: Path,
    trace: Path,
    beside: dict[str, Path],
    output: Path,
    effort: Effort,
) -> None:
    """Both clusters are up all the time; the one that is not asked idles."""
    async with AsyncExitStack() as stack:
        urls = [
            f"{name}={await stack.enter_async_context(running(cluster(model, pools)))}" for name, pools in sides.items()
        ]
        common = ("loadtest", "--servers", ",".join(urls), "--server-timeline")
        both = [flag for path in beside.values() for flag in ("--beside", str(path))]
        await asyncio.to_thread(
            tandem, *common, *workload(trace, effort.num_paired, effort.rate_rps),
            "--rounds", str(effort.rounds), "--output", str(output / "paired"), "--force", *both,
        )  # fmt: skip
        if effort.num_searched:
            await asyncio.to_thread(
                tandem, *common, *workload(trace, effort.num_searched, effort.rate_rps),
                "--find-goodput", "--tolerance", str(effort.tolerance), "--output", str(output / "searched"),
                "--force", *both,
            )  # fmt: skip


def workload(trace: Path, num_requests: int, rate_rps: float) -> tuple[str, ...]:
    return (
        "--trace", str(trace), "--scale-lengths", str(SCALE), "--max-context", str(MAX_CONTEXT_TOKENS), "--spread-ties",
        "--requests", str(num_requests), "--rate", str(rate_rps), "--slo", SLO,
    )  # fmt: skip


def tandem(module: str, *arguments: str, check: bool = True) -> int:
    """Runs one command; its output is ours."""
    sys.stdout.flush()
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False, timeout=LIMIT_S)
    if check and done.returncode:
        raise SystemExit(f"{module} {arguments[0]} ended with {done.returncode}")
    return done.returncode


def report(output: Path, beside: dict[str, Path], effort: Effort) -> None:
    paired = _runs(output / "paired")
    searched = _runs(output / "searched") if effort.num_searched else {}
    rows: list[list[object]] = []
    figures: dict[str, float] = {}
    for name, path in beside.items():
        predicted = json.loads(path.read_text())
        metrics, said = paired[name]["metrics"], predicted["metrics"]
        goodput = searched[name]["search"]["goodput_rps"] if searched else float("nan")
        predicted_goodput = predicted["goodput_search"]["goodput_rps"]
        key = name.lower()
        figures |= {
            f"goodput_rps_{key}": goodput,
            f"predicted_goodput_rps_{key}": predicted_goodput,
            f"ttft_p50_ms_{key}": metrics["ttft"]["p50_ms"],
            f"tpot_p50_ms_{key}": metrics["tpot"]["p50_ms"],
            f"attainment_{key}": metrics["attainment"]["joint"],
        }
        for label, one, rate in (("measured", metrics, goodput), ("predicted", said, predicted_goodput)):
            rows.append([
                f"{name}, {label}", one["ttft"]["p50_ms"], one["ttft"]["p99_ms"], one["tpot"]["p50_ms"],
                one["tpot"]["p99_ms"], 100 * one["attainment"]["joint"], rate,
            ])  # fmt: skip
    columns = ("side", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99", "attained %", "goodput /s")
    print_table(f"at {effort.rate_rps:g} requests/s, {SLO}", columns, rows)
    if searched:
        figures["goodput_1p1d_over_mixed"] = figures["goodput_rps_1p1d"] / figures["goodput_rps_mixed"]
    finish("goodput", {name: value for name, value in figures.items() if value == value})


def _runs(folder: Path) -> dict[str, dict[str, Any]]:
    return {run["name"]: run for run in json.loads((folder / "report.json").read_text())["runs"]}


if __name__ == "__main__":
    main()
