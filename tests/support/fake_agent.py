"""A parent with a node agent and fake workers, to be killed: `python -m tests.support.fake_agent DIR BEHAVIOUR...`.
With `--template` before them the workers, which then behave alike, are forked.

Prints one JSON line with the workers' pids once all are ready.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from cluster.launch import TemplateLaunch, TransferOptions, WorkerLaunch
from cluster.node_agent import NodeAgent, WorkerPlan
from cluster.process_log import ProcessLog
from cluster.supervision import State, SupervisionLimits
from cluster.template import TemplatePlan
from contracts.ids import Incarnation, WorkerId
from rpc import LiveClock


def fake_plan(name: str, behaviour: str, runtime_dir: Path, *, parent_pid: int | None) -> WorkerPlan:
    launch = WorkerLaunch(
        worker_id=WorkerId(name),
        incarnation=Incarnation(0),
        role="mixed",
        coordinator_address="nowhere:1",
        cluster_token="secret-token",
        model_dir="nowhere",
        model_name="none",
        dtype="auto",
        device="cpu",
        max_model_len=None,
        block_tokens=16,
        kv_memory_bytes=1 << 20,
        num_blocks=None,
        threads=1,
        cores=(),
        max_batch_tokens=128,
        max_sequences=4,
        bind="127.0.0.1:0",
        transport="shm",
        transfer=TransferOptions(),
        runtime_dir=str(runtime_dir),
        parent_pid=parent_pid,
    )
    return WorkerPlan(
        launch=launch,
        command=(sys.executable, "-m", "tests.support.fake_worker"),
        environ={**os.environ, "FAKE_BEHAVIOUR": behaviour},
    )


async def main(folder: Path, behaviours: list[str], *, is_forking: bool) -> None:
    template = TemplatePlan(
        launch=TemplateLaunch(parent_pid=os.getpid(), device="cpu"),
        log=ProcessLog(folder / "standby.log", lambda line: print(line, file=sys.stderr, flush=True)),
        always=True,
    )
    agent = NodeAgent(
        [
            fake_plan(f"fake-{index}", behaviour, folder, parent_pid=os.getpid())
            for index, behaviour in enumerate(behaviours)
        ],
        limits=SupervisionLimits(),
        first_incarnation=Incarnation(1),
        log_dir=folder,
        clock=LiveClock(),
        say=lambda line: print(line, file=sys.stderr, flush=True),
        template=template if is_forking else None,
    )
    async with agent:
        while any(worker.state is not State.READY for worker in agent.workers()):
            await agent.changed.wait()
            agent.changed.clear()
        print(json.dumps([worker.pid for worker in agent.workers()]), flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--template"]
    asyncio.run(main(Path(arguments[0]), arguments[1:], is_forking="--template" in sys.argv))
