"""The shell around a lease machine: what its callbacks and its own bugs may do to it, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from contracts.errors import InvariantBroken
from kvtransfer.shell import MachineShell
from simulator import Program, VirtualClock, run

Notice = Callable[[], None]


@dataclass
class Echo:
    """A machine whose events are callbacks and whose instructions are the same; None is a tick, "bug" a bug."""

    idle: bool = True
    seen: list[object] = field(default_factory=list[object])

    def handle(self, event: object, now_s: float) -> list[object]:
        self.seen.append(event)
        if event == "bug":
            raise InvariantBroken("state that cannot be")
        return cast("list[object]", event) if isinstance(event, list) else []

    def next_due_s(self) -> float | None:
        return None


def nothing() -> None:
    pass


def echo_shell(stop: Notice = nothing) -> MachineShell[object, object]:
    shell: MachineShell[object, object]

    def perform(instruction: object) -> None:
        shell.notify(cast("Notice", instruction))

    shell = MachineShell(Echo(), clock=VirtualClock(), perform=perform, tick=None, stop=stop, close_grace_s=1.0)
    return shell


def fail() -> None:
    raise ZeroDivisionError("a callback's bug")


async def live(shell: MachineShell[object, object], body: Callable[[], None]) -> None:
    async with shell:
        body()
        await asyncio.sleep(60)
        raise AssertionError("a broken service cancels its body")


def test_a_callback_that_raises_ends_the_service_and_the_others_run_all_the_same() -> None:
    ran: list[str] = []

    async def main(program: Program) -> None:
        shell = echo_shell()

        def body() -> None:
            shell.feed([lambda: ran.append("before"), fail, lambda: ran.append("behind")])
            ran.append("the feeder goes on")

        with pytest.raises(ExceptionGroup) as caught:
            await live(shell, body)
        assert caught.group_contains(ZeroDivisionError)

    run(main, seed=1)
    assert ran == ["before", "behind", "the feeder goes on"]


def test_a_callback_may_feed_again_and_runs_outside_of_the_machine() -> None:
    ran: list[str] = []

    async def main(program: Program) -> None:
        shell = echo_shell()
        async with shell:

            def again() -> None:
                shell.feed([lambda: ran.append("inner")])
                ran.append("outer")

            shell.feed([again, lambda: ran.append("last")])

    run(main, seed=1)
    assert ran == ["outer", "last", "inner"]


def test_state_that_cannot_be_ends_the_service_whoever_fed() -> None:
    """An rpc handler that fed the event answers with the error; that alone would let the worker go on to lie."""

    async def main(program: Program) -> None:
        shell = echo_shell()

        def body() -> None:
            with pytest.raises(InvariantBroken):
                shell.feed("bug")

        with pytest.raises(ExceptionGroup) as caught:
            await live(shell, body)
        assert caught.group_contains(InvariantBroken)

    run(main, seed=1)


def test_a_bug_while_leaving_is_not_lost() -> None:
    async def main(program: Program) -> None:
        shell: MachineShell[object, object]

        def stop() -> None:
            shell.feed([fail])

        shell = echo_shell(stop)
        with pytest.raises((ExceptionGroup, ZeroDivisionError)):
            async with shell:
                await asyncio.sleep(1)

    run(main, seed=1)


def test_what_is_begun_while_a_bug_ends_the_service_is_dropped_and_the_leave_goes_on() -> None:
    """Whoever leaves tells others what it lets go of: the bug stays the one that is told."""
    ran: list[str] = []

    async def work() -> None:
        ran.append("work")

    async def leaves(shell: MachineShell[object, object]) -> None:
        async with shell:
            with pytest.raises(InvariantBroken):
                shell.feed("bug")
            try:
                await asyncio.sleep(60)
            finally:
                shell.spawn(work(), "a farewell")
                ran.append("left")

    async def main(program: Program) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await leaves(echo_shell())
        assert caught.group_contains(InvariantBroken)
        assert not caught.group_contains(RuntimeError)

    run(main, seed=1)
    assert ran == ["left"]
