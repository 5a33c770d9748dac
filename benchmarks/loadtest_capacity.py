"""How much one client process on one core offers and receives, and whether it says so when that is too much."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.loadtest_clients import START_LIMIT_S, run_tandem
from benchmarks.report import print_table, quantile_ms
from tests.support.scripted_server import serving_process

if TYPE_CHECKING:
    from pathlib import Path

    from loadtest.report.document import ServerRun

RATE_RPS = 2000
PROMPT_TOKENS = 128
#: One more than ten a request, so that the time after the last arrival does not take the rate below ten.
OUTPUT_TOKENS = 11
TTFT_MS, ITL_MS = 50.0, 10.0
#: Connections are opened then; measured is what follows.
WARMUP_S = 2.0
#: Beyond the first rate, until the client says that it is too much.
FACTORS = (1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    rate_rps: float
    run: ServerRun
    #: How late the server itself was with its chunks.
    server_late_ms_p99: str

    def row(self) -> list[object]:
        metrics = self.run.metrics
        return [
            f"{self.rate_rps:,.0f}/s",
            metrics.offered_rps,
            metrics.chunks_per_s,
            metrics.send_lag.p99_ms,
            self.run.client.loop_delay.p99_ms,
            self.run.client.cpu_share,
            metrics.ttft.p50_ms,
            metrics.ttft.p99_ms,
            self.server_late_ms_p99,
            metrics.num_requests - metrics.num_finished,
            "valid" if self.run.validity.valid else "INVALID",
        ]


def capacity_figures(server_core: int, client_core: int, folder: Path, *, seconds: float) -> dict[str, float]:
    """`seconds` of the first rate; the others have a quarter of that."""
    first = _step(RATE_RPS, seconds, server_core, client_core, folder)
    steps = [first]
    for factor in FACTORS:
        if not steps[-1].run.validity.valid:
            break
        steps.append(_step(factor * RATE_RPS, seconds / 4, server_core, client_core, folder))
    print_table(
        f"capacity: one client process on one core, the server on another; {PROMPT_TOKENS} prompt and {OUTPUT_TOKENS} "
        f"output tokens, TTFT {TTFT_MS:g} ms, a chunk every {ITL_MS:g} ms",
        [
            "asked", "offered/s", "chunks/s", "send lag p99 ms", "loop delay p99 ms", "client CPU", "TTFT p50 ms",
            "TTFT p99 ms", "server late p99 ms", "not finished", "verdict",
        ],
        [step.row() for step in steps],
    )  # fmt: skip
    for step in steps:
        for reason in step.run.validity.reasons:
            print(f"  {step.rate_rps:,.0f}/s: {reason}")
    metrics = first.run.metrics
    figures = {
        "offered_requests_per_s": metrics.offered_rps,
        "received_chunks_per_s": metrics.chunks_per_s,
        "send_lag_ms_p99": metrics.send_lag.p99_ms,
        "capacity_run_valid": float(first.run.validity.valid),
    }
    valid = [step.rate_rps for step in steps if step.run.validity.valid]
    if steps[-1].run.validity.valid:
        print(f"  still valid at {steps[-1].rate_rps:,.0f} requests/s, the highest rate that was tried")
    elif valid:
        figures["invalid_beyond_requests_per_s"] = max(valid)
    return figures


def _step(rate_rps: float, seconds: float, server_core: int, client_core: int, folder: Path) -> Step:
    """On a fresh server, so that no step inherits another's connections and waiting requests."""
    arguments = [
        "--arrivals", f"poisson:{rate_rps:g}", "--duration", f"{seconds + WARMUP_S:g}s", "--warmup", f"{WARMUP_S:g}s",
        "--prompts", f"fixed:{PROMPT_TOKENS}", "--outputs", f"fixed:{OUTPUT_TOKENS}", "--timeout", "30s",
    ]  # fmt: skip
    script = ("--core", str(server_core), "--ttft-ms", str(TTFT_MS), "--itl-ms", str(ITL_MS))
    with serving_process(*script, "--max-log-entries", "20000") as base_url:
        # Prompts of all requests are made before the first is sent.
        run = run_tandem(base_url, arguments, folder / f"rate-{rate_rps:g}", client_core, START_LIMIT_S + 10 * seconds)
        return Step(rate_rps=rate_rps, run=run, server_late_ms_p99=_server_late_ms_p99(base_url))


def _server_late_ms_p99(base_url: str) -> str:
    """Over the last requests of the log: when chunks were sent, against when they were due."""
    with urllib.request.urlopen(f"{base_url}/script/log", timeout=60) as answer:
        log: dict[str, Any] = json.load(answer)
    late_s = [
        chunk_s - (entry["start_s"] + (TTFT_MS + index * ITL_MS) / 1e3)
        for entry in log["requests"]
        for index, chunk_s in enumerate(entry["chunk_s"])
    ]
    return quantile_ms(late_s, 0.99) if late_s else "-"
