"""`tandem doctor`: can this machine serve, and are the books of a running cluster in order?

Each check is a line with a verdict; the exit status is 1 when one of them failed.
"""

from __future__ import annotations

import asyncio
import os
import platform
import shutil
import socket
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

import uvloop

from cluster.link_check import measure_transports
from cluster.local import allowed_cores
from cluster.model_source import resolve_model
from cluster.plan import transfer_options
from cluster.serve import say
from cluster.state_file import read_state
from cluster.transports import check_interface
from contracts.cells import cells_of
from contracts.config import format_size
from contracts.control_messages import OPERATIONS, OperationsRequest
from contracts.errors import ConfigError, TandemError
from contracts.messages import AUDIT, MEMBERS, Empty
from rpc import GrpcNetwork

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from contracts.config import ClusterConfig
    from contracts.control_messages import WorkerSlot
    from contracts.messages import AuditReply, Member
    from rpc import Network

#: Deadline of each question to a running cluster.
ASK_TIMEOUT_S = 5.0

Verdict = Literal["ok", "note", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    verdict: Verdict
    what: str
    detail: str


def check_machine(config: ClusterConfig) -> int:
    """Whether `tandem serve` with this configuration could start here."""
    findings = [
        _check_python(),
        _check_torch(),
        _check_compiler(),
        _check_cores(config),
        _check_shared_memory(),
        *_check_transports(config),
        _check_memory(config),
        *(_check_model(cell.config) for cell in cells_of(config)),
        _check_port(config),
        _check_folder("temporary folder", tempfile.gettempdir()),
    ]
    return _print(findings)


def audit_from_state(path: Path) -> int:
    state = read_state(path)
    addresses = [cell.coordinator_address for cell in state.cells] or [state.coordinator_address]
    return max(audit(address, state.cluster_token) for address in addresses)


def audit(coordinator_address: str, token: str) -> int:
    """Asks every member for its books."""
    return _print(uvloop.run(_audit(coordinator_address, token)))


async def _audit(coordinator_address: str, token: str) -> list[Finding]:
    network = GrpcNetwork(token=token)
    try:
        channel = network.channel(coordinator_address)
        members = (await channel.call(MEMBERS, Empty(), timeout_s=ASK_TIMEOUT_S)).members
        slots = (await channel.call(OPERATIONS, OperationsRequest(), timeout_s=ASK_TIMEOUT_S)).slots
        found = await asyncio.gather(*(_audit_member(network, member) for member in members))
    except TandemError as error:
        return [Finding("fail", f"coordinator {coordinator_address}", error.message)]
    finally:
        await network.close()
    workers = [member for member in members if member.info.role != "store"]
    verdict: Verdict = "ok" if workers else "note" if sleeps(slots) else "fail"
    links = [finding for member in members for finding in _links(member)]
    suspects = [member.info.worker_id for member in members if member.state == "suspect"]
    late = f", not heard of for a while: {', '.join(suspects)}" if suspects else ""
    num_stores = len(members) - len(workers)
    stores = f", {num_stores} store{'s' if num_stores > 1 else ''}" if num_stores else ""
    present = f"{len(workers)} workers{stores}{late}{'; they can be started' if verdict == 'note' else ''}"
    return [Finding(verdict, f"coordinator {coordinator_address}", present), *found, *links]


def sleeps(slots: Sequence[WorkerSlot]) -> bool:
    """Whether nobody is there because nobody is wanted: a model that is scaled to zero, or was stopped. Pure."""
    states = {slot.state for slot in slots if slot.role != "store"}
    return bool(states) and states <= {"absent", "stopped"}


def _links(member: Member) -> list[Finding]:
    """What this worker, or store, measured of each way to each that hands it KV."""
    found: list[Finding] = []
    links = () if member.transfers is None else member.transfers.links
    for link in links:
        what = f"{link.peer} -> {member.info.worker_id} {link.transport}"
        if link.bandwidth_bytes_per_s is None or link.latency_s is None:
            found.append(Finding("note", what, f"not usable: {link.note}"))
            continue
        figures = f"{link.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {link.latency_s * 1e3:.2f} ms a block"
        found.append(Finding("ok", what, f"{figures}{'; chosen' if link.chosen else ''}: {link.note}"))
    for peer in {link.peer for link in links} - {link.peer for link in links if link.chosen}:
        found.append(Finding("fail", f"{peer} -> {member.info.worker_id}", "no transport is fast enough"))
    return found


async def _audit_member(network: Network, member: Member) -> Finding:
    info = member.info
    what = f"{info.worker_id} ({info.role}, pid {info.pid})"
    try:
        reply = await network.channel(info.address).call(AUDIT, Empty(), timeout_s=ASK_TIMEOUT_S)
    except TandemError as error:
        return Finding("fail", what, error.message)
    return Finding("fail" if reply.problems else "ok", what, _books(reply))


def _books(reply: AuditReply) -> str:
    load = reply.load
    classes = ("free", "owned", "offered", "reserved", "cached", "quarantined")
    blocks = ", ".join(f"{getattr(load, f'{name}_blocks')} {name}" for name in classes)
    leases = f"{reply.holder_leases} leases held, {reply.reader_leases} read"
    problems = "".join(f"; {problem}" for problem in reply.problems)
    return f"{reply.open_requests} requests open, {leases}, {reply.total_blocks} blocks: {blocks}{problems}"


def _print(findings: Iterable[Finding]) -> int:
    findings = list(findings)
    width = max(len(finding.what) for finding in findings)
    for finding in findings:
        say(f"{finding.verdict:<4}  {finding.what:<{width}}  {finding.detail}")
    return int(any(finding.verdict == "fail" for finding in findings))


# --- this machine -----------------------------------------------------------------------------------


def _check_python() -> Finding:
    return Finding("ok", "python", f"{platform.python_version()} at {sys.executable}")


def _check_torch() -> Finding:
    """By its metadata: importing it takes seconds."""
    try:
        return Finding("ok", "torch", version("torch"))
    except PackageNotFoundError:
        return Finding("fail", "torch", "not installed")


def _check_compiler() -> Finding:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return Finding("note", "C++ compiler", "none found: the slower operators will be used")
    return Finding("ok", "C++ compiler", compiler)


def _check_cores(config: ClusterConfig) -> Finding:
    cores, workers = allowed_cores(), sum(pool.max_workers for cell in cells_of(config) for pool in cell.config.pools)
    detail = f"{len(cores)} for {workers} workers"
    if workers > len(cores):
        return Finding("note", "cores", f"{detail}: they share, each with one thread")
    return Finding("ok", "cores", detail)


def _check_shared_memory() -> Finding:
    try:
        os.close(os.memfd_create("tandem-doctor"))
    except (AttributeError, OSError) as error:
        return Finding("fail", "shared memory", f"memfd_create does not work here: {error}")
    return Finding("ok", "shared memory", "memfd_create works")


def _check_transports(config: ClusterConfig) -> list[Finding]:
    """Measures each way of moving KV on this machine; the configured one must do what its class does."""
    findings: list[Finding] = []
    try:
        check_interface(config.transfer.interface)
    except ConfigError as error:
        return [Finding("fail", "transports", error.message)]
    for measured, short in uvloop.run(measure_transports(transfer_options(config))):
        wanted = config.transport == measured.transport
        serious: Verdict = "fail" if wanted and not config.transfer.allow_slow else "note"
        detail = str(measured).removeprefix(f"{measured.transport}: ")
        if short is not None and measured.bandwidth_bytes_per_s is not None:
            detail = f"{detail}; {short}"
        usable = measured.bandwidth_bytes_per_s is not None and short is None
        findings.append(Finding("ok" if usable else serious, f"transport {measured.transport}", detail))
    return findings


def _check_memory(config: ClusterConfig) -> Finding:
    wanted = sum(pool.max_workers * pool.kv_memory for cell in cells_of(config) for pool in cell.config.pools)
    wanted += config.store.dram or 0
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = "KV pools want" if config.store.dram is None else "KV pools and the store want"
    detail = f"{what} {wanted / 2**30:.1f} GiB of {total / 2**30:.1f} GiB"
    return Finding("ok" if wanted < total else "fail", "memory", detail)


def _check_model(config: ClusterConfig) -> Finding:
    try:
        folder = resolve_model(config.model, say, dtype=config.dtype, tier=config.weights.ssd).folder
    except ConfigError as error:
        return Finding("fail", "model", error.message)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Finding("ok", "model", f"{config.model}: {folder}, weights {format_size(size)}")


def _check_port(config: ClusterConfig) -> Finding:
    host, port = config.gateway.host, config.gateway.port
    try:
        with socket.create_server((host, port)):
            return Finding("ok", "port", f"{host}:{port} is free")
    except OSError as error:
        return Finding("fail", "port", f"{host}:{port}: {error.strerror}")


def _check_folder(what: str, folder: str) -> Finding:
    free = shutil.disk_usage(folder).free
    usable = os.access(folder, os.W_OK) and free > 2**26
    return Finding("ok" if usable else "fail", what, f"{folder}, {free / 2**30:.1f} GiB free")
