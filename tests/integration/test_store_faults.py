"""Faults of a store and its disk, real processes: a block that cannot be had is computed, and nobody is told of it.

Every answer is held against the reference, token by token. Each test leaves every process idle with clean books, and
the store as it is to be found: in order, its folder taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
from typing import TYPE_CHECKING
from unittest import mock

import psutil
import pytest

from benchmarks.chaos_books import COMPLAINTS
from kvstore.ssd.format import FORMAT_VERSION, SUPERBLOCK
from kvstore.ssd.superblock import superblock
from tests.support import chaos_store, chaos_worker
from tests.support.chaos_asking import stopped
from tests.support.chaos_store import DiskBrake
from tests.support.chaos_store_serve import PROGRAM
from tests.support.chaos_worker import Brake
from tests.support.cluster import started_cluster
from tests.support.oracle import Oracle, write_tokenizer
from tests.support.processes import is_gone, wait_gone
from tests.support.stored_cluster import BOUND_S, MODEL, StoredCluster, find_block, until
from tests.support.tiny_models import VOCAB_SIZE, load_reference, make_tiny_model

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from tests.support.cluster import ClusterProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

BLOCK_TOKENS = 16
#: K and V of three layers with two heads of 16 values.
BLOCK_BYTES = BLOCK_TOKENS * 2 * 3 * 2 * 16 * 4
#: Full blocks of a prompt; one token more, for that is always computed.
NUM_BLOCKS = 24
#: A prompt is read in seven steps. With as much more for each as a larger model takes, copying is what pays.
CHUNK_TOKENS = 64
STEP_S = 0.03
#: Room for some 270 blocks in 16 files.
DISK_BYTES = 4 << 20
#: Of the store's memory where there is little room: one prompt and its answer.
NARROW_BLOCKS = 32
DISK_FULL = shutil.which("unshare") is not None and os.geteuid() == 0


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("models"))
    write_tokenizer(folder)
    return Oracle(folder, load_reference(folder), [], [])


def prompt(number: int, num_blocks: int = NUM_BLOCKS) -> list[int]:
    """Prompts of different numbers share no block."""
    rng = random.Random(number)
    return [rng.randrange(VOCAB_SIZE) for _ in range(num_blocks * BLOCK_TOKENS + 1)]


def settings(disk: Path, logs: Path, **more: str) -> dict[str, str]:
    return {
        "served_model_name": MODEL,
        "dtype": "float32",
        "transport": "shm",
        "transfer.probe": "false",
        "block_tokens": str(BLOCK_TOKENS),
        "engine.max_batch_tokens": str(CHUNK_TOKENS),
        "pools.*.kv_memory": "16MiB",
        "store.dram": "2MiB",
        "store.ssd.path": str(disk),
        "store.ssd.size": str(DISK_BYTES),
        "supervisor.restart_delay_s": "50ms",
        "supervisor.restart_delay_max_s": "100ms",
        "log_dir": str(logs),
        **more,
    }


class Site:
    """A cluster whose store's folder is behind a link, `spot`/kv, that a test can let point elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.logs = folder / "logs"
        self.disk_orders = folder / "disk-orders"
        self.engine_orders = folder / "engine-orders"
        self.spot = folder / "spot"
        self.good = folder / "good"
        #: A small file system of the cluster's own, where there is one.
        self.small = folder / "small"
        for each in (self.logs, self.disk_orders, self.engine_orders, self.good, self.small):
            each.mkdir()
        self.point(self.good)
        self.disk = DiskBrake(self.disk_orders)
        self.engines = Brake(self.engine_orders)
        self.cluster: ClusterProcess

    def point(self, target: Path) -> None:
        new = self.spot.with_name("spot.new")
        new.symlink_to(target)
        new.replace(self.spot)

    @property
    def environ(self) -> dict[str, str]:
        return {chaos_store.FOLDER: str(self.disk_orders), chaos_worker.FOLDER: str(self.engine_orders)}

    @property
    def program(self) -> tuple[str, ...]:
        if not DISK_FULL:
            return PROGRAM
        mounted = 'mount -t tmpfs -o size=1m none "$0" && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", mounted, str(self.small), *PROGRAM)

    def store_log(self) -> str:
        return "".join(path.read_text() for path in self.logs.glob("store*.log"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    overrides = settings(site.spot / "kv", site.logs)
    with started_cluster(
        model=oracle.model_dir,
        config="configs/local.yaml",
        overrides=overrides,
        environ=site.environ,
        program=site.program,
    ) as cluster:
        cluster.wait_ready()
        site.cluster = cluster
        yield site
        assert cluster.stop() == 0, cluster.output
        logs = "".join(path.read_text() for path in site.logs.iterdir()) + cluster.output
        assert not (found := COMPLAINTS.search(logs)), logs[max(found.start() - 2000, 0) : found.end() + 2000]


@pytest.fixture
async def served(site: Site, oracle: Oracle) -> AsyncGenerator[StoredCluster]:
    async with StoredCluster.opened(site.cluster, oracle) as served:
        await served.told()
        site.engines.slow(served.pid("prefill"), STEP_S)
        yield served
        site.disk.release()
        site.point(site.good)
        await served.told()
        await served.audit_is_clean()


async def restart(served: StoredCluster, role: str = "store") -> None:
    """Kills it; the node agent starts another one."""
    before, pid = served.peer(role), served.pid(role)
    os.kill(pid, signal.SIGKILL)

    async def is_back() -> bool:
        now = served.peer(role)
        audits = await served.cluster.audit(only=[now.worker_id])
        return bool(audits) and now.incarnation != before.incarnation

    await until(is_back, f"another {role}")


# --- row 13: what lies on disk is damaged ----------------------------------------------------------------


@pytest.mark.parametrize(("number", "damage"), [(1, "bit"), (2, "cut"), (3, "deleted")])
async def test_a_damaged_file_is_a_miss(site: Site, served: StoredCluster, number: int, damage: str) -> None:
    asked = prompt(number)
    await served.keep(asked)
    await served.clear("dram")
    # The first one that is in no file with those in front of it.
    places = [find_block(site.good / "kv", key) for key in await served.keys(asked)]
    num_good, place = next((index, each) for index, each in enumerate(places) if each.path != places[0].path)
    before = (await served.figures("ssd")).evicted
    if damage == "bit":
        with place.path.open("r+b") as file:
            file.seek(place.offset + place.length // 2)
            [byte] = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
    elif damage == "cut":
        os.truncate(place.path, place.offset + place.length // 2)
    else:
        place.path.unlink()
    found = await served.fetch(asked, NUM_BLOCKS)
    assert found.get("ssd", 0) <= num_good * BLOCK_TOKENS
    reason = {"bit": "corrupt", "cut": "truncated", "deleted": "lost"}[damage]
    after = (await served.figures("ssd")).evicted
    assert after.get(reason, 0) > before.get(reason, 0), after
    # What was computed instead is kept again.
    again = prompt(number + 3)
    await served.keep(again)
    assert await served.fetched(again, NUM_BLOCKS, "ssd") > 0


async def test_the_folder_is_deleted_while_it_runs(site: Site, served: StoredCluster) -> None:
    asked = prompt(10)
    await served.keep(asked)
    shutil.rmtree(site.good / "kv")
    await served.clear("dram")
    assert await served.fetch(asked, NUM_BLOCKS) == {}
    again = prompt(11)
    await served.serve(again)

    async def is_on_disk() -> bool:
        return sum(path.stat().st_size for path in (site.good / "kv").glob("*/*.kv")) > 0

    await until(is_on_disk, "new files")
    assert await served.fetched(again, NUM_BLOCKS, "ssd") > 0


# --- row 13: the folder cannot be used -------------------------------------------------------------------


@pytest.mark.parametrize("trouble", ["a file", "not writable", "another version"])
async def test_a_folder_that_cannot_be_used_is_named_and_tried_again(
    site: Site, served: StoredCluster, tmp_path: Path, trouble: str
) -> None:
    named = str(site.spot / "kv")
    asked = prompt(20 + len(trouble))
    await served.keep(asked)
    match trouble:
        case "a file":
            (tmp_path / "plain").write_text("not a folder")
            site.point(tmp_path / "plain")
            words = ["Not a directory", named]
        case "not writable":
            # Where not even root may make a folder.
            site.point(type(tmp_path)("/sys"))
            words = ["not allowed", named]
        case _:
            folder = tmp_path / "kv"
            folder.mkdir()
            (folder / SUPERBLOCK).write_bytes(other_superblock())
            site.point(tmp_path)
            words = [named, f"format {FORMAT_VERSION + 1}", "delete that folder", "store.ssd.path"]
    await restart(served)
    await served.told(*words)
    assert all(word in site.store_log() for word in ["WARNING", *words])
    # Host memory does what it can.
    await served.keep(asked, "dram")
    assert await served.fetched(asked, NUM_BLOCKS, "dram") > 0
    await served.audit_is_clean()
    site.point(site.good)
    await served.told()
    # Nobody kept these since it was started.
    assert await served.fetched(asked, NUM_BLOCKS, "ssd") > 0


def other_superblock() -> bytes:
    """What a folder of the next version says."""
    with mock.patch("kvstore.ssd.superblock.FORMAT_VERSION", FORMAT_VERSION + 1):
        return superblock()


async def test_a_damaged_superblock_costs_nothing(site: Site, served: StoredCluster) -> None:
    asked = prompt(30)
    await served.keep(asked)
    path = site.good / "kv" / SUPERBLOCK
    path.write_bytes(path.read_bytes()[:-20])
    await restart(served)
    await served.told()
    assert path.read_bytes() == superblock()
    assert await served.fetched(asked, NUM_BLOCKS, "ssd") > 0


# --- row 13: it cannot be written ------------------------------------------------------------------------


async def test_a_disk_that_refuses_writes_is_told_of_and_used_again(served: StoredCluster) -> None:
    asked = prompt(40)
    await served.keep(asked)
    store = psutil.Process(served.pid("store"))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store.rlimit(psutil.RLIMIT_FSIZE, (4096, hard))
    number = 41
    while not (problem := (await served.figures("ssd")).problem):
        # What the file that fills can take is taken.
        await served.serve(prompt(number))
        number += 1
        assert number < 60
    assert "disk failure" in problem
    assert "File too large" in problem
    assert await served.fetched(asked, NUM_BLOCKS, "ssd") > 0
    store.rlimit(psutil.RLIMIT_FSIZE, (hard, hard))
    await written_again(served, 60)


async def written_again(served: StoredCluster, number: int) -> None:
    """A write is what shows that writing works; one is tried after each of its pauses."""

    async def holds() -> bool:
        nonlocal number
        number += 1
        await served.serve(prompt(number))
        return not (await served.figures("ssd")).problem

    await until(holds, "the disk is written again")


@pytest.mark.skipif(not DISK_FULL, reason="needs a file system of its own")
async def test_a_full_disk_is_told_of_and_used_again(site: Site, served: StoredCluster) -> None:
    site.point(site.small)
    await restart(served)
    await served.told()
    await served.keep(prompt(70))
    number = 71
    while not (problem := (await served.figures("ssd")).problem):
        await served.serve(prompt(number))
        number += 1
        assert number < 90
    assert problem.startswith("disk full")
    assert "No space left" in problem
    figures = await served.figures("ssd")
    assert 0 < figures.num_blocks * BLOCK_BYTES < 1 << 20
    # What stands is served.
    assert await served.fetched(prompt(70), NUM_BLOCKS, "ssd") > 0
    enter = ("nsenter", "--mount", "--target", str(site.cluster.pid))
    await asyncio.to_thread(
        subprocess.run, [*enter, "mount", "-o", "remount,size=8m", str(site.small)], check=True, timeout=BOUND_S
    )
    await written_again(served, 90)
    site.point(site.good)
    await restart(served)


# --- row 13: killed --------------------------------------------------------------------------------------


async def test_a_store_killed_in_a_write_serves_what_it_can_verify(site: Site, served: StoredCluster) -> None:
    old, new = prompt(100), prompt(101)
    await served.keep(old)
    site.disk.hold("write", after=2)
    await served.serve(new)

    async def is_held() -> bool:
        return site.disk.is_held("write")

    await until(is_held, "half of a record is written")
    await restart(served)
    site.disk.release()
    await served.told()
    assert await served.num_standing(old, "ssd") == NUM_BLOCKS
    assert await served.num_standing(new, "ssd") < NUM_BLOCKS
    assert await served.fetched(old, NUM_BLOCKS, "ssd") > 0
    await served.clear("dram")
    assert (await served.fetch(new, NUM_BLOCKS)).get("ssd", 0) < NUM_BLOCKS * BLOCK_TOKENS


async def test_another_cluster_waits_for_the_folder_and_takes_it_over(tmp_path: Path, oracle: Oracle) -> None:
    """And finds there what the first one, killed as a whole, has left."""
    disk, asked = tmp_path / "kv", prompt(110)
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(colocated(oracle, disk, tmp_path / "first"))
        await asyncio.to_thread(first.wait_ready)
        async with StoredCluster.opened(first, oracle) as served:
            await served.told()
            await served.keep(asked)
            holder = served.pid("store")
        second = stack.enter_context(colocated(oracle, disk, tmp_path / "second"))
        await asyncio.to_thread(second.wait_ready)
        async with StoredCluster.opened(second, oracle) as served:
            await served.told("in use", f"process {holder}", str(disk))
            await served.serve(prompt(111))
            tree = first.tree()
            first.send_signal(signal.SIGKILL)
            await asyncio.to_thread(wait_gone, [each.pid for each in tree], BOUND_S)
            await served.told()
            assert await served.num_standing(asked, "ssd") == NUM_BLOCKS
            assert await served.fetched(asked, NUM_BLOCKS, "ssd") > 0
            await served.audit_is_clean()
        log = "".join(path.read_text() for path in (tmp_path / "second").glob("store*.log"))
        assert (
            f"WARNING: nothing is kept on disk: in use: [Errno {errno.EWOULDBLOCK}] process {holder} uses {disk}" in log
        )


def colocated(oracle: Oracle, disk: Path, logs: Path) -> AbstractContextManager[ClusterProcess]:
    return started_cluster(model=oracle.model_dir, config="configs/colocated.yaml", overrides=settings(disk, logs))


# --- row 14: leases of a store ---------------------------------------------------------------------------


async def reading(site: Site) -> None:
    """Waits until the store reads from its disk, and does not come to an end."""

    async def is_held() -> bool:
        return site.disk.is_held("read")

    await until(is_held, "a read of the disk")


async def test_a_store_frozen_in_a_fetch_is_not_waited_for(site: Site, served: StoredCluster) -> None:
    asked = prompt(120)
    await served.keep(asked)
    await served.clear("dram", "device")
    site.disk.hold("read", after=1)
    async with served.direct() as client:
        answer = await served.begin(client, asked, NUM_BLOCKS)
        await reading(site)
        with stopped(served.pid("store")):
            # What it has read already may have come.
            assert (await served.end(answer)).get("ssd", 0) < NUM_BLOCKS * BLOCK_TOKENS
    # Now it says what nobody waits for any more.
    site.disk.release()
    await served.audit_is_clean()
    assert await served.fetched(asked, NUM_BLOCKS, "ssd") > 0


async def test_a_worker_killed_in_a_fetch_leaves_nothing_at_the_store(site: Site, served: StoredCluster) -> None:
    asked = prompt(130)
    await served.keep(asked)
    await served.clear("dram", "device")
    site.disk.hold("read", after=1)
    pid = served.pid("prefill")
    # It would go on without the store.
    site.engines.stick(pid)
    async with served.direct() as client:
        await served.begin(client, asked, NUM_BLOCKS)
        await reading(site)
        store = served.peer("store").worker_id
        assert (await served.cluster.audit(only=[store]))[store].open_requests == 1
        os.kill(pid, signal.SIGKILL)
        await until(lambda: gone(pid), "the killed worker is gone")
    site.disk.release()
    site.engines.release()
    await served.audit_is_clean()
    await served.serve(asked)
    assert await served.fetched(asked, NUM_BLOCKS, "ssd") > 0


async def gone(pid: int) -> bool:
    return is_gone(pid)


# --- rows 14 and 15: short terms, no room ----------------------------------------------------------------


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Iterator[Site]:
    """Room for two prompts in each pool and for one in the store's memory, and terms that end soon."""
    site = Site(tmp_path_factory.mktemp("narrow"))
    overrides = settings(
        site.spot / "kv",
        site.logs,
        **{
            "pools.prefill.kv_blocks": "64",
            "pools.decode.kv_blocks": "64",
            "store.dram": str(NARROW_BLOCKS * BLOCK_BYTES),
            "transfer.lease_ttl_s": "600ms",
        },
    )
    with started_cluster(
        model=oracle.model_dir, config="configs/local.yaml", overrides=overrides, environ=site.environ, program=PROGRAM
    ) as cluster:
        cluster.wait_ready()
        site.cluster = cluster
        yield site
        assert cluster.stop() == 0, cluster.output
        logs = "".join(path.read_text() for path in site.logs.iterdir()) + cluster.output
        assert not (found := COMPLAINTS.search(logs)), logs[max(found.start() - 2000, 0) : found.end() + 2000]


async def test_no_room_anywhere_and_a_store_that_is_killed(narrow: Site, oracle: Oracle) -> None:
    async with StoredCluster.opened(narrow.cluster, oracle) as served:
        first = [prompt(200 + number % 8) for number in range(16)]
        answers = await asyncio.gather(*(served.serve(each) for each in first))
        turns = [[*asked, *answer, *asked[:40]] for asked, answer in zip(first, answers, strict=True)]
        async with asyncio.TaskGroup() as tasks:
            for turn in turns:
                tasks.create_task(served.serve(turn))
            # As the kernel does where memory runs out.
            await restart(served)
        await served.audit_is_clean()
        figures = await served.figures("dram")
        assert figures.num_blocks <= NARROW_BLOCKS
        await asyncio.gather(*(served.serve(each) for each in turns))
        await served.audit_is_clean()
        await served.keep(first[0], most_blocks=NARROW_BLOCKS // 4)


@pytest.mark.parametrize("frozen", [False, True])
async def test_a_term_ends_while_the_disk_is_slow(narrow: Site, oracle: Oracle, frozen: bool) -> None:
    async with StoredCluster.opened(narrow.cluster, oracle) as served:
        asked = prompt(300 + frozen)
        # Another one does not know that fetches are slow here, and reads ahead no more than it should.
        await restart(served, "prefill")
        # A store writes no more than a quarter of its memory at once.
        await served.keep(asked, most_blocks=NARROW_BLOCKS // 4)
        await served.audit_is_clean()
        pid = served.pid("prefill")
        narrow.engines.slow(pid, 0.3)
        await served.clear("dram", "device")
        narrow.disk.hold("read")
        async with served.direct() as client:
            answer = await served.begin(client, asked, NUM_BLOCKS)
            await reading(narrow)
            if frozen:
                with stopped(pid):
                    await asyncio.sleep(1.2)
            else:
                # Longer than a term: it is renewed.
                await asyncio.sleep(1.0)
            narrow.disk.release()
            await served.end(answer)
        narrow.engines.release()
        await served.audit_is_clean()
