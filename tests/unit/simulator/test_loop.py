"""The virtual loop: time that jumps, programs that repeat, and programs that cannot go on."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import threading
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from simulator import LimitReached, SimulationError, StuckProgram, ThreadsRefused, VirtualClock, run
from simulator.loop import HOST, VirtualLoop

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from simulator import Program

T = TypeVar("T")


def play(main: Coroutine[Any, Any, T], **limits: float) -> T:
    async def program(program: Program) -> T:
        return await main

    return run(program, seed=0, limit_s=limits.get("limit_s", 10_000), limit_turns=10_000_000)


def test_ten_minutes_of_sleeps_pass_on_virtual_time() -> None:
    async def main() -> tuple[float, int]:
        loop = asyncio.get_running_loop()

        async def tick(period_s: float) -> int:
            ticks = 0
            while loop.time() < 600:
                await asyncio.sleep(period_s)
                ticks += 1
            return ticks

        ticks = await asyncio.gather(tick(1.0), tick(0.5), tick(60.0))
        return loop.time(), sum(ticks)

    assert play(main()) == (600.0, 600 + 1200 + 10)


def test_timeouts_queues_and_groups_run_unchanged() -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        said: list[str] = []

        async def produce() -> None:
            for number in range(2):
                await asyncio.sleep(10)
                await queue.put(number)

        async def consume() -> None:
            while True:
                try:
                    async with asyncio.timeout(12.5 if not said else 7.5):
                        said.append(f"{await queue.get()} at {loop.time():g}")
                except TimeoutError:
                    said.append(f"nothing by {loop.time():g}")
                    return

        async with asyncio.TaskGroup() as group:
            group.create_task(produce())
            group.create_task(consume())
        return said

    assert play(main()) == ["0 at 10", "nothing by 17.5"]


def test_a_clock_shows_virtual_time_with_its_hosts_offset() -> None:
    async def main() -> tuple[float, float, float]:
        here, there = VirtualClock(), VirtualClock(offset_s=1000.0, wall_offset_s=-5.0)
        await here.sleep(2.5)
        return here.now_s(), there.now_s(), here.wall_s() - there.wall_s()

    assert play(main()) == (2.5, 1002.5, 5.0)


def test_sets_of_tasks_iterate_in_order_of_creation() -> None:
    async def main() -> list[int]:
        cancelled: list[int] = []

        async def wait(number: int) -> None:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                cancelled.append(number)
                raise

        tasks = {asyncio.get_running_loop().create_task(wait(number)) for number in range(3)}
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        return cancelled

    assert play(main()) == [0, 1, 2]


def test_sets_of_futures_iterate_in_the_order_of_being_put_into_sets() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        kept = [loop.create_future() for _ in range(100)]
        numbers = {future: number for number, future in enumerate(kept)}
        return [numbers[future] for future in set(kept)]

    assert play(main()) == play(main()) == list(range(100))


def test_timers_of_one_instant_run_in_the_order_they_were_set() -> None:
    async def main() -> list[int]:
        loop = asyncio.get_running_loop()
        ran: list[int] = []
        timers = [loop.call_at(10.0 - number % 3, ran.append, number) for number in range(900)]
        # Enough to have the cancelled ones thrown out, and not only skipped.
        for number, timer in enumerate(timers):
            if number % 4:
                timer.cancel()
                timer.cancel()
        await asyncio.sleep(20)
        return ran

    assert play(main()) == sorted(range(0, 900, 4), key=lambda number: (-(number % 3), number))


def test_what_a_frozen_host_has_to_do_waits_in_order() -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        said: list[str] = []
        here = contextvars.copy_context()
        here.run(HOST.set, "here")
        loop.freeze("here")
        late = loop.call_at(3.0, said.append, "late", context=here)
        loop.call_at(2.0, said.append, "on time", context=here)
        loop.call_soon(said.append, "at once", context=here)
        loop.call_at(1.0, said.append, "elsewhere")
        await asyncio.sleep(5)
        assert said == ["elsewhere"]
        late.cancel()
        loop.thaw("here")
        await asyncio.sleep(0)
        return said

    assert play(main()) == ["elsewhere", "at once", "on time"]


async def wait_for_godot(event: asyncio.Event) -> None:
    await event.wait()


def test_a_stuck_program_says_where_each_task_waits() -> None:
    async def main() -> None:
        event = asyncio.Event()
        async with asyncio.TaskGroup() as group:
            group.create_task(wait_for_godot(event), name="estragon")
            group.create_task(wait_for_godot(event), name="vladimir")

    with pytest.raises(StuckProgram) as caught:
        play(main())
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("nothing is ready and nothing is scheduled, at 0.000000 s")
    assert "main" in lines[1]
    assert "TaskGroup.__aexit__" in lines[1]
    for line, name in zip(lines[2:], ["estragon", "vladimir"], strict=True):
        assert line.startswith(f"  {name} waits in wait_for_godot ({__file__}:")
        assert "> Event.wait (" in line


def test_the_report_looks_into_async_generators() -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        yield 1
        await asyncio.Event().wait()
        yield 2

    async def main() -> None:
        async for _ in numbers():
            pass

    with pytest.raises(StuckProgram, match=r"main \(.*test_loop\.py:\d+\)"):
        play(main())


def test_a_stuck_program_still_cleans_up() -> None:
    closed: list[float] = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            closed.append(asyncio.get_running_loop().time())

    with pytest.raises(StuckProgram):
        play(main())
    assert closed == [1.0]


async def sleep_for_ever(period_s: float) -> None:
    for _ in itertools.count():
        await asyncio.sleep(period_s)


def test_virtual_time_has_a_limit() -> None:
    with pytest.raises(LimitReached, match="past its limit of 30 virtual seconds"):
        play(sleep_for_ever(1), limit_s=30)


def test_a_program_that_spins_at_one_instant_ends() -> None:
    with pytest.raises(LimitReached, match=r"the program spins: 200000 turns[\s\S]*sleep_for_ever \("):
        play(sleep_for_ever(0))


def test_turns_have_a_limit() -> None:
    async def main(program: Program) -> None:
        await sleep_for_ever(1e-6)

    with pytest.raises(LimitReached, match="more than 5000 turns"):
        run(main, seed=0, limit_turns=5000)


def test_no_thread_may_be_asked_for() -> None:
    async def main() -> None:
        await asyncio.to_thread(print)

    with pytest.raises(ThreadsRefused, match="was to run in a thread"):
        play(main())


def test_no_thread_may_call_in() -> None:
    refusals: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def call_in() -> None:
            try:
                loop.call_soon_threadsafe(print)
            except ThreadsRefused as error:
                refusals.append(str(error))

        thread = threading.Thread(target=call_in, name="outsider")
        thread.start()
        thread.join()

    play(main())
    assert refusals == ["thread 'outsider' calls into a loop on virtual time"]


def test_a_failure_nobody_hears_of_fails_the_run() -> None:
    async def fail() -> None:
        raise ValueError("unheard")

    async def main() -> None:
        task = asyncio.get_running_loop().create_task(fail())
        await asyncio.sleep(1)
        del task

    with pytest.raises(SimulationError, match=r"seed 0: nobody heard[\s\S]*ValueError\('unheard'\)"):
        play(main())


def test_an_error_of_the_program_carries_its_seed() -> None:
    async def main(program: Program) -> None:
        await asyncio.sleep(3)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run(main, seed=42)
    assert caught.value.__notes__ == ["seed 42, at 3.000000 virtual seconds"]
