"""A burst to a model that sleeps: the time to first token by phase, with and without a process that stands by.

    python -m benchmarks.burst              20 requests, 3 bursts each way
    python -m benchmarks.burst --quick      1 burst each way, within a minute

Two models are served by one process: the burst goes to the one that has no worker, while single requests go to the
other, which is awake. `waking` is the part of a request's time in which a worker was being started for it; it is told
by the gateway's timeline, as the other phases.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

import httpx

from benchmarks.cluster import running
from benchmarks.report import finish, print_table, quantile_ms, spread

NUM_REQUESTS = 20
MAX_TOKENS = 8
PATIENCE_S = 120.0
WAYS = {"no standby": 0, "standby": 1}
PHASES = ("waking", "gateway", "queue", "prefill", "ttft")


def config(standby: int) -> dict[str, Any]:
    pool = {"name": "all", "role": "mixed", "kv_memory": "128MiB"}
    sleeps = {"to_zero_after_s": 1, "cooldown_s": 1, "window_s": 2}
    night = {**pool, "workers": {"min": 0, "max": 1}, "scale": sleeps}
    return {
        "models": [
            {"name": "day", "model": "demo", "pools": [pool]},
            {"name": "night", "model": "demo", "pools": [night]},
        ],
        "store": {"dram": None},
        "weights": {"standby": standby, "fork": standby > 0},
        "coordinator": {"autoscale": {"interval_s": 0.5}},
        "gateway": {"port": 0},
    }


async def ask(client: httpx.AsyncClient, model: str, number: int) -> dict[str, float]:
    """Milliseconds by phase."""
    body = {
        "model": model,
        "prompt": f"Story number {number}: once upon a time there was",
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
        "include_timeline": True,
    }
    response = await client.post("/v1/completions", json=body)
    response.raise_for_status()
    timeline = response.json()["timeline"]
    return {phase: timeline[f"{phase}_ms"] for phase in PHASES}


async def until_asleep(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            models = (await client.get("/v1/models")).json()["data"]
            if all(model["state"] == "asleep" for model in models if model["id"] == "night"):
                return
            await asyncio.sleep(0.2)


async def other_model(client: httpx.AsyncClient, stop: asyncio.Event) -> list[float]:
    """Times to first token of the model that is awake, one request after the other."""
    found: list[float] = []
    while not stop.is_set():
        found.append((await ask(client, "day", len(found)))["ttft"])
        await asyncio.sleep(0.1)
    return found


async def measure(standby: int, num_bursts: int) -> tuple[list[list[dict[str, float]]], list[float]]:
    """The requests of each burst; and times to first token of the other model meanwhile."""
    bursts: list[list[dict[str, float]]] = []
    beside: list[float] = []
    limits = httpx.Limits(max_connections=NUM_REQUESTS + 4)
    async with (
        running(config(standby)) as base_url,
        httpx.AsyncClient(base_url=base_url, timeout=PATIENCE_S, limits=limits) as client,
    ):
        # Long enough for a process to be warm where one stands by.
        await asyncio.sleep(5.0)
        for number in range(num_bursts):
            await until_asleep(client)
            if number:
                await asyncio.sleep(5.0)
            stop = asyncio.Event()
            other = asyncio.create_task(other_model(client, stop))
            bursts.append(await asyncio.gather(*(ask(client, "night", index) for index in range(NUM_REQUESTS))))
            stop.set()
            beside += await other
    return bursts, beside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one burst each way")
    num_bursts = 1 if parser.parse_args().quick else 3
    figures: dict[str, float] = {}
    rows: list[list[object]] = []
    for way, standby in WAYS.items():
        bursts, beside = asyncio.run(measure(standby, num_bursts))
        requests = [request for burst in bursts for request in burst]
        for phase in PHASES:
            values = [request[phase] for request in requests]
            values_s = [value / 1e3 for value in values]
            rows.append([f"{way}: {phase}", spread(values), quantile_ms(values_s, 0.95)])
            figures[f"{way.replace(' ', '_')}_{phase}_p50_ms"] = float(quantile_ms(values_s, 0.5, digits=3))
        answered_s = [ttft / 1e3 for ttft in beside]
        rows.append([f"{way}: the other model", spread(beside), quantile_ms(answered_s, 0.95)])
        figures[f"{way.replace(' ', '_')}_other_p95_ms"] = float(quantile_ms(answered_s, 0.95, digits=3))
        figures[f"{way.replace(' ', '_')}_answered"] = float(len(requests))
    title = f"Time to first token of {NUM_REQUESTS} requests to a sleeping model, ms ({num_bursts} bursts each way)"
    print_table(title, ["phase", "median (least-most)", "p95"], rows)
    finish("burst", figures)


if __name__ == "__main__":
    main()
