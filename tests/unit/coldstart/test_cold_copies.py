"""A node agent's copies gone cold: compressed by the real codec, decoded for who asks, and never other weights."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import mmap
import os
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from coldstart import weight_cache
from coldstart.codec_trial import try_codec
from coldstart.codecs.registry import BEST
from coldstart.cold_copies import ColdCopies, RawMemory, Trial
from coldstart.compressed import CompressedLoader, Compression, RawCopy, overhead_bytes
from coldstart.compressing import CompressRules, bound_bytes
from coldstart.handing import ask
from coldstart.residence import CopyState, WeightsKey
from coldstart.weight_cache import Filled, LoadPoint, WeightCache
from contracts.errors import LoadError
from rpc import LiveClock
from tests.unit.coldstart.test_compressed import CHUNK, NUM_BYTES, stored

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

PATIENCE_S = 20.0
#: Of weights and index of one model, a little more.
MODEL_BYTES = NUM_BYTES + 4096
MODELS = {name: stored(seed=number) for number, name in enumerate(("one", "two", "three"))}


def key(name: str) -> WeightsKey:
    return WeightsKey(folder=name, dtype="auto")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - the cache tells nobody but its clients
            await asyncio.sleep(0.01)


class TestLoad:
    """From a slow tier, or from the compressed form by the real decoder."""

    __test__ = False
    point = LoadPoint()

    def __init__(self, site: Site, key: WeightsKey, descriptor: int, compressed: int | None) -> None:
        self.site, self.key, self.descriptor, self.compressed = site, key, descriptor, compressed

    async def sized(self) -> int:
        model = MODELS[self.key.folder]
        return len(model.weights) + len(model.index)

    async def filled(self) -> Filled:
        model = MODELS[self.key.folder]
        if self.compressed is None:
            await asyncio.sleep(self.site.tier_s)
            data, loaded_from = model.weights + model.index, "ssd"
        else:
            if self.site.decoder_dies:
                raise LoadError("its loader ended early: it was ended by SIGKILL")
            data, loaded_from = await asyncio.to_thread(self._decoded), "compressed"
        assert os.pwrite(self.descriptor, data, 0) == len(data)
        return Filled(
            num_bytes=len(model.weights), index_bytes=len(model.index), tier=loaded_from, next_tier=loaded_from
        )

    def _decoded(self) -> bytes:
        assert self.compressed is not None
        form = mmap.mmap(self.compressed, 0, prot=mmap.PROT_READ)
        with CompressedLoader(self.key, form, num_threads=2, progress=self._note) as loader:
            memory = mmap.mmap(-1, loader.prepare())
            assert loader.fill(memoryview(memory)).tier == "compressed"
        return memory[:]

    def _note(self, what: str, done_bytes: int, total_bytes: int) -> None:
        assert (what, total_bytes) == ("weights", NUM_BYTES)
        assert 0 < done_bytes <= total_bytes

    async def abort(self) -> None:
        self.site.num_ended += 1


class TestCompressing:
    """The real codec, in threads."""

    __test__ = False

    def __init__(self, site: Site, key: WeightsKey, memory: RawMemory, descriptor: int) -> None:
        self.site, self.key, self.descriptor = site, key, descriptor
        raw = mmap.mmap(memory.descriptor, 0, prot=mmap.PROT_READ)
        self.source = RawCopy(raw, memory.weight_bytes, memory.index_bytes, rank=0, name=key.folder)
        self.bound_bytes = 0

    async def tried(self) -> Trial:
        await self.site.may_try.wait()
        rates = try_codec(self.source, BEST, num_threads=2, now_s=LiveClock().now_s)
        beside = overhead_bytes(self.source.num_chunks, len(self.source.index_data))
        self.bound_bytes = bound_bytes(NUM_BYTES, beside, CHUNK, rates)
        return Trial(rates=rates, bound_bytes=self.bound_bytes)

    async def compressed(self) -> int:
        await self.site.may_compress.wait()
        if self.site.compressor_dies:
            raise LoadError("its compressor ended early: it was ended by SIGKILL")
        memory = bytearray(self.bound_bytes)
        count = await asyncio.to_thread(Compression(self.source, memory, BEST, num_threads=2).run)
        if self.site.flips_a_bit:
            memory[count - CHUNK // 4] ^= 4
        assert os.pwrite(self.descriptor, memory, 0) == len(memory)
        return count

    async def abort(self) -> None:
        self.site.num_ended += 1


class Site:
    def __init__(self, budget_bytes: int, cold_after_s: float) -> None:
        self.num_begun = self.num_ended = 0
        #: Slow: decoding is a gain.
        self.tier_s = 0.6
        self.decoder_dies = self.compressor_dies = self.flips_a_bit = False
        self.may_try, self.may_compress = asyncio.Event(), asyncio.Event()
        self.may_try.set()
        self.may_compress.set()
        self.said = list[str]()
        rules = CompressRules(cold_after_s=cold_after_s)
        self.cold = ColdCopies(rules, self._compress, self.said.append)
        self.cache = WeightCache(budget_bytes, self._load, LiveClock(), self.said.append, cold=self.cold)

    def _load(self, key: WeightsKey, descriptor: int, compressed: int | None) -> TestLoad:
        self.num_begun += 1
        return TestLoad(self, key, descriptor, compressed)

    def _compress(self, key: WeightsKey, memory: RawMemory, descriptor: int) -> TestCompressing:
        self.num_begun += 1
        return TestCompressing(self, key, memory, descriptor)

    async def use(self, name: str) -> None:
        """Asks, looks at the weights, and leaves."""
        handed = await asyncio.to_thread(ask, self.cache.door, key(name), timeout_s=PATIENCE_S)
        assert bytes(handed.weights) == MODELS[name].weights
        assert handed.index == MODELS[name].index
        handed.close()
        await until(lambda: not any(copy.pins for copy in self.cache.copies()))

    def states(self) -> dict[str, CopyState]:
        return {copy.key.folder: copy.state for copy in self.cache.copies()}

    async def until_said(self, words: str, times: int = 1) -> None:
        await until(lambda: sum(words in line for line in self.said) >= times)

    def num_loads(self, tier: str) -> int:
        return sum(f"bytes in memory from {tier}" in line for line in self.said)


def memories() -> list[str]:
    """Memory of weights that this process has open."""
    links = list[str]()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return [link for link in links if "tandem-" in link and "weights" in link]


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_cache, "_LOOK_INTERVAL_S", 0.02)


@asynccontextmanager
async def site(budget_bytes: int = 5 * MODEL_BYTES // 2, cold_after_s: float = 0.05) -> AsyncGenerator[Site]:
    one = Site(budget_bytes, cold_after_s)
    before = len(memories())
    one.cache.open()
    running = asyncio.create_task(one.cache.run())
    try:
        yield one
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await one.cache.close()
        assert one.num_begun == one.num_ended, "all that was begun was seen to its end"
        # Mappings that an error's frames hold, or a thread that nobody waits for, have descriptors of their own.
        await until(lambda: gc.collect() >= 0 and len(memories()) <= before)


async def test_a_copy_gone_cold_is_compressed_and_comes_back_bit_by_bit() -> None:
    async with site() as one:
        await one.use("one")
        for times in (1, 2):
            await one.until_said("bytes compressed to", times)
            (copy,) = one.cache.copies()
            assert copy.state is CopyState.COMPRESSED
            assert copy.held_bytes < 0.7 * NUM_BYTES
            await one.use("one")
            assert one.num_loads("compressed") == times
        assert one.num_loads("ssd") == 1
        line = next(line for line in one.said if "bytes compressed to" in line)
        assert "times smaller, decoded at" in line
        assert "faster than ssd's" in line


async def test_who_asks_while_it_is_compressed_waits_for_nothing() -> None:
    async with site() as one:
        one.may_compress.clear()
        await one.use("one")
        await until(lambda: one.states() == {"one": CopyState.COMPRESSING})
        await until(lambda: one.cache.copies()[0].compressed_bytes > 0)
        handed = await asyncio.to_thread(ask, one.cache.door, key("one"), timeout_s=PATIENCE_S)
        assert one.states() == {"one": CopyState.RESIDENT}
        assert one.cache.copies()[0].compressed_bytes == 0
        assert len(one.said) == 2, "one load, and why it was not compressed"
        handed.close()
        del handed


@pytest.mark.parametrize("trouble", ["decoder_dies", "flips_a_bit"])
async def test_what_cannot_be_decoded_is_read_from_the_next_tier(trouble: str) -> None:
    async with site() as one:
        setattr(one, trouble, True)
        await one.use("one")
        await one.until_said("bytes compressed to")
        await one.use("one")
        assert (one.num_loads("ssd"), one.num_loads("compressed")) == (2, 0)
        why = "SIGKILL" if trouble == "decoder_dies" else "does not have its checksum, read twice; it holds embedding"
        assert any(why in line and "compressed weights of one leave memory" in line for line in one.said)


async def test_a_compressor_that_dies_costs_nothing_and_is_not_started_again_and_again() -> None:
    async with site() as one:
        one.compressor_dies = True
        await one.use("one")
        await one.until_said("weights of one are not compressed: its compressor ended early")
        begun = one.num_begun
        await asyncio.sleep(0.2)
        assert one.num_begun == begun
        assert one.states() == {"one": CopyState.RESIDENT}
        one.compressor_dies = False
        await one.use("one")
        assert one.num_loads("ssd") == 1
        await one.until_said("bytes compressed to")


async def test_memory_of_compressed_copies_serves_others() -> None:
    # Two of them whole and one compressed have room; without compressing it would be two.
    async with site(budget_bytes=29 * MODEL_BYTES // 10) as one:
        await one.use("one")
        await one.until_said("weights of one: ")
        await until(lambda: one.states()["one"] is CopyState.COMPRESSED)
        await one.use("two")
        await until(lambda: one.states()["two"] is CopyState.COMPRESSED)
        await one.use("three")
        assert set(one.states()) == {"one", "two", "three"}
        assert sum(copy.held_bytes for copy in one.cache.copies()) <= one.cache.budget_bytes
        await one.use("one")
        assert one.num_loads("ssd") == 3


async def test_why_a_copy_stays_as_it_is_is_said_once() -> None:
    async with site(budget_bytes=10 * MODEL_BYTES) as one:
        await one.use("one")
        await one.until_said("weights of one are not compressed: ")
        await asyncio.sleep(0.2)
        assert [line for line in one.said if "not compressed" in line] == [
            line for line in one.said if "room for 2 more of the largest model" in line
        ][:1]
        assert one.num_begun == 1


async def test_a_tier_that_is_faster_than_decoding_is_left_to_serve() -> None:
    async with site() as one:
        one.tier_s = 0.0
        one.may_try.clear()
        await one.use("one")
        await until(lambda: one.states() == {"one": CopyState.COMPRESSING})
        # As if the disk had brought a petabyte in that time.
        for _ in range(20):
            one.cold.observe_load("ssd", 1 << 50, 1.0, 0.0)
        one.may_try.set()
        await one.until_said("not compressed: 1.5")
        assert any("no gain over ssd's" in line for line in one.said)
        await until(lambda: one.states() == {"one": CopyState.RESIDENT})
        begun = one.num_begun
        await asyncio.sleep(0.1)
        assert one.num_begun == begun, "what the trial told is remembered"


async def test_an_agent_that_ends_while_it_compresses_leaves_nothing() -> None:
    async with site() as one:
        one.may_compress.clear()
        await one.use("one")
        await until(lambda: one.states() == {"one": CopyState.COMPRESSING})
