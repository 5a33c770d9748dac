"""The pacer on a real event loop: never early, in order, and it knows its own delay."""

from __future__ import annotations

import asyncio
import time
from array import array
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from loadtest import machine
from loadtest.pacer import DELAY_INTERVAL_S, MAX_ACTIONS_AT_ONCE, DelayWatch, Pacer

if TYPE_CHECKING:
    from collections.abc import Generator


@contextmanager
def pacer() -> Generator[Pacer]:
    timer = machine.TimerFd()
    made = Pacer(timer, machine.now_s)
    try:
        yield made
    finally:
        made.close()
        timer.close()


async def test_actions_come_in_order_and_never_early() -> None:
    done: list[tuple[float, float]] = []
    ended = asyncio.Event()
    with pacer() as paced:
        start_s = machine.now_s()

        def act(due_s: float) -> None:
            done.append((due_s, machine.now_s()))
            if len(done) == 4:
                ended.set()

        for delay_s in (0.03, 0.001, 0.02, 0.0105):
            due_s = start_s + delay_s
            paced.at(due_s, partial(act, due_s))
        await ended.wait()
    assert [due_s for due_s, _ in done] == sorted(due_s for due_s, _ in done)
    assert all(at_s >= due_s for due_s, at_s in done)


async def test_what_is_long_due_does_not_keep_the_loop_from_its_other_work() -> None:
    done: list[int] = []
    reads: list[int] = []
    ended = asyncio.Event()
    total = 3 * MAX_ACTIONS_AT_ONCE
    with pacer() as paced:

        def act(number: int) -> None:
            done.append(number)
            if number == 0:
                asyncio.get_running_loop().call_soon(lambda: reads.append(len(done)))
            if number == total - 1:
                ended.set()

        for number in range(total):
            paced.at(0.0, partial(act, number))
        await ended.wait()
    assert done == list(range(total))
    assert reads[0] <= 2 * MAX_ACTIONS_AT_ONCE


async def test_what_is_due_is_done_by_a_poll_before_the_loop_comes_round() -> None:
    done: list[str] = []
    with pacer() as paced:
        paced.at(machine.now_s() - 1.0, lambda: done.append("due"))
        paced.at(machine.now_s() + 60.0, lambda: done.append("later"))
        paced.poll()
        assert done == ["due"]
        paced.poll()
        assert done == ["due"]


async def test_an_action_that_polls_does_not_do_others_out_of_turn() -> None:
    done: list[int] = []
    with pacer() as paced:

        def act(number: int) -> None:
            paced.poll()
            done.append(number)

        for number in range(3):
            paced.at(machine.now_s() - 1.0 + number / 10, partial(act, number))
        paced.poll()
    assert done == [0, 1, 2]


async def test_an_action_may_ask_for_another() -> None:
    ended = asyncio.Event()
    with pacer() as paced:
        paced.at(machine.now_s(), lambda: paced.at(machine.now_s() + 0.002, ended.set))
        await ended.wait()


async def test_a_loop_that_was_blocked_is_seen_in_the_delays_for_all_of_that_time() -> None:
    delays_s = array("d")
    with pacer() as paced:
        watch = DelayWatch(paced, machine.now_s, delays_s)
        await asyncio.sleep(3 * DELAY_INTERVAL_S)
        time.sleep(0.08)  # noqa: ASYNC251 - the very thing that is to be noticed
        await asyncio.sleep(3 * DELAY_INTERVAL_S)
        watch.stop()
        num_looks = len(delays_s)
        await asyncio.sleep(2 * DELAY_INTERVAL_S)
    assert max(delays_s) >= 0.08 - DELAY_INTERVAL_S
    assert min(delays_s) >= 0
    # The looks that it missed would have been late, too.
    assert sum(delay_s > 0.08 / 2 for delay_s in delays_s) >= 3
    assert len(delays_s) == num_looks


async def test_watches_one_after_another_do_not_add_up() -> None:
    delays_s = array("d")
    start_s = machine.now_s()
    with pacer() as paced:
        for _ in range(8):
            watch = DelayWatch(paced, machine.now_s, delays_s)
            await asyncio.sleep(2.5 * DELAY_INTERVAL_S)
            watch.stop()
    assert len(delays_s) <= (machine.now_s() - start_s) / DELAY_INTERVAL_S + 1


async def test_an_action_that_raises_does_not_keep_the_others_from_their_time() -> None:
    loop, told = asyncio.get_running_loop(), list[object]()
    loop.set_exception_handler(lambda _, context: told.append(context.get("exception")))
    ended = asyncio.Event()

    def fail() -> None:
        raise RuntimeError("by itself")

    with pacer() as paced:
        paced.at(machine.now_s(), fail)
        paced.at(machine.now_s() + 0.001, ended.set)
        async with asyncio.timeout(10):
            await ended.wait()
    assert [str(error) for error in told] == ["by itself"]
