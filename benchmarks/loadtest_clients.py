"""Load generators as subprocesses, each told the same workload in its own words, and their figures in ours.

Definitions, as the three have them. TTFT: from sending (ours: from when it was due) to the first chunk with a token.
TPOT: (last chunk - first chunk) / (tokens - 1) of a request; aiperf calls it inter-token latency. vLLM's last chunk is
the one with the finish_reason, which most servers send with the last token. Throughput: output tokens over the time
from the first request to the last answer; the clocks of the other two start one gap before the first request, which is
taken off here.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loadtest.report.document import read_report
from loadtest.run import INVALID

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

    from loadtest.prompts.tokens import Vocabulary
    from loadtest.report.document import ServerRun

#: Beyond the time that the requests take: other clients need half a minute to start on a small machine.
START_LIMIT_S = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A workload that every client can be told: equal lengths, equal gaps."""

    rate_rps: float
    num_requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def seconds(self) -> float:
        return self.num_requests / self.rate_rps


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    name: str
    base_url: str
    model: str
    #: A folder with tokenizer.json and tokenizer_config.json.
    tokenizer: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a client says of one run: medians, and throughput."""

    num_finished: int
    ttft_ms: float
    tpot_ms: float
    output_tokens_per_s: float


class ClientError(RuntimeError):
    """A load generator failed, or finished other than all requests: then its figures are of something else."""


def write_prompts(vocabulary: Vocabulary, shape: Shape, path: Path, *, seed: int) -> None:
    """JSON lines that aiperf and vLLM read: different prompts of exactly so many tokens. `seed` makes them new ones, so
    that no run finds another's in the server's cache.
    """
    rng = random.Random(seed)
    with path.open("w") as sink:
        for _ in range(shape.num_requests):
            first, *rest = rng.choice(vocabulary.openers), *rng.choices(vocabulary.words, k=shape.prompt_tokens - 1)
            text = " ".join([first, *rest])
            sink.write(json.dumps({"text": text, "prompt": text, "output_tokens": shape.output_tokens}) + "\n")


def run_tandem(base_url: str, arguments: Sequence[str], folder: Path, core: int, limit_s: float) -> ServerRun:
    """Our own client's report of one server, valid or not. Raises ClientError."""
    command = [sys.executable, "-m", "loadtest", base_url, *arguments]
    _run([*command, "--output", str(folder), "--force", "--no-html"], core, limit_s, also_good=(INVALID,))
    return read_report(folder / "report.json").runs[0]


def tandem(server: Server, shape: Shape, folder: Path, core: int, seed: int) -> Seen:
    arguments = [
        "--tokenizer", str(server.tokenizer), "--prompts-as", "text", "--seed", str(seed),
        "--arrivals", f"constant:{shape.rate_rps}", "--requests", str(shape.num_requests),
        "--prompts", f"fixed:{shape.prompt_tokens}", "--outputs", f"fixed:{shape.output_tokens}",
    ]  # fmt: skip
    run = run_tandem(server.base_url, arguments, folder, core, shape.seconds + START_LIMIT_S)
    if not run.validity.valid:
        print(f"  tandem on {server.name}: INVALID: {'; '.join(run.validity.reasons)}")
    metrics = run.metrics
    return Seen(
        num_finished=metrics.num_finished,
        ttft_ms=metrics.ttft.p50_ms,
        tpot_ms=metrics.tpot.p50_ms,
        output_tokens_per_s=metrics.output_tokens_per_s,
    )


def aiperf(program: Path, server: Server, shape: Shape, prompts: Path, folder: Path, core: int) -> Seen:
    # A tokenizer's path is taken for the name of a repository where HF_HUB_OFFLINE is set; without it, it is opened.
    environ = {
        name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    }
    extra = {
        "max_tokens": shape.output_tokens,
        "min_tokens": shape.output_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    command = [
        str(program), "profile", "--model", server.model, "--url", server.base_url,
        "--endpoint-type", "completions", "--streaming", "--tokenizer", str(server.tokenizer),
        "--input-file", str(prompts), "--custom-dataset-type", "single_turn",
        "--dataset-sampling-strategy", "sequential", "--extra-inputs", json.dumps(extra),
        "--request-rate", str(shape.rate_rps), "--arrival-pattern", "constant",
        "--request-count", str(shape.num_requests), "--use-server-token-count",
        "--output-artifact-dir", str(folder), "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics",
    ]  # fmt: skip
    _run(command, core, shape.seconds + START_LIMIT_S, environ | {"AIPERF_TELEMETRY": "0"})
    figures: dict[str, Any] = json.loads((folder / "profile_export_aiperf.json").read_text())
    return Seen(
        num_finished=int(figures["request_count"]["avg"]),
        ttft_ms=figures["time_to_first_token"]["p50"],
        tpot_ms=figures["inter_token_latency"]["p50"],
        output_tokens_per_s=_from_first_request(figures["output_token_throughput"]["avg"], shape),
    )


def vllm_bench(program: Path, server: Server, shape: Shape, prompts: Path, folder: Path, core: int) -> Seen:
    command = [
        str(program), "bench", "serve", "--backend", "openai", "--base-url", server.base_url,
        "--endpoint", "/v1/completions", "--model", server.model, "--tokenizer", str(server.tokenizer),
        "--dataset-name", "custom", "--dataset-path", str(prompts), "--disable-shuffle", "--skip-chat-template",
        "--custom-output-len", str(shape.output_tokens), "--num-prompts", str(shape.num_requests), "--no-oversample",
        # Gamma arrivals of so small a variation are equal gaps.
        "--request-rate", str(shape.rate_rps), "--burstiness", "1e6", "--ignore-eos", "--temperature", "0",
        "--ready-check-timeout-sec", "0", "--metric-percentiles", "50", "--percentile-metrics", "ttft,tpot,itl,e2el",
        "--disable-tqdm", "--save-result", "--result-dir", str(folder), "--result-filename", "result.json",
    ]  # fmt: skip
    _run(command, core, shape.seconds + START_LIMIT_S, {**os.environ, "HF_HUB_OFFLINE": "1"})
    figures: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return Seen(
        num_finished=figures["completed"],
        ttft_ms=figures["median_ttft_ms"],
        tpot_ms=figures["median_tpot_ms"],
        output_tokens_per_s=_from_first_request(figures["output_throughput"], shape),
    )


def _from_first_request(output_tokens_per_s: float, shape: Shape) -> float:
    """The throughput of a clock that started with the first request, from that of one that started a gap before."""
    tokens = shape.num_requests * shape.output_tokens
    return tokens / (tokens / output_tokens_per_s - 1 / shape.rate_rps)


@contextlib.contextmanager
def pinned(core: int) -> Generator[None]:
    """Processes that start meanwhile run on this core alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _run(
    command: Sequence[str],
    core: int,
    limit_s: float,
    environ: dict[str, str] | None = None,
    also_good: tuple[int, ...] = (),
) -> None:
    with pinned(core):
        try:
            done = subprocess.run(
                command,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ClientError(f"{command[0]} did not end within {limit_s:.0f} s: {str(error.stdout)[-2000:]}") from None
    if done.returncode not in (0, *also_good):
        raise ClientError(f"{' '.join(command[:4])} ended with {done.returncode}:\n{done.stdout[-3000:]}")
