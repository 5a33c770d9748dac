"""Bytes that change, vanish, come twice or out of order on their way: found, fetched again, never believed."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING

import pytest

from benchmarks.chaos_client import End, ask
from benchmarks.chaos_reference import Auditor, Reference
from contracts.errors import TandemError
from contracts.ids import BlockId
from contracts.messages import MEMBERS, Empty
from kvtransfer import HostPool
from kvtransfer.checksums import block_checksums, corrupt_blocks
from kvtransfer.collective_address import read_address, rewrite_address
from rpc import GrpcNetwork
from tests.support.chaos_asking import BOUND_S, Streams, asking, clean, question, until_audit
from tests.support.chaos_coordinator import front
from tests.support.chaos_processes import scattered
from tests.support.chaos_serve import PROGRAM
from tests.support.chaos_worker import FOLDER, SPOIL, Spoiler
from tests.support.cluster import running_cluster
from tests.support.collective_peer import peer
from tests.support.layout import ROOT
from tests.support.pools import register_pool
from tests.support.proxy import UNHARMED, Damage, Proxy, proxy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

NUM_FLIPS = 10_000
BLOCK_BYTES = 3 * 4096 + 8

#: A worker's KV block of the demo model: 16 tokens, 4 layers, keys and values, 2 heads of 32 floats.
DEMO_BLOCK_BYTES = 16 * 4 * 2 * 2 * 32 * 4


# --- checksums alone -----------------------------------------------------------------------------------


@pytest.fixture
def pool() -> Iterator[HostPool]:
    with_content = HostPool(8, DEMO_BLOCK_BYTES)
    with_content.view()[:] = random.Random(5).randbytes(8 * DEMO_BLOCK_BYTES)
    yield with_content
    with_content.close()


def test_ten_thousand_flips_are_all_found(pool: HostPool) -> None:
    rng = random.Random(1)
    blocks = [BlockId(number) for number in range(8)]
    right = block_checksums(pool, blocks)
    view = pool.view()
    for _ in range(NUM_FLIPS):
        at, bit = rng.randrange(len(view)), 1 << rng.randrange(8)
        block = BlockId(at // DEMO_BLOCK_BYTES)
        view[at] ^= bit
        assert corrupt_blocks(pool, [block], [right[block]]) == (0,), f"bit {bit} of byte {at}"
        view[at] ^= bit
    assert corrupt_blocks(pool, blocks, right) == ()
    view.release()


@pytest.mark.parametrize("damage", ["cut short", "stale tail", "shifted", "repeated", "swapped halves", "other block"])
def test_whole_pieces_gone_wrong_are_found(pool: HostPool, damage: str) -> None:
    rng = random.Random(damage)
    right = block_checksums(pool, [BlockId(0)])
    view = pool.view()
    block, other = bytes(view[:DEMO_BLOCK_BYTES]), bytes(view[DEMO_BLOCK_BYTES : 2 * DEMO_BLOCK_BYTES])
    for _ in range(200):
        at = rng.randrange(1, DEMO_BLOCK_BYTES)
        wrong = {
            "cut short": block[:at] + bytes(DEMO_BLOCK_BYTES - at),
            "stale tail": block[:at] + other[at:],
            "shifted": block[-at:] + block[:-at],
            "repeated": (block[:at] + block)[:DEMO_BLOCK_BYTES],
            "swapped halves": block[DEMO_BLOCK_BYTES // 2 :] + block[: DEMO_BLOCK_BYTES // 2],
            "other block": other,
        }[damage]
        view[:DEMO_BLOCK_BYTES] = wrong
        assert corrupt_blocks(pool, [BlockId(0)], right) == (0,), at
    view[:DEMO_BLOCK_BYTES] = block
    assert corrupt_blocks(pool, [BlockId(0)], right) == ()
    view.release()


# --- the data path of a transport ----------------------------------------------------------------------


class Diversion:
    """Sends what comes to an address of gloo's through a proxy; the proxy is there before the address is known."""

    def __init__(self, between: Proxy) -> None:
        self._between = between

    def advertise(self, blob: bytes) -> bytes:
        address = read_address(blob)
        self._between.retarget(".".join(str(part) for part in address.host), address.port)
        return rewrite_address(blob, "127.0.0.1", self._between.port)


async def test_flips_between_gloo_and_gloo_are_all_found(
    record_property: Callable[[str, object], None],
) -> None:
    """Whole pulls through a proxy that flips bits: each spoiled block is named by its checksum, no other one is,
    and pulled again it comes right in the end. Pulls that gloo itself gives up fail with a type."""
    num_blocks, rng = 64, random.Random(3)
    pairs = [(BlockId(number), BlockId(number)) for number in range(num_blocks)]
    async with (
        proxy("127.0.0.1", 1, random.Random(1)) as one,
        proxy("127.0.0.1", 1, random.Random(2)) as two,
        peer("127.0.0.1:0", 1, "127.0.0.2", Diversion(one).advertise) as holding,
        peer("127.0.0.1:0", 2, "127.0.0.2", Diversion(two).advertise) as reading,
    ):
        source = register_pool(holding, num_blocks, BLOCK_BYTES)
        source[:] = rng.randbytes(num_blocks * BLOCK_BYTES)
        target = register_pool(reading, num_blocks, BLOCK_BYTES)
        right = block_checksums_of(source)
        assert (await reading.pull(holding.endpoint(), pairs).wait()).error is None
        found = failed = 0
        for _ in range(30):
            one.damage = two.damage = Damage(flips_per_mib=4.0, spares_below=4096)
            target[:] = bytes(len(target))
            wanted = pairs
            for _ in range(50):
                result = await asyncio.wait_for(reading.pull(holding.endpoint(), wanted).wait(), BOUND_S)
                if result.error is not None:
                    failed += 1
                    continue
                wrong = [pair for pair in wanted if block_of(target, pair[1]) != block_of(source, pair[0])]
                named = [pair for pair in wanted if checksum_of(target, pair[1]) != right[pair[0]]]
                assert named == wrong
                found += len(wrong)
                wanted = wrong
                if not wanted:
                    break
                one.damage = two.damage = UNHARMED
            assert target == source
        flips = one.done["flips_per_mib"] + two.done["flips_per_mib"]
        record_property("flips", flips)
        record_property("spoiled_blocks_found", found)
        record_property("pulls_failed_with_a_type", failed)
        assert found > 30
        source.release()
        target.release()


@pytest.mark.parametrize("damage", ["cuts_per_mib", "repeats_per_mib", "swaps_per_mib"])
async def test_gloo_survives_what_breaks_its_framing(
    damage: str, record_property: Callable[[str, object], None]
) -> None:
    """Connections broken off, pieces twice or in the wrong order: a pull ends in time with a typed error or with
    bytes that checksums can judge, and the next one on a quiet line is right. No process ends."""
    num_blocks, rng = 64, random.Random(3)
    pairs = [(BlockId(number), BlockId(number)) for number in range(num_blocks)]
    async with (
        proxy("127.0.0.1", 1, random.Random(1)) as one,
        proxy("127.0.0.1", 1, random.Random(2)) as two,
        peer("127.0.0.1:0", 1, "127.0.0.2", Diversion(one).advertise) as holding,
        peer("127.0.0.1:0", 2, "127.0.0.2", Diversion(two).advertise) as reading,
    ):
        source = register_pool(holding, num_blocks, BLOCK_BYTES)
        source[:] = rng.randbytes(num_blocks * BLOCK_BYTES)
        target = register_pool(reading, num_blocks, BLOCK_BYTES)
        right = block_checksums_of(source)
        failed = 0
        for _ in range(2):
            one.damage = two.damage = Damage(**{damage: 3.0}, spares_below=4096)
            target[:] = bytes(len(target))
            result = await asyncio.wait_for(reading.pull(holding.endpoint(), pairs).wait(), BOUND_S)
            failed += result.error is not None
            if result.error is None:
                named = [pair for pair in pairs if checksum_of(target, pair[1]) != right[pair[0]]]
                assert named == [pair for pair in pairs if block_of(target, pair[1]) != block_of(source, pair[0])]
            one.damage = two.damage = UNHARMED
            for _ in range(5):
                if (await asyncio.wait_for(reading.pull(holding.endpoint(), pairs).wait(), BOUND_S)).error is None:
                    break
            assert target == source
        record_property("pulls_failed_with_a_type", failed)
        assert one.done[damage] + two.done[damage] > 0
        source.release()
        target.release()


def block_of(pool: memoryview, block: int) -> bytes:
    return bytes(pool[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])


def checksum_of(pool: memoryview, block: int) -> int:
    copy = HostPool(1, BLOCK_BYTES)
    copy.view()[:] = block_of(pool, block)
    [found] = block_checksums(copy, [BlockId(0)])
    copy.close()
    return found


def block_checksums_of(pool: memoryview) -> list[int]:
    return [checksum_of(pool, block) for block in range(len(pool) // BLOCK_BYTES)]


# --- calls between processes ---------------------------------------------------------------------------

DAMAGES = {
    "flips": Damage(flips_per_mib=400.0),
    "cuts": Damage(cuts_per_mib=300.0),
    "repeats": Damage(repeats_per_mib=1000.0),
    "swaps": Damage(swaps_per_mib=1000.0),
}

#: Between gateway and workers, where more is said: something gets through.
MILD_DAMAGES = {
    "flips": Damage(flips_per_mib=60.0),
    "repeats": Damage(repeats_per_mib=60.0),
    "swaps": Damage(swaps_per_mib=60.0),
}


@pytest.mark.slow
async def test_damaged_calls_fail_with_a_type_and_the_server_lives(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """A real coordinator behind the proxy: every call ends in time, with a reply of its type or a `TandemError`."""
    with scattered({"model": "demo"}, tmp_path) as processes:
        coordinator = await asyncio.to_thread(processes.start_coordinator)
        host, _, port = coordinator.address.rpartition(":")
        outcomes: dict[str, int] = {}
        async with proxy(host, int(port), random.Random(9)) as between:
            for name, damage in DAMAGES.items():
                between.damage = damage
                for _ in range(60):
                    network = GrpcNetwork(token=processes.token)
                    try:
                        await network.channel(between.address).call(MEMBERS, Empty(), timeout_s=1.0)
                        outcome = f"{name}: answered"
                    except TandemError as error:
                        outcome = f"{name}: {error.code}"
                    finally:
                        await network.close()
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1
                assert any(key.startswith(f"{name}: ") and "answered" not in key for key in outcomes), outcomes
        record_property("outcomes", outcomes)
        assert coordinator.process.poll() is None, (coordinator.process.returncode, processes.output())
        assert await processes.members() == ()
        assert "Traceback" not in processes.output()


@pytest.mark.skipif(os.environ.get("LONG_TESTS") != "1", reason="only with LONG_TESTS=1")
@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_damaged_calls_between_gateway_and_workers(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """What gateway and workers say to each other passes proxies. Broken connections cost no token: every answer
    is right. Whatever else happens to the bytes, requests end in time, nobody dies and nothing leaks. (A flipped bit
    in a token id is a valid body: that is what TLS is for on a network that does such things.)"""
    config = {
        "model": "demo",
        "dtype": "float32",
        "transport": "shm",
        "gateway": {"request_timeout_s": 40},
        "pools": [
            {"name": "prefill", "role": "prefill", "kv_blocks": 128},
            {"name": "decode", "role": "decode", "kv_blocks": 192},
        ],
    }
    asked = [question(200 + number, 40 + 100 * (number % 3), 60, sampled=number % 2 == 1) for number in range(6)]
    auditor = await asyncio.to_thread(lambda: Auditor(Reference(ROOT / "engine" / "demo")))
    with scattered(config, tmp_path) as processes:
        await asyncio.to_thread(processes.start_coordinator)
        async with front(processes.coordinator_address, processes.token, seed=4) as before:
            processes.coordinator_address = before.address
            workers = [processes.start_worker(pool, wait=False) for pool in ("prefill", "decode")]
            for worker in workers:
                await asyncio.to_thread(processes.wait_ready, worker)
            gateway = await asyncio.to_thread(processes.start_gateway)
            await asyncio.to_thread(processes.wait_serving, gateway)
            async with asking(gateway.address, auditor) as asker:
                await asker.learn(*asked)
                num_replays = 0
                for _ in range(4):
                    async with asyncio.TaskGroup() as tasks:
                        streams = Streams(asker, asked, tasks)
                        await streams.some_writing()
                        before.cut_all()
                        results = await streams.results()
                    assert [record.end for record in results] == [End.WHOLE] * len(asked), results
                    num_replays += sum(record.replays for record in results)
                ends: dict[str, int] = {}
                for name, damage in MILD_DAMAGES.items():
                    before.set_damage(damage)
                    outcomes = await asyncio.gather(
                        *(ask(asker.client, each, stream=True, bound_s=BOUND_S, patience_s=5.0) for each in asked)
                    )
                    before.set_damage(UNHARMED)
                    for each, outcome in zip(asked, outcomes, strict=True):
                        wrong = await asyncio.to_thread(auditor.faults, each, outcome.last)
                        key = f"{name}: {outcome.last.end.value}{' wrong' if wrong else ''}"
                        ends[key] = ends.get(key, 0) + 1
                        assert outcome.last.end in (End.WHOLE, End.ERROR), outcome.last
                record_property("replays_after_cuts", num_replays)
                record_property("ends", ends)
                assert num_replays > 0
                await until_audit(lambda: processes.audit(workers), clean, "every ledger is clean")
                await asyncio.gather(*(asker.whole(each) for each in asked))
        for part in (*workers, gateway):
            assert part.process.poll() is None, part.name
        assert "Traceback" not in processes.output()


# --- KV between workers --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_spoiled_kv_is_pulled_again_and_costs_no_token(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Real workers, gloo between them through proxies that flip bits in every second block or so, checksums on."""
    spoiler = Spoiler(tmp_path)
    overrides = {
        "dtype": "float32",
        "transport": "collective",
        "transfer.checksum": "true",
        "transfer.allow_slow": "true",
        "engine.max_batch_tokens": "96",
        "gateway.request_timeout_s": "50",
        # Else only the first round would move anything: who writes keeps what it has.
        "engine.prefix_cache": "false",
    }
    environ = {FOLDER: str(tmp_path), SPOIL: "1"}
    asked = [question(300 + number, 100 + 60 * number, 30, sampled=number % 2 == 1) for number in range(6)]
    auditor = await asyncio.to_thread(lambda: Auditor(Reference(ROOT / "engine" / "demo")))
    async with running_cluster(
        config="configs/local.yaml", overrides=overrides, environ=environ, program=PROGRAM
    ) as cluster:
        pids = set(cluster.worker_pids())
        async with asking(cluster.base_url, auditor) as asker:
            await asker.learn(*asked)
            spoiler.set(3.0)
            await asyncio.sleep(0.3)
            # On a loaded machine some prompts are read anew where they are answered, and their KV meets no proxy.
            num_rounds = 0
            async with asyncio.timeout(120):
                while num_rounds < 5 or spoiler.num_flips() <= 20:
                    await asyncio.gather(*(asker.whole(each) for each in asked))
                    num_rounds += 1
            spoiler.set(0.0)
            await asyncio.sleep(0.3)
            record_property("flips", spoiler.num_flips())
            record_property("rounds", num_rounds)
            await until_audit(cluster.audit, clean, "every ledger is clean")
            await asyncio.gather(*(asker.whole(each) for each in asked))
        assert set(cluster.worker_pids()) == pids, cluster.output
