"""A part that a bug ends begins anew, and nobody else hears of it."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from cluster.kept import cause_of, kept
from simulator import Program, VirtualClock, run

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


class Part:
    """Lives until its test ends it, in a task group as services do."""

    def __init__(self) -> None:
        self.lives = 0
        self.num_left = 0
        self.failing_starts = set[int]()
        self.bug = asyncio.Event()
        self.said = list[str]()
        self.down, self.up = list[str](), list[int]()

    @asynccontextmanager
    async def made(self) -> AsyncGenerator[int]:
        self.lives += 1
        if self.lives in self.failing_starts:
            raise ValueError("no start")
        self.bug = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as group:
                serving = group.create_task(self._serve(self.bug))
                yield self.lives
                serving.cancel()
        finally:
            self.num_left += 1

    async def _serve(self, bug: asyncio.Event) -> None:
        await bug.wait()
        raise KeyError("a bug")


def test_it_begins_anew_and_is_told() -> None:
    async def main(program: Program) -> None:
        part = Part()
        part.failing_starts = {2}
        clock = VirtualClock()
        async with kept(
            "night", part.made, clock, part.said.append, on_down=part.down.append, on_up=part.up.append
        ) as first:
            assert first == 1
            part.bug.set()
            await asyncio.sleep(0.5)
            assert part.down == ["night has failed: KeyError('a bug')"]
            assert part.said[-1] == "night has failed: KeyError('a bug'); it begins anew in 1 s"
            assert "Traceback" in part.said[0]
            await asyncio.sleep(1.0)
            # The second did not start: the third comes after twice the time.
            assert part.down[1:] == ["night has failed: ValueError('no start')"]
            assert part.up == []
            await asyncio.sleep(2.0)
            assert part.up == [3]
            assert part.said[-1] == "night: goes on"
            # What lasts has earned a quick restart.
            await asyncio.sleep(100.0)
            part.bug.set()
            await asyncio.sleep(1.5)
            assert part.up == [3, 4]
        assert (part.lives, part.num_left) == (4, 3)

    run(main, seed=1)


def test_a_first_start_that_fails_is_whoever_begun_its_to_know() -> None:
    async def main(program: Program) -> None:
        part = Part()
        part.failing_starts = {1}
        with pytest.raises(ValueError, match="no start"):
            async with kept("night", part.made, VirtualClock(), part.said.append):
                raise AssertionError("never entered")
        assert part.lives == 1

    run(main, seed=1)


def test_who_leaves_while_it_is_down_does_not_wait_for_it() -> None:
    async def main(program: Program) -> None:
        part = Part()
        async with kept("night", part.made, VirtualClock(), part.said.append, on_down=part.down.append):
            part.bug.set()
            await asyncio.sleep(0.1)
            began_s = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() == began_s
        assert part.lives == 1

    run(main, seed=1)


def test_the_error_of_who_uses_it_is_its_own() -> None:
    async def main(program: Program) -> None:
        part = Part()
        with pytest.raises(RuntimeError, match="mine"):
            async with kept("night", part.made, VirtualClock(), part.said.append):
                raise RuntimeError("mine")
        assert (part.lives, part.num_left, part.said) == (1, 1, [])

    run(main, seed=1)


async def test_a_consequence_is_not_named_as_the_cause() -> None:
    async def bug() -> None:
        raise ZeroDivisionError("a bug")

    async def late(inner: asyncio.TaskGroup) -> None:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        lost = asyncio.sleep(0)
        try:
            inner.create_task(lost)
        finally:
            lost.close()

    async def both() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(late(group))
            group.create_task(bug())

    with pytest.raises(ExceptionGroup) as raised:
        await both()
    assert isinstance(cause_of(raised.value), ZeroDivisionError)
    backwards = ExceptionGroup("", [*reversed(raised.value.exceptions)])
    assert isinstance(cause_of(backwards), ZeroDivisionError)
    assert isinstance(cause_of(ValueError("alone")), ValueError)
