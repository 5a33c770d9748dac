"""Weights over the door: shared, sealed, pinned by the connection; and what callers at the door cannot do."""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from coldstart import residence
from coldstart.handing import Coming, HandedWeights, Wish, ask, framed
from coldstart.residence import CopyState, WeightsKey
from coldstart.weight_cache import Filled, LoadPoint, WeightCache
from contracts.errors import ConfigError, LoadError
from rpc import LiveClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

INDEX = b'{"is": "an index"}'
PATIENCE_S = 20.0
MIB = 1 << 20


def key(name: str) -> WeightsKey:
    return WeightsKey(folder=name, dtype="auto")


def content(key: WeightsKey, num_bytes: int) -> bytes:
    return (key.folder.encode() * num_bytes)[:num_bytes]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - the machine under test tells nobody but its clients
            await asyncio.sleep(0.01)


class ThreadLoad:
    """Fills memory with the folder's name, over and over. Whatever its test wants to go wrong does."""

    def __init__(self, key: WeightsKey, descriptor: int, site: Site) -> None:
        self.key, self.descriptor, self.site = key, descriptor, site

    @property
    def point(self) -> LoadPoint:
        return self.site.point

    async def sized(self) -> int:
        await self.site.may_size.wait()
        if self.key.folder == "missing":
            raise ConfigError("missing: no such folder")
        return self.site.num_bytes + len(INDEX)

    async def filled(self) -> Filled:
        await self.site.may_fill.wait()
        if self.key.folder == "broken":
            raise LoadError("broken: chunk 3 is damaged")
        data = content(self.key, self.site.num_bytes) + INDEX
        assert os.pwrite(self.descriptor, data, 0) == len(data)
        self.site.num_filled += 1
        return Filled(num_bytes=self.site.num_bytes, index_bytes=len(INDEX), tier="ssd", next_tier="ssd")

    async def abort(self) -> None:
        self.site.num_ended += 1


class Site:
    def __init__(self, budget_bytes: int, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_begun = self.num_filled = self.num_ended = 0
        self.may_size, self.may_fill = asyncio.Event(), asyncio.Event()
        self.may_size.set()
        self.may_fill.set()
        self.said = list[str]()
        self.point = LoadPoint()
        self.cache = WeightCache(budget_bytes, self._start, LiveClock(), self.said.append)

    def _start(self, key: WeightsKey, descriptor: int, compressed: int | None) -> ThreadLoad:
        self.num_begun += 1
        return ThreadLoad(key, descriptor, self)

    async def ask(self, name: str, timeout_s: float = PATIENCE_S) -> HandedWeights:
        return await asyncio.to_thread(ask, self.cache.door, key(name), timeout_s=timeout_s)

    async def until_pinned(self, name: str, num_pins: int) -> None:
        await until(lambda: sum(len(copy.pins) for copy in self.cache.copies() if copy.key.folder == name) == num_pins)

    async def until_waiting(self, num_waiting: int) -> None:
        await until(lambda: sum(len(copy.waiting) for copy in self.cache.copies()) == num_waiting)


@asynccontextmanager
async def site(budget_bytes: int = 8 * MIB, num_bytes: int = MIB) -> AsyncGenerator[Site]:
    one = Site(budget_bytes, num_bytes)
    one.cache.open()
    running = asyncio.create_task(one.cache.run())
    try:
        yield one
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await one.cache.close()
        assert one.num_begun == one.num_ended, "every load was seen to its end"


async def test_workers_that_ask_at_once_share_one_load_and_one_memory() -> None:
    async with site() as one:
        handed = await asyncio.gather(*(one.ask("model") for _ in range(5)))
        assert one.num_begun == 1
        for each in handed:
            assert bytes(each.weights) == content(key("model"), MIB)
            assert each.index == INDEX
        await one.until_pinned("model", 5)
        for each in handed:
            each.close()
        await one.until_pinned("model", 0)
        again = await one.ask("model")
        assert one.num_begun == 1
        again.close()


async def test_who_waits_hears_how_far_the_load_is_and_what_comes_before_it() -> None:
    async with site() as one:
        one.may_fill.clear()
        heard = dict[str, list[Coming]](first=[], second=[])

        def asking(name: str) -> asyncio.Task[HandedWeights]:
            door = one.cache.door

            def progress(coming: Coming) -> bool:
                heard[name].append(coming)
                return True

            work = asyncio.to_thread(ask, door, key(name), timeout_s=PATIENCE_S, progress=progress)
            return asyncio.create_task(work)

        first = asking("first")
        await one.until_waiting(1)
        second = asking("second")
        await one.until_waiting(2)
        one.point = LoadPoint("conversion: written", 0.25)
        await until(lambda: bool(heard["first"] and heard["second"]))
        one.point = LoadPoint("weights", 0.5)
        await until(lambda: len(heard["first"]) > 1 and len(heard["second"]) > 1)
        assert heard["first"] == [
            Coming(num_ahead=0, what="conversion: written", fraction=0.25),
            Coming(num_ahead=0, what="weights", fraction=0.5),
        ]
        assert heard["second"][-1] == Coming(num_ahead=1, what="weights", fraction=0.5)
        one.may_fill.set()
        for handed in await asyncio.gather(first, second):
            handed.close()


async def test_who_hears_of_progress_may_give_up() -> None:
    async with site() as one:
        one.may_fill.clear()
        work = asyncio.to_thread(
            ask,
            one.cache.door,
            key("model"),
            timeout_s=PATIENCE_S,
            progress=lambda coming: (coming.fraction or 0) < 0.9,
        )
        asking = asyncio.create_task(work)
        while not asking.done():
            one.point = LoadPoint("weights", ((one.point.fraction or 0.0) + 1) / 2)
            await asyncio.sleep(0.2)
        with pytest.raises(LoadError, match="model: not waited for any longer"):
            await asking
        one.may_fill.set()


async def test_a_load_that_gets_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than somebody waits for one that does not."""
    monkeypatch.setattr(residence, "PATIENCE_S", 2.5)
    async with site() as one:
        one.may_fill.clear()
        slow = asyncio.create_task(one.ask("slow"))
        for step in range(8):
            one.point = LoadPoint("weights", step / 8)
            await asyncio.sleep(0.5)
        assert not slow.done()
        # From here on it stands still.
        with pytest.raises(LoadError, match="slow: no load got on for 2 s"):
            await slow
        one.may_fill.set()


async def test_nobody_can_write_to_what_was_handed_out() -> None:
    async with site() as one:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect("\0" + one.cache.door.socket_name)
        connection.send(framed(Wish(secret=one.cache.door.secret, key=key("model"))))
        _, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, connection, 4096, 4)
        (descriptor,) = descriptors
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, MIB)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(descriptor, b"x", 0)
        with pytest.raises(PermissionError):
            os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_TRUNC)
        writable = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(writable, b"x", 0)
        for each in (descriptor, writable):
            os.close(each)
        connection.close()


@pytest.mark.parametrize("name", ["missing", "broken"])
async def test_a_load_that_fails_is_told_to_all_who_wait_and_tried_again_for_the_next(name: str) -> None:
    async with site() as one:
        one.may_size.clear()
        asking = [asyncio.create_task(one.ask(name)) for _ in range(3)]
        await one.until_waiting(3)
        one.may_size.set()
        for each in await asyncio.gather(*asking, return_exceptions=True):
            assert isinstance(each, LoadError)
            assert f"{name}: " in each.message
        assert one.num_begun == 1
        with pytest.raises(LoadError):
            await one.ask(name)
        assert one.num_begun == 2
        assert one.cache.copies() == ()


async def test_what_is_in_use_stays_and_what_does_not_fit_beside_it_is_refused() -> None:
    async with site(budget_bytes=2 * MIB + 100) as one:
        first, second = await one.ask("first"), await one.ask("second")
        with pytest.raises(LoadError, match="do not fit"):
            await one.ask("third")
        first.close()
        await one.until_pinned("first", 0)
        third = await one.ask("third")
        assert bytes(second.weights) == content(key("second"), MIB)
        assert {copy.key.folder for copy in one.cache.copies()} == {"second", "third"}
        assert any("first leave memory" in line for line in one.said)
        for each in (second, third):
            each.close()


async def test_who_goes_while_it_waits_is_forgotten_and_the_load_goes_on() -> None:
    async with site() as one:
        one.may_fill.clear()
        with pytest.raises(LoadError, match="nor said a word of them for 0 s"):
            await one.ask("model", timeout_s=0.3)
        await one.until_waiting(0)
        one.may_fill.set()
        handed = await one.ask("model")
        assert one.num_begun == 1
        handed.close()


async def test_a_stranger_at_the_door_gets_nothing() -> None:
    async with site() as one:
        handed = await one.ask("model")
        door = replace(one.cache.door, secret="0" * 64)
        with pytest.raises(LoadError, match="hung up"):
            await asyncio.to_thread(ask, door, key("model"), timeout_s=PATIENCE_S)
        for raw in (b"", b"\xff\xff\xff\xff" + b"x" * 100, struct.pack("<I", 3) + b"abc", b"GET / HTTP/1.1\r\n\r\n"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(PATIENCE_S)
            connection.connect("\0" + one.cache.door.socket_name)
            connection.send(raw)
            connection.shutdown(socket.SHUT_WR)
            assert await asyncio.to_thread(connection.recv, 1) == b""
            connection.close()
        assert {copy.state for copy in one.cache.copies()} == {CopyState.RESIDENT}
        handed.close()


async def test_a_node_agent_that_ends_in_the_middle_of_a_load_hangs_up() -> None:
    async with site() as one:
        one.may_fill.clear()
        asking = asyncio.create_task(one.ask("model"))
        await one.until_waiting(1)
    with pytest.raises(LoadError):
        await asking
    assert one.num_filled == 0


async def test_no_descriptor_for_memory_is_told_and_the_next_load_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(name: str, flags: int = 0) -> int:
        raise OSError(24, "Too many open files")

    async with site() as one:
        with monkeypatch.context() as patched:
            patched.setattr(os, "memfd_create", none_left)
            with pytest.raises(LoadError, match="Too many open files"):
                await one.ask("model")
        handed = await one.ask("model")
        assert one.num_begun == 1
        handed.close()
