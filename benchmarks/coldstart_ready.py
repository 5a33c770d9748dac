"""How soon weights that lie in memory answer, and how soon a worker does: parts of `benchmarks.coldstart`.

    python -m benchmarks.coldstart_ready LOADER_DOOR        (a child: loads one copy after the other, as a worker does)

`dram_ready` asks a real node agent's weight cache for copies that it holds, from a process that has imported all that
a worker needs. `cold_first_tokens` and `warm_first_tokens` have a real cluster start its worker for a request that
comes while none runs, without and with a process that stands by.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import msgspec

from benchmarks.cluster import running_state
from benchmarks.report import print_table, spread
from cluster.guard import Guard
from cluster.process_log import ProcessLog
from cluster.weights_service import WeightsService
from coldstart.handing import WeightsDoor, ask
from coldstart.residence import WeightsKey
from rpc import LiveClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

PHASES = ("map", "bind", "canary")
TIMEOUT_S = 120.0
NUM_BLOCKS = 64
PATIENCE_S = 120.0
#: Before a request, for what a start or an end left to do.
QUIET_S = 1.0

# --- a copy in memory: from the question to a canary that passed ------------------------------------------


def dram_ready(folders: dict[str, Path], rounds: int, scratch: Path) -> dict[str, list[dict[str, float]]]:
    """By name of the folder: milliseconds of each round by phase. The first question loads, and is not counted."""
    return asyncio.run(_dram_ready(folders, rounds, scratch))


async def _dram_ready(folders: dict[str, Path], rounds: int, scratch: Path) -> dict[str, list[dict[str, float]]]:
    budget_bytes = 2 * sum(path.stat().st_size for folder in folders.values() for path in folder.iterdir())
    log = ProcessLog(scratch / "weights.log", print)
    weights = WeightsService(budget_bytes, None, os.environ, os.getpid(), LiveClock(), log)
    found: dict[str, list[dict[str, float]]] = {}
    with contextlib.closing(Guard()) as guard:
        weights.start(guard)
        try:
            async with _child(weights.door) as child:
                for name, folder in folders.items():
                    answers = [await _ask(child, folder) for _ in range(rounds + 1)]
                    found[name] = answers[1:]
        finally:
            await weights.stop()
    return found


@contextlib.asynccontextmanager
async def _child(door: WeightsDoor) -> AsyncGenerator[asyncio.subprocess.Process]:
    """The door's secret goes by the pipe: a command line could be read."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.coldstart_ready", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    try:
        process.stdin.write(f"{json.dumps([door.socket_name, door.secret])}\n".encode())
        yield process
    finally:
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), TIMEOUT_S)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _ask(child: asyncio.subprocess.Process, folder: Path) -> dict[str, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{folder}\n".encode())
    line = await asyncio.wait_for(child.stdout.readline(), TIMEOUT_S)
    answer: dict[str, float] = json.loads(line)
    return answer


def print_ready(sizes_bytes: dict[str, int], found: dict[str, list[dict[str, float]]]) -> None:
    rows: list[tuple[object, ...]] = []
    for name, answers in found.items():
        phases = [spread([each[phase] for each in answers]) for phase in (*PHASES, "total")]
        rows.append((name, f"{sizes_bytes[name] / 1e6:.0f}", *phases))
    print_table("weights that lie in memory, ms until they answered", ("", "MB", *PHASES, "in all"), rows)


def _serve_child() -> None:
    """Warm as a process that stands by is; then one copy for each line."""
    import torch

    from coldstart.format import decode_index
    from coldstart.loaded import LoadedWeights, check_fits
    from engine.canary import check_canary
    from engine.ops import select_ops
    from engine.runner import EngineOptions, load_runner

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    ops = select_ops("cpu", log=lambda _: None)
    socket_name, secret = json.loads(sys.stdin.readline())
    door = WeightsDoor(socket_name=socket_name, secret=secret)
    for line in sys.stdin:
        folder = Path(line.strip())
        times_s = [time.perf_counter()]
        handed = ask(door, WeightsKey(folder=str(folder), dtype="auto"), timeout_s=TIMEOUT_S)
        times_s.append(time.perf_counter())
        index = decode_index(handed.index, where=str(folder))
        check_fits(folder, index)
        weights = LoadedWeights(handed.weights, index)
        assert weights.canary is not None, "a conversion measures one"
        # The same start, cut in two: without its canary, and then this alone.
        weights.index = msgspec.structs.replace(index, canary=None)
        runner = load_runner(folder, EngineOptions(num_blocks=NUM_BLOCKS), ops, weights=weights)
        times_s.append(time.perf_counter())
        assert index.canary is not None
        with torch.inference_mode():
            check_canary(runner, index.canary)
        times_s.append(time.perf_counter())
        spans = [1e3 * (end - start) for start, end in itertools.pairwise(times_s)]
        answer = dict(zip(PHASES, spans, strict=True)) | {"total": sum(spans)}
        del runner, weights
        handed.close()
        print(json.dumps(answer), flush=True)


# --- a worker: from a request that finds none to its first token --------------------------------------------


def sleeping(standby: int) -> dict[str, Any]:
    """A cluster with one model of one worker, which sleeps after a second without requests."""
    pool = {
        "name": "all",
        "role": "mixed",
        "kv_memory": "128MiB",
        "workers": {"min": 0, "max": 1},
        "scale": {"to_zero_after_s": 1, "cooldown_s": 1, "window_s": 2},
    }
    return {
        "models": [{"name": "demo", "model": "demo", "pools": [pool]}],
        "store": {"dram": None},
        "weights": {"standby": standby},
        "coordinator": {"autoscale": {"interval_s": 0.5}},
        "gateway": {"port": 0},
    }


def cold_first_tokens(rounds: int) -> list[dict[str, float]]:
    """Of each round: a cluster that has nothing yet, neither a process nor weights in memory. Milliseconds: `ttft` as
    the client sees it, and the gateway's own phases."""
    return [asyncio.run(_first_tokens(0, 1))[0] for _ in range(rounds)]


def warm_first_tokens(rounds: int) -> list[dict[str, float]]:
    """Of one cluster in which a process stands by. At the first one the weights are read; then they lie in memory."""
    return asyncio.run(_first_tokens(1, rounds + 1))


async def _first_tokens(standby: int, rounds: int) -> list[dict[str, float]]:
    found: list[dict[str, float]] = []
    async with (
        running_state(sleeping(standby)) as state,
        httpx.AsyncClient(base_url=state.base_url, timeout=PATIENCE_S) as client,
    ):
        for number in range(rounds):
            await _until_asleep(client)
            if standby:
                await asyncio.to_thread(_wait_until_warm, Path(state.log_dir) / "standby.log")
            await asyncio.sleep(QUIET_S)
            found.append(await _stream_one(client, number))
    return found


def _wait_until_warm(log: Path) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not (log.exists() and "are forked of process" in log.read_text()):
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no process stands by after {PATIENCE_S:.0f} s")
        time.sleep(0.1)


async def _stream_one(client: httpx.AsyncClient, number: int) -> dict[str, float]:
    body = {
        "model": "demo",
        "prompt": f"Once upon a time there were {number} bears",
        "max_tokens": 4,
        "temperature": 0,
        "stream": True,
        "include_timeline": True,
    }
    start_s = time.perf_counter()
    ttft_ms: float | None = None
    timeline: dict[str, float] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if ttft_ms is None and chunk.get("choices") and chunk["choices"][0]["text"]:
                ttft_ms = 1e3 * (time.perf_counter() - start_s)
            timeline = chunk.get("timeline") or timeline
    assert ttft_ms is not None, "an answer without a token"
    return {"ttft": ttft_ms, **{phase: timeline.get(f"{phase}_ms", 0.0) for phase in ("waking", "prefill")}}


async def _until_asleep(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            if not (await client.get("/health")).is_success:
                return
            await asyncio.sleep(0.2)


def import_torch_ms(rounds: int) -> list[float]:
    """A bare interpreter that imports torch, from its start until it is gone."""
    found: list[float] = []
    for _ in range(rounds):
        start_s = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        found.append(1e3 * (time.perf_counter() - start_s))
    return found


def print_first_tokens(ways: Mapping[str, Sequence[dict[str, float]]], limit_ms: float) -> None:
    rows: list[tuple[object, ...]] = [
        (name, *(spread([each[phase] for each in answers]) for phase in ("ttft", "waking", "prefill")))
        for name, answers in ways.items()
    ]
    rows.append(("import torch, and the weights at the disk's speed", limit_ms, "", ""))
    title = "a request that finds no worker, ms to its first token (demo model)"
    print_table(title, ("", "first token", "of it waking", "prefill"), rows)


if __name__ == "__main__":
    _serve_child()
