"""Faults one by one, real processes: what is killed, frozen or abandoned costs time, never a token or a block.

Every answer is compared token by token with that of a cluster at peace, which the reference has checked. Each
test ends with every worker back and every ledger clean; after the last one no log tells of a bug.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from benchmarks.chaos_books import complaints
from benchmarks.chaos_client import End, Leaving, Question, attempt
from benchmarks.chaos_reference import Auditor, Reference
from contracts.errors import TandemError
from contracts.ids import BlockId, Incarnation
from kvtransfer import ShmTransport
from rpc import LiveClock
from tests.support.chaos_asking import (
    BOUND_S,
    Asker,
    Streams,
    asking,
    clean,
    question,
    stopped,
    until,
    until_audit,
)
from tests.support.chaos_processes import scattered
from tests.support.chaos_serve import PROGRAM
from tests.support.chaos_served import Scattered, Served
from tests.support.chaos_worker import FOLDER, Brake
from tests.support.cluster import started_cluster
from tests.support.layout import ROOT
from tests.support.long_tests import LONG, only_long
from tests.support.pools import register_pool
from tests.support.processes import is_gone, wait_gone
from tests.unit.kvtransfer.shm_holder import pattern

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

    from cluster.state_file import WorkerState
    from contracts.messages import AuditReply

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

#: A hang is noticed after 3 s; the rest is a loaded machine.
HANG_GAP_S = 15.0
#: Until the blocks of a request that was left are free again, on a loaded machine.
FREED_S = 10.0
#: A chunk of a prompt.
CHUNK_TOKENS = 96

#: The whole matrix at its full length; the default run leaves out what others nearly cover.


@pytest.fixture(scope="module")
def auditor() -> Auditor:
    return Auditor(Reference(ROOT / "engine" / "demo"))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, auditor: Auditor) -> Iterator[Served]:
    brakes, logs = tmp_path_factory.mktemp("brakes"), tmp_path_factory.mktemp("logs")
    overrides = {
        "dtype": "float32",
        # Starts are most of the time here, and the others' libraries are most of a start.
        "transport": "shm",
        "pools.prefill-pair.kv_blocks": "128",
        "pools.decode-pair.kv_blocks": "192",
        "engine.max_batch_tokens": str(CHUNK_TOKENS),
        "supervisor.restart_delay_max_s": "500ms",
        "gateway.request_timeout_s": str(BOUND_S - 5),
        "log_dir": str(logs),
    }
    environ = {FOLDER: str(brakes)}
    with started_cluster(config="configs/2p2d.yaml", overrides=overrides, environ=environ, program=PROGRAM) as cluster:
        cluster.wait_ready()
        yield Served(cluster, Brake(brakes), auditor)
        assert cluster.stop() == 0, cluster.output
        assert not complaints(logs, cluster.output)


def kill(worker: WorkerState) -> None:
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)


# --- row 3: a worker that hangs ------------------------------------------------------------------------


async def test_streams_of_a_frozen_decode_worker_go_on(
    served: Served, record_property: Callable[[str, object], None]
) -> None:
    questions = [question(number, 24, 300, sampled=number % 2 == 1) for number in range(6)]
    fresh = [question(number, 40, 12) for number in range(6, 12)]
    async with served.asker() as asker:
        await asker.learn(*questions, *fresh)
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, questions, tasks)
            await streams.all_writing()
            victim = await served.busiest("decode")
            assert victim.pid is not None
            frozen_s = time.monotonic()
            with stopped(victim.pid):
                for each in fresh:
                    await asker.whole(each)
                await until(lambda: is_gone(victim.pid or 0), "the node agent ends a hung worker", HANG_GAP_S)
            record_property("frozen_to_gone_s", round(time.monotonic() - frozen_s, 2))
            results = await streams.results()
        assert [record.end for record in results] == [End.WHOLE] * len(questions)
        assert sum(record.replays for record in results) > 0
        gaps_s = [ended_s - began_s for began_s, ended_s in (record.longest_gap for record in results)]
        record_property("longest_gap_s", round(max(gaps_s), 2))
        assert max(gaps_s) <= HANG_GAP_S


@pytest.mark.parametrize("role", [pytest.param("prefill", marks=only_long), "decode"])
async def test_a_worker_with_a_stuck_engine_is_replaced_though_it_answers(
    served: Served, role: str, record_property: Callable[[str, object], None]
) -> None:
    """Its event loop runs, answers calls and sends heartbeats: only its steps do not end."""
    questions = [question(20 + number, 200, 120, sampled=number % 2 == 1) for number in range(4)]
    async with served.asker() as asker:
        await asker.learn(*questions)
        # What a step may take must be known to be overstepped: answers of this size teach it.
        for _ in range(3):
            await asyncio.gather(*(asker.whole(each) for each in questions))
        async with asyncio.TaskGroup() as tasks:
            if role == "prefill":
                served.slow("prefill", 0.1)
            streams = Streams(asker, questions, tasks)
            if role == "decode":
                await streams.all_writing()
            else:
                await until_audit(
                    served.audit,
                    lambda audits: any(audits[one.worker_id].open_requests for one in served.workers("prefill")),
                    "a prompt is read",
                )
            victim = await served.busiest(role)
            assert victim.pid is not None
            served.brake.stick(victim.pid)
            stuck_s = time.monotonic()
            assert victim.worker_id in await served.cluster.audit(2.0, [victim.worker_id])
            await until(lambda: is_gone(victim.pid or 0), "a worker whose engine is stuck ends", HANG_GAP_S)
            record_property("stuck_to_gone_s", round(time.monotonic() - stuck_s, 2))
            served.brake.release()
            results = await streams.results()
        assert [record.end for record in results] == [End.WHOLE] * len(questions)
        assert sum(record.replays for record in results) > 0


# --- rows 4 and 5: a worker that dies while KV moves ---------------------------------------------------


async def until_transferring(served: Served) -> None:
    """A prompt is being read in slow chunks, and a decode worker holds a lease on what is ready."""
    names = [worker.worker_id for worker in served.workers("decode")]
    await until_audit(
        served.audit,
        lambda audits: any(name in audits and audits[name].reader_leases for name in names),
        "a decode worker reads from a prefill worker",
    )


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_killed_while_kv_moves_costs_no_token(
    served: Served, role: str, record_property: Callable[[str, object], None]
) -> None:
    """The prompt has five chunks of which some have been pulled; the other side must not go on with these."""
    questions = [question(40 + number, 440, 20, sampled=number == 1) for number in range(2)]
    async with served.asker() as asker:
        await asker.learn(*questions)
        served.slow("prefill")
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, questions, tasks)
            await until_transferring(served)
            victim = await served.busiest(role)
            kill(victim)
            killed_s = time.monotonic()
            results = await streams.results()
        record_property("killed_to_answered_s", round(time.monotonic() - killed_s, 2))
        assert [record.end for record in results] == [End.WHOLE] * len(questions)
        assert sum(record.replays for record in results) > 0


async def test_prefill_killed_between_its_last_chunk_and_the_pull(served: Served) -> None:
    """The first token is out, the decode workers are frozen: the KV is gone before they can read it."""
    asked = question(50, 300, 20)
    async with served.asker() as asker:
        await asker.learn(asked)
        served.slow("prefill")
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, [asked], tasks)
            await until_transferring(served)
            victim = await served.busiest("prefill")
            with stopped(*served.pids("decode")):
                # Four chunks of slow steps end in this time, or do not: both are worth a try.
                await asyncio.sleep(1.2)
                kill(victim)
                await until(lambda: is_gone(victim.pid or 0), "a killed process is gone")
            [record] = await streams.results()
        assert record.end is End.WHOLE


# --- row 6: clients that leave -------------------------------------------------------------------------


STAGES = ("queued", "prefill", "prefilled", "transfer", "before decoding", "decoding")


@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_leaves_frees_its_blocks(
    served: Served, stage: str, record_property: Callable[[str, object], None]
) -> None:
    long_prompt = question(60, 440, 400)
    async with served.asker() as asker:
        await asker.learn(long_prompt)
        if stage in ("queued", "prefill", "prefilled", "transfer"):
            served.slow("prefill")
        if stage in ("before decoding", "decoding"):
            served.slow("decode", 0.05 if stage == "decoding" else 0.5)
        copies = 6 if stage == "queued" else 1
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, [long_prompt] * copies, tasks)
            await _until_stage(served, stage, streams)
            for task in streams.tasks:
                task.cancel()
            left_s = time.monotonic()
        # Slow steps go on: what is freed is freed though the engine is busy.
        await until_audit(served.audit, clean, f"blocks are free after leaving while {stage}", FREED_S)
        record_property("freed_s", round(time.monotonic() - left_s, 2))


async def _until_stage(served: Served, stage: str, streams: Streams) -> None:
    prefills, decodes = ([one.worker_id for one in served.workers(role)] for role in ("prefill", "decode"))

    def some(audits: Mapping[str, AuditReply], names: Sequence[str], holds: Callable[[AuditReply], bool]) -> bool:
        return any(name in audits and holds(audits[name]) for name in names)

    match stage:
        case "queued":
            await until_audit(
                served.audit, lambda audits: some(audits, prefills, lambda one: one.load.waiting_requests > 0), stage
            )
        case "prefill":
            await until_audit(
                served.audit, lambda audits: some(audits, prefills, lambda one: one.holder_leases > 0), stage
            )
        case "prefilled":
            await streams.all_writing(1)
        case "transfer":
            await until_transferring(served)
        case "before decoding":
            await until_audit(
                served.audit,
                lambda audits: some(audits, decodes, lambda one: one.open_requests > 0 and not one.reader_leases),
                stage,
            )
        case _:
            await streams.all_writing(3)


async def test_a_storm_of_500_cancels(served: Served, record_property: Callable[[str, object], None]) -> None:
    rng = random.Random(17)
    asked = [question(70 + number, length, 60) for number, length in enumerate((1, 17, 90, 300))]
    async with served.asker() as asker:
        await asker.learn(*asked)

        async def leave(turns: asyncio.Semaphore) -> End:
            async with turns:
                leaving = Leaving(after_s=rng.choice([0.001, rng.uniform(0, 0.05), rng.uniform(0, 0.4)]))
                return (await asker.attempt(rng.choice(asked), stream=rng.random() < 0.7, leaving=leaving)).end

        turns = asyncio.Semaphore(100)
        ends = await asyncio.gather(*(leave(turns) for _ in range(500)))
        assert ends.count(End.LEFT) > 250, ends
        assert not {End.BROKEN, End.UNANSWERED, End.UNREACHED} & set(ends)
        stormed_s = time.monotonic()
        await until_audit(served.audit, clean, "every ledger is clean after the storm", FREED_S)
        record_property("clean_after_s", round(time.monotonic() - stormed_s, 2))
        await asker.whole(asked[1])


# --- row 7: overload, and most clients leave -----------------------------------------------------------


async def test_after_a_storm_of_aborts_throughput_is_back(
    served: Served, record_property: Callable[[str, object], None]
) -> None:
    """Nine of ten clients leave, more come than can be served; then the same work takes what it took before."""
    rng = random.Random(23)
    asked = [question(80 + number, 60, 40) for number in range(4)]
    async with served.asker() as asker:
        await asker.learn(*asked)

        async def work() -> float:
            """Seconds for 24 answers, eight at once."""
            turns = asyncio.Semaphore(8)

            async def one(number: int) -> None:
                async with turns:
                    await asker.whole(asked[number % 4])

            started_s = time.monotonic()
            await asyncio.gather(*(one(number) for number in range(24)))
            return time.monotonic() - started_s

        async def client(until_s: float) -> list[End]:
            ends: list[End] = []
            while time.monotonic() < until_s:
                leaving = Leaving(after_s=rng.uniform(0, 0.3)) if rng.random() < 0.9 else None
                ends.append((await asker.attempt(rng.choice(asked), leaving=leaving)).end)
            return ends

        before_s = await work()
        until_s = time.monotonic() + (30.0 if LONG else 4.0)
        ends = [end for found in await asyncio.gather(*(client(until_s) for _ in range(64))) for end in found]
        assert ends.count(End.LEFT) > 50
        assert not {End.BROKEN, End.UNANSWERED, End.UNREACHED} & set(ends)
        after_s = await work()
        record_property("work_before_s", round(before_s, 2))
        record_property("work_after_s", round(after_s, 2))
        # Far from a measurement: public systems have taken fifteen times as long for over an hour.
        assert after_s < 5 * before_s + 5


# --- row 9: restarts -----------------------------------------------------------------------------------


@only_long
@pytest.mark.timeout(1500)
async def test_a_worker_that_is_killed_again_and_again(served: Served) -> None:
    """Every life has a larger incarnation, and there is an answer in each of them and between them."""
    asked = [question(90 + number, 100, 30) for number in range(3)]
    async with served.asker() as asker:
        await asker.learn(*asked)
        for cycle in range(50):
            victim = served.workers("prefill" if cycle % 2 else "decode")[0]
            kill(victim)
            await asyncio.gather(*(asker.whole(each) for each in asked))
            await until(
                lambda before=victim: served.cluster.worker(before.worker_id).incarnation > before.incarnation,  # type: ignore[misc]
                "a new life",
            )
            await until(served.all_ready, "every worker is ready")
            await asyncio.gather(*(asker.whole(each) for each in asked))


@pytest.mark.timeout(1500 if LONG else 240)
async def test_holders_of_shared_memory_that_come_and_go() -> None:
    """One reader outlives many holders: it reads each, never mistakes one for another, and keeps nothing of them."""
    num_blocks, block_bytes = 16, 1 << 16
    pairs = [(BlockId(number), BlockId(number)) for number in range(num_blocks)]
    reader = ShmTransport(clock=LiveClock(), incarnation=Incarnation(1))
    pool = register_pool(reader, num_blocks, block_bytes)
    descriptors: list[int] = []
    gone: bytes | None = None
    for _ in range(100 if LONG else 4):
        with shm_holder(num_blocks, block_bytes) as (process, endpoint):
            pool[:] = bytes(len(pool))
            assert (await reader.pull(endpoint, pairs).wait()).error is None
            assert all(
                pool[number * block_bytes : (number + 1) * block_bytes] == pattern(number, block_bytes)
                for number in range(num_blocks)
            )
            if gone is not None:
                assert isinstance((await reader.pull(gone, pairs).wait()).error, TandemError)
            process.kill()
            process.wait(BOUND_S)
            assert isinstance((await reader.pull(endpoint, pairs).wait()).error, TandemError)
            reader.forget(endpoint)
            gone = endpoint
        descriptors.append(psutil.Process().num_fds())
    assert descriptors[-1] <= descriptors[0] + 2, descriptors
    pool.release()
    await reader.close()


@contextmanager
def shm_holder(num_blocks: int, block_bytes: int) -> Generator[tuple[subprocess.Popen[str], bytes]]:
    """A process that holds a filled pool, and how it is reached."""
    command = [sys.executable, "-m", "tests.unit.kvtransfer.shm_holder", str(num_blocks), str(block_bytes)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, bytes.fromhex(process.stdout.readline().strip())
        finally:
            process.kill()


# --- processes of their own: no node agent helps ---------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, auditor: Auditor) -> Iterator[Scattered]:
    config = {
        "model": "demo",
        "dtype": "float32",
        "transport": "shm",
        "engine": {"max_batch_tokens": CHUNK_TOKENS},
        "pools": [
            {"name": "prefill", "role": "prefill", "kv_blocks": 128},
            {"name": "decode", "role": "decode", "workers": 2, "kv_blocks": 192},
        ],
    }
    with scattered(config, tmp_path_factory.mktemp("parts")) as processes:
        yield Scattered(processes, auditor)
        assert "Traceback" not in processes.output()


async def test_a_zombie_that_wakes_adds_nothing(
    parts: Scattered, record_property: Callable[[str, object], None]
) -> None:
    """Nobody ends it: the gateway alone notices that a stream's worker is silent, and fences it when it wakes."""
    questions = [question(100 + number, 24, 300, sampled=number % 2 == 1) for number in range(4)]
    async with parts.asker() as asker:
        await asker.learn(*questions)
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, questions, tasks)
            await streams.all_writing()
            zombie = await parts.busiest_decode()
            with stopped(zombie.process.pid):
                results = await streams.results()
        # Awake again, it finds its requests gone on elsewhere, or itself given up: either way it adds nothing.
        assert [record.end for record in results] == [End.WHOLE] * len(questions)
        assert sum(record.replays for record in results) > 0
        gaps_s = [ended_s - began_s for began_s, ended_s in (record.longest_gap for record in results)]
        record_property("longest_gap_s", round(max(gaps_s), 2))
        assert max(gaps_s) <= HANG_GAP_S
        await asyncio.gather(*(asker.whole(each) for each in questions))
        await parts.until_clean()
    await asyncio.to_thread(parts.revive)


@only_long
async def test_a_zombie_that_wakes_in_mid_answer_adds_nothing(parts: Scattered) -> None:
    """It wakes while its streams are being written by another worker, and would write the same tokens."""
    questions = [question(110 + number, 24, 700, sampled=number % 2 == 1) for number in range(3)]
    async with parts.asker() as asker:
        await asker.learn(*questions)
        async with asyncio.TaskGroup() as tasks:
            streams = Streams(asker, questions, tasks)
            await streams.all_writing()
            zombie = await parts.busiest_decode()
            with stopped(zombie.process.pid):
                # About when the gateway stops to wait for it.
                await asyncio.sleep(3.2)
            results = await streams.results()
        assert [record.end for record in results] == [End.WHOLE] * len(questions)
        await parts.until_clean()
    await asyncio.to_thread(parts.revive)


@pytest.mark.timeout(1500 if LONG else 240)
async def test_a_decode_worker_restarted_on_the_same_address(parts: Scattered) -> None:
    """Connections, leases and streams of the life before must not reach the next one."""
    asked = [question(120 + number, 100, 40) for number in range(2)]
    async with parts.asker() as asker:
        await asker.learn(*asked)
        for _ in range(100 if LONG else 1):
            parts.workers[1].kill()
            await asyncio.to_thread(parts.revive)
            await asyncio.gather(*(asker.whole(each) for each in (*asked, *asked)))
        await parts.until_clean()


async def test_requests_of_a_killed_gateway_are_cancelled(
    parts: Scattered, record_property: Callable[[str, object], None]
) -> None:
    """Nobody is left to cancel them, or to read their tokens; the next gateway finds all of the room."""
    asked = [question(130 + number, 200, 1500) for number in range(4)]
    short = question(140, 50, 20)
    async with parts.asker() as asker:
        await asker.learn(short)
        records = [asyncio.create_task(_until_broken(asker, each)) for each in asked]
        await until_audit(
            parts.audit,
            lambda audits: sum(audits[worker.name].open_requests for worker in parts.workers[1:]) == len(asked),
            "every answer is being written",
        )
        parts.gateway.kill()
        killed_s = time.monotonic()
        assert set(await asyncio.gather(*records)) == {End.BROKEN}
    await parts.until_clean()
    record_property("orphans_freed_s", round(time.monotonic() - killed_s, 2))
    parts.gateway = await asyncio.to_thread(parts.processes.start_gateway)
    await asyncio.to_thread(parts.processes.wait_serving, parts.gateway)
    async with parts.asker() as asker:
        await asker.whole(short)


async def _until_broken(asker: Asker, each: Question) -> End:
    return (await attempt(asker.client, each, stream=True, bound_s=BOUND_S)).end


async def test_a_killed_node_agent_takes_its_workers_along_and_can_be_started_again(auditor: Auditor) -> None:
    """With it go coordinator and gateway here. Clients hear of it at once; the next start serves."""
    overrides = {"dtype": "float32", "transport": "shm"}
    asked, endless = question(150, 60, 30), question(151, 20, 1500)
    with started_cluster(config="configs/local.yaml", overrides=overrides) as doomed:
        await asyncio.to_thread(doomed.wait_ready)
        async with asking(doomed.base_url, auditor) as asker:
            await asker.learn(asked)
            children = [child.pid for child in psutil.Process(doomed.pid).children(recursive=True)]
            assert len(children) >= 2
            stream = asyncio.create_task(_until_broken(asker, endless))
            await until_audit(
                doomed.audit, lambda audits: any(audit.open_requests for audit in audits.values()), "an open request"
            )
            doomed.send_signal(signal.SIGKILL)
            await asyncio.to_thread(wait_gone, children, 10.0)
            assert await stream is End.BROKEN
    with started_cluster(config="configs/local.yaml", overrides=overrides) as again:
        await asyncio.to_thread(again.wait_ready)
        async with asking(again.base_url, auditor) as asker:
            await asker.whole(asked)
