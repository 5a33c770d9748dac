"""After the faults: is everything as it was? Ledgers, leases, processes, descriptors, logs."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cluster.supervision import State
from cluster.template_process import TEMPLATE_FLAG
from contracts.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

    from contracts.messages import AuditReply
    from tests.support.cluster import ClusterProcess

#: How long a cluster that nobody asks anything may take until its books are clean.
IDLE_BOUND_S = 30.0
#: Descriptors that may have been added without being a leak: connections of the last clients, one per worker life.
SPARE_DESCRIPTORS = 24
LOOK_INTERVAL_S = 0.25

#: What no log may hold. A worker that is killed says nothing, so all of these are bugs.
COMPLAINTS = re.compile(
    r"Traceback \(most recent call last\)|was never retrieved|InvariantBroken|was never awaited|"
    r"Task was destroyed but it is pending|ResourceWarning|core dumped|Segmentation fault|a bug"
)
#: Lines of a log shown with a complaint.
CONTEXT_LINES = 14


@dataclass(slots=True, kw_only=True)
class Books:
    idle_s: float | None = None
    leaked_blocks: int = 0
    problems: list[str] = field(default_factory=list[str])


async def close_books(cluster: ClusterProcess, descriptors_before: int) -> Books:
    """Waits for the cluster to be idle within the bound, and says what still is not as it should be."""
    books = Books()
    started_s = time.monotonic()
    while True:
        wrong, leaked = await _look(cluster)
        if not wrong:
            books.idle_s = time.monotonic() - started_s
            break
        if time.monotonic() - started_s > IDLE_BOUND_S:
            books.leaked_blocks = leaked
            books.problems += [f"after {IDLE_BOUND_S:g} s idle: {line}" for line in wrong]
            break
        await asyncio.sleep(LOOK_INTERVAL_S)
    workers = cluster.state.workers
    processes = worker_processes(cluster)
    if len(processes) != len(workers):
        books.problems.append(f"{len(processes)} worker processes for {len(workers)} workers: {processes}")
    descriptors = cluster.num_descriptors()
    if descriptors > descriptors_before + SPARE_DESCRIPTORS:
        books.problems.append(f"the gateway's process has {descriptors} descriptors open, {descriptors_before} before")
    return books


def worker_processes(cluster: ClusterProcess) -> list[psutil.Process]:
    mains = {"cluster.worker_main", "cluster.store_main"}
    found = [(process, set(process.cmdline())) for process in cluster.tree()]
    return [process for process, words in found if mains & words and TEMPLATE_FLAG not in words]


async def _look(cluster: ClusterProcess) -> tuple[list[str], int]:
    """What is not clean now, and how many blocks are neither free nor cached."""
    state = cluster.state
    wrong = [f"{one.worker_id} is {one.state}" for one in state.workers if one.state != State.READY.value]
    try:
        audits = await cluster.audit()
    except TandemError as error:
        return [*wrong, f"an audit failed: {error.code}: {error.message}"], 0
    leaked = sum(audit.total_blocks - audit.load.free_blocks - audit.load.cached_blocks for audit in audits.values())
    return [*wrong, *(line for name, audit in audits.items() for line in audit_faults(name, audit))], leaked


def audit_faults(worker_id: str, audit: AuditReply) -> Iterator[str]:
    """What an idle worker must not have."""
    load = audit.load
    used = audit.total_blocks - load.free_blocks - load.cached_blocks
    if used:
        classes = {
            name: count
            for name in ("owned", "offered", "reserved", "quarantined")
            if (count := getattr(load, f"{name}_blocks"))
        }
        yield f"{worker_id}: {used} of {audit.total_blocks} blocks are in use: {classes}"
    for name in ("open_requests", "holder_leases", "reader_leases"):
        if count := getattr(audit, name):
            yield f"{worker_id}: {count} {name.replace('_', ' ')}"
    for problem in audit.problems:
        yield f"{worker_id}: {problem}"


def complaints(log_dir: Path, output: str) -> list[str]:
    """Every passage of the logs (and of what the cluster printed) that tells of a bug."""
    texts = {path.name: path.read_text(errors="replace") for path in sorted(log_dir.glob("*.log*"))}
    return [
        f"{name}:{number + 1}:\n" + "\n".join(lines[max(0, number - 2) : number + CONTEXT_LINES])
        for name, text in {**texts, "output": output}.items()
        for lines in [text.splitlines()]
        for number, line in enumerate(lines)
        if COMPLAINTS.search(line)
    ]
