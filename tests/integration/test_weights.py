"""Weights on a real machine: there once for all workers, there before a worker is, and never wrong ones."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.chaos_reference import Auditor, Reference
from tests.support.chaos_asking import asking, question, until
from tests.support.cluster import running_cluster
from tests.support.layout import ROOT
from tests.support.long_tests import LONG
from tests.support.range_server import range_server

if TYPE_CHECKING:
    from tests.support.cluster import ClusterProcess

DEMO = ROOT / "engine" / "demo"
CONFIG = "configs/local.yaml"
FP32 = {"dtype": "float32"}
ASKED = [question(900 + number, 40 + 60 * number, 12, sampled=number == 1) for number in range(3)]


@pytest.fixture(scope="module")
def auditor() -> Auditor:
    return Auditor(Reference(DEMO))


async def answers(cluster: ClusterProcess, auditor: Auditor) -> None:
    """Token by token those of the reference."""
    async with asking(cluster.base_url, auditor) as asker:
        await asker.learn(*ASKED)
        await asyncio.gather(*(asker.whole(each) for each in ASKED))


def weights_log(cluster: ClusterProcess) -> str:
    return (Path(cluster.state.log_dir) / "weights.log").read_text()


def worker_log(cluster: ClusterProcess, worker_id: str) -> str:
    return (Path(cluster.state.log_dir) / f"{worker_id}.log").read_text()


def mapped_weights(pid: int) -> set[str]:
    """The memory that a process has mapped as weights: each by its number, none of it writable."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "tandem-weights" in line]
    assert all(line[1].startswith("r--s") for line in lines), lines
    return {line[4] for line in lines}


def shared(cluster: ClusterProcess) -> set[str]:
    """What all workers map; asserts that each of them maps that and nothing else."""
    found = [mapped_weights(pid) for pid in cluster.worker_pids()]
    assert all(each == found[0] for each in found), found
    return found[0]


@pytest.mark.slow
async def test_a_machine_has_a_model_once_and_a_workers_next_life_finds_it_there(auditor: Auditor) -> None:
    async with running_cluster(config=CONFIG, overrides=FP32) as cluster:
        (inode,) = shared(cluster)
        await answers(cluster, auditor)
        assert weights_log(cluster).count("bytes in memory from original") == 1
        before = cluster.worker("decode-0")
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        await until(lambda: cluster.worker("decode-0").incarnation > before.incarnation, "it lives again", 60)
        await until(lambda: cluster.state.ready, "it is ready again", 60)
        assert shared(cluster) == {inode}
        await answers(cluster, auditor)
        assert weights_log(cluster).count("bytes in memory") == 1


@pytest.mark.slow
async def test_a_model_is_converted_on_its_first_use_and_a_damaged_copy_is_made_anew(
    tmp_path: Path, auditor: Auditor
) -> None:
    overrides = {**FP32, "weights.ssd.path": str(tmp_path / "tier")}
    async with running_cluster(config=CONFIG, overrides=overrides) as cluster:
        assert len(shared(cluster)) == 1
        assert "bytes in memory from ssd" in weights_log(cluster)
    (weights,) = (tmp_path / "tier").glob("entries/*/checkpoint/*.tandem")
    made = weights.stat()
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    weights.write_bytes(damaged)
    os.utime(weights, ns=(made.st_atime_ns, made.st_mtime_ns))
    async with running_cluster(config=CONFIG, overrides=overrides) as cluster:
        assert "bytes in memory from ssd" in weights_log(cluster)
        await answers(cluster, auditor)
    (weights,) = (tmp_path / "tier").glob("entries/*/checkpoint/*.tandem")
    assert weights.stat().st_mtime_ns != made.st_mtime_ns
    assert weights.read_bytes() != damaged


@pytest.mark.slow
async def test_a_converted_folder_is_served_as_the_model_it_was_made_from(tmp_path: Path, auditor: Auditor) -> None:
    command = [sys.executable, "-m", "cluster", "convert", str(DEMO), str(tmp_path / "converted"), "--dtype", "float32"]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=100, cwd=ROOT)
    as_demo = {**FP32, "served_model_name": "demo"}
    async with running_cluster(model=tmp_path / "converted", config=CONFIG, overrides=as_demo) as cluster:
        assert len(shared(cluster)) == 1
        await answers(cluster, auditor)
    if not LONG:
        return
    # Without the node agent's memory each worker has its own.
    overrides = {**as_demo, "weights.dram": "null"}
    async with running_cluster(model=tmp_path / "converted", config=CONFIG, overrides=overrides) as cluster:
        await answers(cluster, auditor)


@pytest.mark.slow
async def test_weights_come_from_a_store_into_memory_while_the_disk_tier_fills(
    tmp_path: Path, auditor: Auditor
) -> None:
    command = [sys.executable, "-m", "cluster", "convert", str(DEMO), str(tmp_path / "converted"), "--dtype", "float32"]
    await asyncio.to_thread(subprocess.run, command, check=True, timeout=100, cwd=ROOT)
    files = {path.name: path.read_bytes() for path in (tmp_path / "converted").iterdir()}
    overrides = {**FP32, "served_model_name": "demo", "weights.ssd.path": str(tmp_path / "tier")}
    weights = "weights-00001-of-00001.tandem"
    with range_server(files) as web:
        async with running_cluster(model=web.url, config=CONFIG, overrides=overrides) as cluster:
            assert len(shared(cluster)) == 1
            assert "bytes in memory from remote" in weights_log(cluster)
            await answers(cluster, auditor)
            # Not a condition of being served, but soon after.
            await until(lambda: any((tmp_path / "tier").glob(f"entries/*/checkpoint/{weights}")), "the tier has it", 60)
        asked = [bounds for name, bounds in web.asked if name == weights]
        assert len(asked) == len(set(asked))
        (kept,) = (tmp_path / "tier").glob(f"entries/*/checkpoint/{weights}")
        assert kept.read_bytes() == files[weights]
        # The next start takes it from the disk, and so does a worker that reads by itself.
        for more in ({}, {"weights.dram": "null"}):
            before = web.sent_bytes
            async with running_cluster(model=web.url, config=CONFIG, overrides={**overrides, **more}) as cluster:
                await answers(cluster, auditor)
            assert web.sent_bytes - before < len(files[weights])


@pytest.mark.slow
async def test_memory_for_weights_that_is_too_small_is_said_and_passed_by(auditor: Auditor) -> None:
    async with running_cluster(config=CONFIG, overrides={**FP32, "weights.dram": "1MiB"}) as cluster:
        assert shared(cluster) == set()
        assert "do not fit into the 1048576 bytes" in worker_log(cluster, "decode-0")
        await answers(cluster, auditor)


@pytest.mark.slow
async def test_a_loader_that_is_killed_costs_the_memory_and_nothing_else(tmp_path: Path, auditor: Auditor) -> None:
    program = tmp_path / "kills_loaders.py"
    program.write_text(
        "import os, signal, sys\n"
        "from cluster import weights_service\n"
        "given = weights_service.LoaderProcess.filled\n"
        "async def filled(self):\n"
        "    os.kill(self._child.pid, signal.SIGKILL)\n"
        "    return await given(self)\n"
        "weights_service.LoaderProcess.filled = filled\n"
        "from cluster.cli import main\n"
        "main()\n"
    )
    async with running_cluster(config=CONFIG, overrides=FP32, program=(sys.executable, str(program))) as cluster:
        assert shared(cluster) == set()
        assert "its loader ended early: it was ended by SIGKILL" in weights_log(cluster)
        await answers(cluster, auditor)


@pytest.mark.slow
async def test_a_process_that_stood_by_becomes_the_next_worker(auditor: Auditor) -> None:
    overrides = {**FP32, "weights.standby": "1", "weights.fork": "false"}
    async with running_cluster(config=CONFIG, overrides=overrides) as cluster:
        log = Path(cluster.state.log_dir) / "standby.log"
        await until(lambda: log.exists() and "stands by" in log.read_text(), "one stands by", 60)
        standing = int(log.read_text().split()[1])
        before = cluster.worker("decode-0")
        assert before.pid is not None
        os.kill(before.pid, signal.SIGKILL)
        await until(lambda: cluster.worker("decode-0").pid == standing, "its next life is the one that stood by", 60)
        await until(lambda: cluster.state.ready, "it is ready again", 60)
        assert len(shared(cluster)) == 1
        await answers(cluster, auditor)


@pytest.mark.slow
async def test_workers_are_forked_of_one_process_and_so_is_the_next_life_of_each(auditor: Auditor) -> None:
    async with running_cluster(config=CONFIG, overrides=FP32) as cluster:
        template = template_of(cluster)
        for worker_id in ("decode-0", "prefill-0"):
            before = cluster.worker(worker_id)
            assert before.pid is not None
            assert is_fork_of(before.pid, template)
            os.kill(before.pid, signal.SIGKILL)
            await until(lambda: cluster.worker(worker_id).incarnation > before.incarnation, "it lives again", 60)  # noqa: B023
            await until(lambda: cluster.state.ready, "it is ready again", 60)
            after = cluster.worker(worker_id).pid
            assert after is not None
            assert is_fork_of(after, template)
        assert len(shared(cluster)) == 1
        await answers(cluster, auditor)
        os.kill(template, signal.SIGKILL)
        await until(lambda: template_of(cluster) != template, "the template is replaced", 60)
        await answers(cluster, auditor)
        assert cluster.stop() == 0


def template_of(cluster: ClusterProcess) -> int:
    """The last one that was told of."""
    lines = (Path(cluster.state.log_dir) / "standby.log").read_text().splitlines()
    return int([line for line in lines if line.startswith("workers are forked of")][-1].split()[-1])


def is_fork_of(pid: int, template: int) -> bool:
    """Libraries of a process of its own are mapped at other addresses."""
    return "libtorch_cpu" in (found := torch_at(pid)) and found == torch_at(template)


def torch_at(pid: int) -> str:
    """Where a process has mapped torch."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return next((line for line in lines if "libtorch_cpu" in line), "")
