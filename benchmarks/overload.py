"""Five times what a real cluster can serve: who is refused, how soon, and what becomes of those accepted.

    python -m benchmarks.overload [--quick] [--factor 5]

2P+2D of the demo model, every worker a process, with few places each, so that the engines' batches are what is full and
not the machine. Four clients that ask one after the other measure what it can serve and teach the coordinator what
steps cost; then an open loop offers `factor` times that. Once with admission by prediction, once with none: the same
seed, so the same prompts. Everything is seen by the client: a refusal's latency is from sending to the end of its body.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cluster import running
from benchmarks.report import finish, print_table
from loadtest.metrics import attained
from loadtest.record import Outcome
from loadtest.report.document import read_report
from loadtest.run import INVALID
from workload.slo import SloClass

if TYPE_CHECKING:
    from contracts.config import AdmissionForm
    from loadtest.report.document import ServerRun

PROMPT_TOKENS, OUTPUT_TOKENS = 96, 48
SLO = SloClass("interactive", 3000.0, 300.0)
#: As many as the decode workers have places.
NUM_CLIENTS = 4
RUN_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    num_taught: int
    overload_s: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=float, default=5.0, help="offered, as a multiple of what can be served")
    parser.add_argument("--quick", action="store_true", help="4 s of overload instead of 60 s")
    arguments = parser.parse_args()
    effort = Effort(num_taught=16, overload_s=4.0) if arguments.quick else Effort(num_taught=200, overload_s=60.0)
    forms: tuple[AdmissionForm, ...] = ("predicted", "none")
    sides = {form: asyncio.run(side(form, effort, arguments.factor)) for form in forms}
    print_table(
        f"{arguments.factor:g} times what is served without a queue, for {effort.overload_s:g} s; TTFT {SLO.ttft_ms:g} "
        f"ms, TPOT {SLO.tpot_ms:g} ms",
        (
            "admission", "served/s", "offered/s", "offered", "refused", "accepted", "in SLO", "% of accepted",
            "in SLO/s", "refusal p50 ms", "p99 ms", "TTFT p99 ms", "send lag p99 ms",
        ),
        [each.row(form) for form, each in sides.items()],
    )  # fmt: skip
    for form, each in sides.items():
        print(f"{form}: refused for {each.reasons or 'nothing'}")
    predicted, none = sides["predicted"], sides["none"]
    figures = {
        "capacity_rps": predicted.capacity_rps,
        "refused_share": predicted.num_refused / predicted.num_offered,
        "accepted_in_slo": predicted.num_in_slo / max(1, predicted.num_accepted),
    }
    # What there is nothing to say of is left out: JSON has no other word for it.
    if none.num_in_slo:
        figures["in_slo_over_no_admission"] = predicted.in_slo_rps / none.in_slo_rps
    if predicted.num_refused:
        figures |= {"refusal_p50_ms": predicted.refusal_ms(50), "refusal_p99_ms": predicted.refusal_ms(99)}
    finish("overload", figures)


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    capacity_rps: float
    offered_rps: float
    overload_s: float
    num_offered: int
    num_refused: int
    num_in_slo: int
    refusals_s: np.ndarray
    ttft_p99_ms: float
    send_lag_p99_ms: float
    reasons: dict[str, int]

    @property
    def num_accepted(self) -> int:
        return self.num_offered - self.num_refused

    @property
    def in_slo_rps(self) -> float:
        return self.num_in_slo / self.overload_s

    def refusal_ms(self, percentile: float) -> float:
        return 1e3 * float(np.percentile(self.refusals_s, percentile)) if len(self.refusals_s) else float("nan")

    def row(self, form: str) -> tuple[object, ...]:
        return (
            form,
            self.capacity_rps,
            self.offered_rps,
            self.num_offered,
            self.num_refused,
            self.num_accepted,
            self.num_in_slo,
            100.0 * self.num_in_slo / max(1, self.num_accepted),
            self.in_slo_rps,
            self.refusal_ms(50),
            self.refusal_ms(99),
            self.ttft_p99_ms,
            self.send_lag_p99_ms,
        )


async def side(form: AdmissionForm, effort: Effort, factor: float) -> Side:
    """Raises RuntimeError with what a failed client said."""
    async with running(cluster(form)) as base_url:
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
            closed = ("--concurrency", str(NUM_CLIENTS), "--requests", str(effort.num_taught), "--seed", "1")
            # What steps cost is learned from steps of many sizes.
            await loadtest(
                base_url,
                Path(scratch),
                *closed,
                "--prompts",
                "lognormal:mean=120,sigma=0.7,max=300",
                "--outputs",
                "lognormal:mean=8,sigma=0.5,max=16",
            )
            taught = await loadtest(base_url, Path(scratch), *closed, *lengths())
            capacity_rps = taught.metrics.finished_rps
            offered = (
                ("--arrivals", f"poisson:{factor * capacity_rps:.3f}", "--duration", f"{effort.overload_s:g}s"),
                ("--seed", "2", "--max-send-lag-ms", "1000"),
            )
            run = await loadtest(base_url, Path(scratch), *(word for words in offered for word in words), *lengths())
    return seen(run, capacity_rps, effort.overload_s)


def lengths() -> tuple[str, ...]:
    return "--prompts", f"fixed:{PROMPT_TOKENS}", "--outputs", f"fixed:{OUTPUT_TOKENS}"


async def loadtest(base_url: str, folder: Path, *arguments: str) -> ServerRun:
    slo = f"{SLO.name}:{SLO.ttft_ms:g},{SLO.tpot_ms:g}"
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loadtest", base_url, *arguments, "--slo", slo,
        "--output", str(folder), "--force", "--no-html",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = await asyncio.wait_for(process.communicate(), RUN_LIMIT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode not in (0, INVALID):
        raise RuntimeError(f"the load test ended with {process.returncode}:\n{output.decode()[-4000:]}")
    return read_report(folder / "report.json").runs[0]


def seen(run: ServerRun, capacity_rps: float, overload_s: float) -> Side:
    rows = run.requests
    is_refused = rows.outcome.equals(Outcome.REJECTED)
    return Side(
        capacity_rps=capacity_rps,
        offered_rps=run.metrics.offered_rps,
        overload_s=overload_s,
        num_offered=run.metrics.num_requests,
        num_refused=int(is_refused.sum()),
        num_in_slo=int(attained(rows, [SLO]).both.sum()),
        refusals_s=(rows.end_s - rows.sent_s)[is_refused],
        ttft_p99_ms=run.metrics.ttft.p99_ms,
        send_lag_p99_ms=run.metrics.send_lag.p99_ms,
        reasons=dict(
            Counter(reason_of(rows.detail[row]) for row in np.flatnonzero(is_refused).tolist()).most_common(5)
        ),
    )


def reason_of(detail: str) -> str:
    """Of an error's message without its numbers."""
    return " ".join(word for word in detail.split() if not any(character.isdigit() for character in word))[:100]


def cluster(form: AdmissionForm) -> dict[str, Any]:
    pool = {"workers": 2, "kv_blocks": 128}
    return {
        "model": "demo",
        "transport": "shm",
        "transfer": {"probe": False},
        "gateway": {"port": 0},
        "engine": {"max_batch_tokens": 96, "max_sequences": 2},
        "slo": {SLO.name: {"ttft_ms": SLO.ttft_ms, "tpot_ms": SLO.tpot_ms}},
        "default_slo_class": SLO.name,
        "coordinator": {"admission": {"form": form}},
        "pools": [{"name": "prefill", "role": "prefill", **pool}, {"name": "decode", "role": "decode", **pool}],
    }


if __name__ == "__main__":
    main()
