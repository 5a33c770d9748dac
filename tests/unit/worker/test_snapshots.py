"""A worker's snapshots: what stood stands again under the same keys, nobody waits for it, and a ledger stays clean."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from coldstart.snapshot.codecs import CodecRegistry
from coldstart.snapshot.folder import SnapshotFolder
from coldstart.snapshot.reading import SnapshotFile
from coldstart.snapshot.writing import Draft
from contracts.latency import StepWork
from contracts.layout import BlockLayout, KvIdentity
from engine.live_latency import REFIT_STEPS, WARM_UP_STEPS, LiveLatency
from engine.room import Room
from kvstore.prefix_cache import PrefixCache
from kvtransfer import Ledger
from rpc import LiveClock
from worker import snapshots as module
from worker.snapshots import SnapshotService, WorkerSnapshots

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from contracts.requests import KvClass
    from kvstore.prefix_cache import KeyChain

LAYOUT = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=4, dtype="float32")
IDENTITY = KvIdentity(model_fingerprint="f" * 64, layout=LAYOUT, rope_base=1e4, protocol_version=2)
MODEL = ("folder", "auto", "4")
PATIENCE_S = 20.0


class Slow:
    """A codec whose bytes come when they may."""

    name = "slow"

    def __init__(self) -> None:
        self.may = threading.Event()

    def encode(self, data: memoryview) -> bytes:
        return bytes(data[: data.nbytes // 2])

    def decode(self, data: memoryview, num_bytes: int) -> bytes:
        assert self.may.wait(PATIENCE_S)
        return bytes(num_bytes)


@dataclass
class Life:
    """What of a worker is kept, without a model: blocks are filled by what their tokens are."""

    num_blocks: int = 64
    identity: KvIdentity = IDENTITY
    prefix_cache: bool = True
    log: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.num_blocks)
        self.prefixes = PrefixCache(self.ledger, self.identity, enabled=self.prefix_cache)
        self.room = Room(
            layout=LAYOUT,
            num_blocks=self.num_blocks,
            growth_tokens=16,
            available_blocks=lambda: self.ledger.available_blocks,
        )
        self.latency = LiveLatency()
        self.pool = bytearray(self.num_blocks * LAYOUT.block_bytes)

    def chain(self, tokens: Sequence[int], kv_class: KvClass = "exact") -> KeyChain:
        return self.prefixes.chain(tokens, "tenant", kv_class)

    def prompt(self, tokens: Sequence[int], kv_class: KvClass = "exact") -> int:
        """Reads one, as a worker does; how many of its blocks stood."""
        chain = self.chain(tokens, kv_class)
        found = self.prefixes.match_prompt(chain, len(tokens) + 1)
        self.prefixes.note_used(chain, len(chain))
        self.ledger.share("request", found)
        new = self.ledger.allocate("request", len(chain) - len(found))
        assert new is not None
        for number, block in enumerate([*found, *new]):
            start = block * LAYOUT.block_bytes
            content = bytes([tokens[number * LAYOUT.block_tokens]]) * LAYOUT.block_bytes
            if number < len(found):
                assert self.pool[start : start + LAYOUT.block_bytes] == content
            self.pool[start : start + LAYOUT.block_bytes] = content
        self.prefixes.name(chain, [*found, *new], len(found), len(chain))
        self.ledger.release_all("request")
        return len(found)

    @asynccontextmanager
    async def served(
        self,
        folder: Path,
        worker_id: str = "a-0",
        *,
        size_bytes: int = 1 << 24,
        build: str = "1",
        codecs: CodecRegistry | None = None,
    ) -> AsyncGenerator[SnapshotService]:
        """Until the body ends; then it is told to leave."""
        snapshots = WorkerSnapshots(
            SnapshotFolder(folder, size_bytes),
            model=MODEL,
            worker_id=worker_id,
            build=build,
            clock=LiveClock(),
            log=self.log.append,
            codecs=codecs,
        )
        service = snapshots.serve(
            self, self.latency, memoryview(self.pool), identity=self.identity, machine="m", max_batch_tokens=512
        )
        with suppress(asyncio.CancelledError):
            async with service:
                yield service
                raise asyncio.CancelledError
        self.ledger.check()
        assert self.ledger.load()["owned_blocks"] == 0


def tokens(first: int, num_blocks: int) -> list[int]:
    return [first + number for number in range(num_blocks * LAYOUT.block_tokens)]


async def restored(service: SnapshotService, num_blocks: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while service.restored_blocks_total < num_blocks:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def said(life: Life, line: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not any(line in each for each in life.log):  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def test_shared_beginnings_stand_in_the_next_life(tmp_path: Path) -> None:
    system = tokens(1, 5)
    first = Life()
    async with first.served(tmp_path):
        for number in range(3):
            assert first.prompt(system + tokens(100 + 20 * number, 2)) == (5 if number else 0)
    assert any("a snapshot of 5 blocks is written" in line for line in first.log), first.log
    second = Life()
    async with second.served(tmp_path) as service:
        await restored(service, 5)
        assert second.ledger.load()["cached_blocks"] == 5
        assert second.prompt(system + tokens(200, 1)) == 5
    assert any("5 of 5 blocks (20 tokens) restored" in line for line in second.log), second.log


async def test_another_worker_of_the_model_begins_with_it_too(tmp_path: Path) -> None:
    first, second = Life(), Life()
    async with first.served(tmp_path):
        first.prompt(tokens(1, 3))
        first.prompt(tokens(1, 3))
    async with second.served(tmp_path, "b-0") as service:
        await restored(service, 3)
        assert second.prompt(tokens(1, 3)) == 3


async def test_lossy_blocks_and_those_of_one_prompt_are_not_kept(tmp_path: Path) -> None:
    life = Life()
    async with life.served(tmp_path) as service:
        life.prompt(tokens(1, 3), "lossy")
        life.prompt(tokens(1, 3), "lossy")
        life.prompt(tokens(50, 3))
        path = service.path
    file = SnapshotFile(path, CodecRegistry())
    assert [section.kind for section in file.sections] == ["steps"]
    file.close()


async def test_who_was_asked_for_nothing_leaves_the_snapshot_alone(tmp_path: Path) -> None:
    first, second = Life(), Life()
    async with first.served(tmp_path) as service:
        first.prompt(tokens(1, 3))
        first.prompt(tokens(1, 3))
        path = service.path
    before = path.read_bytes()
    async with second.served(tmp_path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("other", ["build", "model"])
async def test_another_life_s_snapshot_is_refused_with_the_reason(tmp_path: Path, other: str) -> None:
    first = Life()
    async with first.served(tmp_path):
        first.prompt(tokens(1, 3))
        first.prompt(tokens(1, 3))
    second = Life(
        identity=msgspec.structs.replace(IDENTITY, model_fingerprint="e" * 64) if other == "model" else IDENTITY
    )
    async with second.served(tmp_path, build="2" if other == "build" else "1") as service:
        async with asyncio.timeout(PATIENCE_S):
            await service.restored()
        assert second.ledger.load()["cached_blocks"] == 0
    assert any(
        "of another life" in line and ("build: '2' here, '1' there" in line) == (other == "build")
        for line in second.log
    )


async def test_damage_costs_the_block_and_what_is_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SECTION_BYTES", LAYOUT.block_bytes)
    first = Life()
    async with first.served(tmp_path) as service:
        first.prompt(tokens(1, 5))
        first.prompt(tokens(1, 5))
        path = service.path
    file = SnapshotFile(path, CodecRegistry())
    third = [section for section in file.sections if section.kind == "kv"][2]
    file.close()
    data = bytearray(path.read_bytes())
    data[third.offset] ^= 1
    path.write_bytes(data)
    second = Life()
    async with second.served(tmp_path) as service:
        await restored(service, 2)
        async with asyncio.timeout(PATIENCE_S):
            await service.restored()
        assert second.prompt(tokens(1, 5)) == 2
    assert any("2 of 5 blocks" in line and "its checksum is wrong" in line for line in second.log), second.log


async def test_nobody_waits_for_a_disk_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow()
    codecs = CodecRegistry([slow])
    first = Life()

    def slowly(**fields: Any) -> Draft:
        fields["codec"] = "slow"
        return Draft(**fields)

    with monkeypatch.context() as patched:
        patched.setattr(module, "Draft", slowly)
        async with first.served(tmp_path, codecs=codecs):
            first.prompt(tokens(1, 5))
            first.prompt(tokens(1, 5))
    second = Life()
    async with second.served(tmp_path, codecs=codecs) as service:
        # In service, and nothing has come.
        assert not slow.may.is_set()
        assert service.restored_blocks_total == 0
        assert second.prompt(tokens(1, 5)) == 0
    assert second.ledger.load()["cached_blocks"] == 5
    slow.may.set()


async def test_only_blocks_that_were_never_used_are_taken(tmp_path: Path) -> None:
    first = Life()
    async with first.served(tmp_path):
        first.prompt(tokens(1, 8))
        first.prompt(tokens(1, 8))
    second = Life(num_blocks=10)
    second.prompt(tokens(100, 6))
    async with second.served(tmp_path) as service:
        await restored(service, 4)
        assert second.ledger.load()["free_blocks"] == 0
        # What stood from before is not given up for it.
        assert second.prompt(tokens(100, 6)) == 6
        assert second.prompt(tokens(1, 4)) == 4
    assert any("4 of 8 blocks" in line and "no room for more" in line for line in second.log), second.log


async def test_what_is_larger_than_its_share_keeps_the_most_used(tmp_path: Path) -> None:
    first = Life()
    async with first.served(tmp_path, size_bytes=4 * 3 * (LAYOUT.block_bytes + 100)) as service:
        for _ in range(2):
            first.prompt(tokens(1, 8))
        for _ in range(5):
            first.prompt(tokens(101, 2))
        path = service.path
    file = SnapshotFile(path, CodecRegistry())
    kept = [entry.key for section in file.sections for entry in section.blocks]
    file.close()
    assert kept == [first.chain(tokens(1, 8))[0], *first.chain(tokens(101, 2)).part(0, 2)]


async def test_step_times_are_known_at_once(tmp_path: Path) -> None:
    first, second = Life(), Life()
    for _ in range(WARM_UP_STEPS + 2 * REFIT_STEPS):
        first.latency.observe(StepWork(100, 5050.0, 1), 0.02)
    async with first.served(tmp_path):
        first.prompt(tokens(1, 2))
    async with second.served(tmp_path) as service:
        async with asyncio.timeout(PATIENCE_S):
            await service.restored()
    assert second.latency.fit().num_prefill_steps > 0
    assert second.latency.reading_s(tokens=100, num_computed=0, max_tokens=512) == pytest.approx(0.02, rel=0.1)


async def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    life = Life()
    async with life.served(tmp_path / "file" / "below"):
        life.prompt(tokens(1, 2))
        life.prompt(tokens(1, 2))
    assert any("no snapshot is written" in line for line in life.log), life.log


async def test_a_long_life_is_written_before_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_INTERVAL_S", 0.01)
    life = Life()
    async with life.served(tmp_path) as service:
        life.prompt(tokens(1, 2))
        life.prompt(tokens(1, 2))
        await said(life, "a snapshot of 2 blocks is written")
        before = service.path.stat().st_mtime_ns
        # The same blocks again are no news; others are.
        life.prompt(tokens(1, 2))
        life.prompt(tokens(50, 3))
        life.prompt(tokens(50, 3))
        await said(life, "a snapshot of 5 blocks is written")
        assert service.path.stat().st_mtime_ns > before
    assert len(life.log) == 2, life.log


async def test_a_worker_that_fails_writes_nothing(tmp_path: Path) -> None:
    life = Life()

    async def fails() -> None:
        async with life.served(tmp_path):
            life.prompt(tokens(1, 2))
            life.prompt(tokens(1, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fails()
    assert os.listdir(tmp_path) == []


async def test_step_times_are_kept_without_a_prefix_cache(tmp_path: Path) -> None:
    life = Life(prefix_cache=False)
    async with life.served(tmp_path) as service:
        life.prefixes.note_used(life.chain(tokens(1, 3)), 0)
        path = service.path
    file = SnapshotFile(path, CodecRegistry())
    assert [section.kind for section in file.sections] == ["steps"]
    file.close()
