"""Whether other load generators see the same server: same workload, taking turns, ratio of medians."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import subprocess
import urllib.error
import urllib.request
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.cluster import running
from benchmarks.handoff import cluster, mixed
from benchmarks.loadtest_clients import ClientError, Seen, Server, Shape, aiperf, tandem, vllm_bench, write_prompts
from benchmarks.report import print_table, spread
from loadtest.prompts.tokens import Vocabulary
from tests.support.scripted_server import serving_process

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Container, Generator
    from pathlib import Path

#: A server whose delays are known, at a load that no client notices.
SCRIPTED = Shape(rate_rps=20, num_requests=300, prompt_tokens=256, output_tokens=32)
SCRIPTED_DELAYS = ("--ttft-ms", "100", "--itl-ms", "10")
#: The 88 M shape on one core. Each answer ends before the next request comes: where they overlap by a hair, what one
#: client delays by a hair is another request's second.
CLUSTER = Shape(rate_rps=1.0, num_requests=20, prompt_tokens=128, output_tokens=24)
#: Three times slower on one core.
VLLM = Shape(rate_rps=0.4, num_requests=12, prompt_tokens=128, output_tokens=24)
VLLM_START_S = 300.0
#: Servers that the clients can be compared on.
SERVERS = ("scripted", "cluster", "vllm")
FIGURES = ("ttft", "tpot", "throughput")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peers:
    """Programs of other clients; None: not here."""

    aiperf: Path | None
    vllm: Path | None


@dataclass(slots=True)
class Rounds:
    """What each client saw of one server, round by round."""

    server: str
    seen: dict[str, list[Seen]]

    def rows(self) -> list[list[object]]:
        return [
            [
                client,
                sum(each.num_finished for each in rounds),
                spread([each.ttft_ms for each in rounds]),
                spread([each.tpot_ms for each in rounds]),
                spread([each.output_tokens_per_s for each in rounds]),
            ]
            for client, rounds in self.seen.items()
        ]

    def ratios(self) -> dict[str, float]:
        """`FIGURE_vs_CLIENT_on_SERVER` -> median of ours over median of theirs."""
        values = {
            client: dict(
                zip(
                    FIGURES,
                    (
                        median(each.ttft_ms for each in rounds),
                        median(each.tpot_ms for each in rounds),
                        median(each.output_tokens_per_s for each in rounds),
                    ),
                    strict=True,
                )
            )
            for client, rounds in self.seen.items()
        }
        return {
            f"{figure}_vs_{client}_on_{self.server}": values["tandem"][figure] / theirs[figure]
            for client, theirs in values.items()
            if client != "tandem"
            for figure in FIGURES
        }


async def agreement_figures(
    model: Path, peers: Peers, server_core: int, client_core: int, folder: Path, *, rounds: int, on: Container[str]
) -> dict[str, float]:
    """`model`: a checkpoint; its tokenizer makes the prompts. Empty where no other client is here."""
    if peers.aiperf is None and peers.vllm is None:
        print("agreement: no other client here (--aiperf PATH, --vllm PATH): left out")
        return {}
    vocabulary = Vocabulary.from_file(model)
    results: list[Rounds] = []

    async def measure(server: Server, shape: Shape) -> None:
        results.append(await _take_turns(server, shape, vocabulary, peers, client_core, folder, rounds))
        print_table(
            f"agreement on {server.name}: {rounds} rounds of {shape.num_requests} requests, {shape.rate_rps:g}/s, "
            f"{shape.prompt_tokens} + {shape.output_tokens} tokens; median (lowest-highest) of each client's medians",
            ["client", "finished", "TTFT ms", "TPOT ms", "output tokens/s"],
            results[-1].rows(),
        )

    if "scripted" in on:
        with serving_process(*SCRIPTED_DELAYS, "--core", str(server_core)) as base_url:
            await measure(Server(name="scripted", base_url=base_url, model="scripted", tokenizer=model), SCRIPTED)
    if "cluster" in on:
        async with running(cluster(model, [mixed(512, [server_core])])) as base_url:
            await measure(Server(name="cluster", base_url=base_url, model="bench", tokenizer=model), CLUSTER)
    if "vllm" in on and peers.vllm is not None:
        async with _vllm(peers.vllm, model, server_core, folder) as base_url:
            await measure(Server(name="vllm_server", base_url=base_url, model="bench", tokenizer=model), VLLM)
    ratios = {name: ratio for result in results for name, ratio in result.ratios().items()}
    print_table("ours over theirs", ["figure", "ratio"], [[name, ratio] for name, ratio in ratios.items()])
    return {**{f"{figure}_vs_other_client": _furthest(ratios, figure) for figure in FIGURES}, **ratios}


def _furthest(ratios: dict[str, float], figure: str) -> float:
    """Of all servers and clients, the ratio furthest from 1."""
    of_figure = [ratio for name, ratio in ratios.items() if name.startswith(f"{figure}_")]
    return max(of_figure, key=lambda ratio: abs(math.log(ratio)))


async def _take_turns(
    server: Server, shape: Shape, vocabulary: Vocabulary, peers: Peers, core: int, folder: Path, num_rounds: int
) -> Rounds:
    names = ["tandem", *(["aiperf"] if peers.aiperf else []), *(["vllm"] if peers.vllm else [])]
    rounds = Rounds(server.name, {name: [] for name in names})
    # The first requests of a server also pay for what is made once.
    warmup = Shape(rate_rps=1.0, num_requests=3, prompt_tokens=shape.prompt_tokens, output_tokens=shape.output_tokens)
    await asyncio.to_thread(tandem, server, warmup, folder / "warm-up", core, 0)
    for number in range(num_rounds):
        # There and back, so that a drift of the machine meets all alike.
        for client in names if number % 2 == 0 else reversed(names):
            place = folder / f"{server.name}-{number}-{client}"
            seed = 1 + number * len(names) + names.index(client)
            seen = await asyncio.to_thread(_measure, client, server, shape, vocabulary, peers, core, place, seed)
            if seen.num_finished != shape.num_requests:
                raise ClientError(f"{client} finished {seen.num_finished} of {shape.num_requests} on {server.name}")
            rounds.seen[client].append(seen)
    return rounds


def _measure(
    client: str, server: Server, shape: Shape, vocabulary: Vocabulary, peers: Peers, core: int, folder: Path, seed: int
) -> Seen:
    folder.mkdir(parents=True)
    if client == "tandem":
        return tandem(server, shape, folder, core, seed)
    prompts = folder / "prompts.jsonl"
    write_prompts(vocabulary, shape, prompts, seed=seed)
    if client == "aiperf":
        assert peers.aiperf is not None
        return aiperf(peers.aiperf, server, shape, prompts, folder, core)
    assert peers.vllm is not None
    return vllm_bench(peers.vllm, server, shape, prompts, folder, core)


@asynccontextmanager
async def _vllm(program: Path, model: Path, core: int, folder: Path) -> AsyncGenerator[str]:
    """`vllm serve` (CPU build) on one core. Raises RuntimeError with the end of its output when it does not come up."""
    port = _free_port()
    base_url = f"http://127.0.0.1:{port}"
    with _vllm_process(program, model, core, port, folder / "vllm.txt") as process:
        async with asyncio.timeout(VLLM_START_S):
            while not await asyncio.to_thread(_is_healthy, base_url):
                if process.poll() is not None:
                    raise RuntimeError(f"vllm ended:\n{(folder / 'vllm.txt').read_text()[-3000:]}")
                await asyncio.sleep(1.0)
        yield base_url


@contextmanager
def _vllm_process(program: Path, model: Path, core: int, port: int, output: Path) -> Generator[subprocess.Popen[bytes]]:
    command = [
        str(program), "serve", str(model), "--served-model-name", "bench", "--dtype", "bfloat16",
        "--max-model-len", "4096", "--port", str(port), "--host", "127.0.0.1", "--no-enable-prefix-caching",
    ]  # fmt: skip
    environ = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # Unbound, its threads spin on every core.
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
    }
    with output.open("wb") as sink:
        process = subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_healthy(base_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False
