"""A real cluster under random faults: every token checked, every block counted, every request answered.

    python -m benchmarks.chaos [--requests N] [--seed N] [--quick] [--cluster split|mixed]
                               [--transport auto|shm|ucx|collective] [--checksum] [--allow-slow]

Workers are killed, frozen (some woken, some left to the node agent), all of a role killed at once; clients leave at
random moments; the network goes away for up to two seconds (where this process may have a network namespace of its
own). Meanwhile clients ask the same questions again and again, greedy and sampled, streaming and not. The right
answers are known before, from the same cluster at peace; the reference implementation has checked every token of them.

What happens is drawn from the seed; what comes of it is not. The run fails when an answer is wrong, a request stays
without an answer or an error within its bound, a block leaks, a process is left over, a log tells of a bug, or a
kind of fault met nothing in flight. Errors that clients were told are counted: none is the goal, one in twenty fails.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import yaml

from benchmarks.chaos_books import close_books, complaints
from benchmarks.chaos_client import End, Question, ask, attempt
from benchmarks.chaos_faults import ALONE, Kind, Striker, can_drop_links, schedule
from benchmarks.chaos_load import BOUND_MARGIN_S, Load, Plan, Result, questions
from benchmarks.chaos_reference import Auditor, Reference
from benchmarks.chaos_report import report
from tests.support.cluster import ClusterProcess
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

#: After its last fault a cluster gets this long to answer something again.
RECOVERY_BOUND_S = 60.0
STOP_BOUND_S = 30.0
#: After a fault, before the next one may come.
PAUSE_S = (0.5, 2.0)


async def run_chaos(cluster: ClusterProcess, plan: Plan, reference: asyncio.Task[Reference], log_dir: Path) -> Result:
    rng = random.Random(plan.seed)
    asked = questions(rng, plan)
    # A connection for each request: one that is kept may be closed by the server just as the next request is sent,
    # and nobody could tell that from a request that was dropped.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    base_url = cluster.base_url
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=None) as client:
        auditor = Auditor(await reference)
        peace_s = time.monotonic()
        problems = await learn(client, auditor, asked, plan)
        chaos_s = time.monotonic()
        descriptors = cluster.num_descriptors()
        load = Load(client=client, plan=plan, questions=asked, auditor=auditor, rng=rng)
        striker = Striker(cluster, load.num_writing)
        faults = schedule(rng, plan.roles, plan.num_faults, links=can_drop_links())
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(load.run())
                for fault in faults:
                    await load.reached(fault.at)
                    await striker.strike(fault)
                    await asyncio.sleep(rng.uniform(*PAUSE_S))
                load.enough.set()
        finally:
            striker.wake_all()
        ended_s = time.monotonic()
        problems += await _recovers(client, asked[0])
    books = await close_books(cluster, descriptors)
    problems += [*striker.tally.problems, *books.problems, *await asyncio.to_thread(_stop, cluster)]
    problems += complaints(log_dir, cluster.output)
    kinds = {fault.kind for fault in faults}
    problems += [
        f"never in flight: {kind.value}" for kind in Kind if kind in kinds and not striker.tally.in_flight[kind]
    ]
    return Result(
        load=load,
        tally=striker.tally,
        problems=problems,
        leaked_blocks=books.leaked_blocks,
        idle_s=books.idle_s,
        peace_s=chaos_s - peace_s,
        chaos_s=ended_s - chaos_s,
    )


async def learn(client: httpx.AsyncClient, auditor: Auditor, asked: Sequence[Question], plan: Plan) -> list[str]:
    """Asks every question once, a few at a time, of a cluster at peace; says what the reference disagrees with."""
    turns = asyncio.Semaphore(4)

    async def one(question: Question) -> list[str]:
        async with turns:
            record = await attempt(client, question, stream=False, bound_s=plan.request_timeout_s + BOUND_MARGIN_S)
        return await asyncio.to_thread(auditor.learn, question, record)

    return [fault for found in await asyncio.gather(*map(one, asked)) for fault in found]


async def _recovers(client: httpx.AsyncClient, question: Question) -> list[str]:
    """After the last fault, an answer comes."""
    outcome = await ask(client, question, stream=True, bound_s=RECOVERY_BOUND_S, patience_s=RECOVERY_BOUND_S)
    return [] if outcome.last.end is End.WHOLE else [f"no answer after the faults: {outcome.last}"]


def _stop(cluster: ClusterProcess) -> list[str]:
    """Ends the cluster as Ctrl-C does; says what is left of it."""
    processes = cluster.tree()
    status = cluster.stop(STOP_BOUND_S)
    _, alive = psutil.wait_procs(processes, timeout=5)
    return [*([f"it ended with status {status}"] if status else []), *(f"left over: {one}" for one in alive)]


# --- the command --------------------------------------------------------------------------------------


def isolate() -> None:
    """Goes on in a network namespace of its own, where that is permitted: the loopback there is ours to cut."""
    if os.environ.get(ALONE) == "1":
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return
    if subprocess.run(["unshare", "-rn", "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode:
        return
    os.environ[ALONE] = "1"
    os.execvp("unshare", ["unshare", "-rn", "--", sys.executable, "-m", "benchmarks.chaos", *sys.argv[1:]])


@contextmanager
def started(plan: Plan, keep_logs: Path | None) -> Generator[tuple[ClusterProcess, Path]]:
    """The cluster, not ready yet, and the folder of its logs."""
    with tempfile.TemporaryDirectory(prefix="tandem-chaos-") as scratch:
        log_dir = keep_logs or Path(scratch) / "logs"
        config = Path(scratch) / "cluster.yaml"
        config.write_text(yaml.safe_dump(plan.config(log_dir)))
        cluster = ClusterProcess.start(["--config", str(config)], {})
        try:
            yield cluster, log_dir
        finally:
            cluster.close()


def main() -> int:
    arguments = parse()
    isolate()
    plan = Plan(
        seed=arguments.seed,
        num_requests=arguments.requests or (130 if arguments.quick else 2000),
        num_faults=arguments.faults or (9 if arguments.quick else 60),
        num_questions=24 if arguments.quick else 96,
        concurrency=12 if arguments.quick else 24,
        longest_prompt=400,
        longest_answer=160 if arguments.quick else 320,
        request_timeout_s=45.0,
        cluster=arguments.cluster,
        transport=arguments.transport,
        checksum=arguments.checksum,
        allow_slow=arguments.allow_slow,
    )

    async def live(cluster: ClusterProcess, log_dir: Path) -> Result:
        reference = asyncio.create_task(asyncio.to_thread(Reference, ROOT / "engine" / "demo"))
        await asyncio.to_thread(cluster.wait_ready)
        return await run_chaos(cluster, plan, reference, log_dir)

    with started(plan, arguments.logs) as (cluster, log_dir):
        result = asyncio.run(live(cluster, log_dir))
    return 0 if report(result, plan) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, help="how many (default 2000)")
    parser.add_argument("--faults", type=int, help="how many (default 60)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="about a minute")
    parser.add_argument(
        "--cluster", choices=["split", "mixed"], default="split", help="2 prefill + 2 decode, or 2 mixed"
    )
    parser.add_argument("--transport", choices=["auto", "shm", "ucx", "collective"], default="auto")
    parser.add_argument("--checksum", action="store_true", help="checksums on every block")
    parser.add_argument("--allow-slow", action="store_true", help="serve on links that measure slow on a busy machine")
    parser.add_argument("--logs", type=Path, help="keep the cluster's logs in this folder")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
