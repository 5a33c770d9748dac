"""Light workers in a process of their own: each holds its part of the conversations of `benchmarks.dispatch_traffic`.

    TANDEM_CLUSTER_TOKEN=... python -m benchmarks.dispatch_workers --coordinator HOST:PORT --workers 64 --blocks 1000000

Each has a connection of its own. Prints one line once all are registered, and serves until it is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys

import numpy as np
import uvloop

from benchmarks.dispatch_traffic import Traffic, fit, worker_infos
from rpc import GrpcNetwork, LiveClock
from tests.support.light_worker import LightWorker

READY = "all registered"


async def serve(coordinator: str, num_workers: int, num_blocks: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    token = os.environ["TANDEM_CLUSTER_TOKEN"]
    workers = [
        LightWorker(
            info, GrpcNetwork(token=token), coordinator, LiveClock(), fit=fit(rng),
            log=lambda line: print(line, file=sys.stderr),
        )
        for info in worker_infos(num_workers)
    ]  # fmt: skip
    for number, hints in Traffic(num_blocks, seed).held_by(num_workers):
        raw = hints.astype("<u8").tobytes()
        workers[number].hold(raw[start : start + 8] for start in range(0, len(raw), 8))
    async with asyncio.TaskGroup() as tasks:
        for worker in workers:
            tasks.create_task(worker.run())
        for worker in workers:
            await worker.registered.wait()
        # Distinct blocks: what a directory that knows everything counts.
        print(READY, len({hint for worker in workers for hint in worker.held()}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--blocks", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    uvloop.run(serve(options.coordinator, options.workers, options.blocks, options.seed))


if __name__ == "__main__":
    main()
