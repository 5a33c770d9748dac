"""What a worker tells the coordinator with its heartbeats, and when it repeats itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec

from contracts.errors import DeadlineExceeded
from contracts.ids import Incarnation, WorkerId
from contracts.messages import (
    REGISTER,
    HeartbeatReply,
    HeartbeatRequest,
    LatencyFit,
    RegisterReply,
    TransferReport,
    WorkerInfo,
    WorkerLoad,
)
from simulator import VirtualClock, run
from tests.support.roles import IDENTITY
from worker.registration import Registration

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator import Program

INFO = WorkerInfo(
    worker_id=WorkerId("p0"),
    incarnation=Incarnation(3),
    role="prefill",
    address="p0:1",
    model="m",
    identity=IDENTITY,
    total_blocks=8,
    max_context_tokens=64,
)
INTERVAL_S = 0.5


class Coordinator:
    """A network, a channel and a coordinator in one."""

    def __init__(self) -> None:
        self.known = True
        self.answers = True
        self.takes_up = True
        self.registrations = 0
        self.registered: list[WorkerInfo] = []
        self.fits: list[LatencyFit | None] = []

    def channel(self, address: str) -> Coordinator:
        return self

    async def call(self, method: object, body: Any, *, timeout_s: float) -> RegisterReply | HeartbeatReply:
        if method is REGISTER:
            if not self.takes_up:
                raise DeadlineExceeded("nobody listens")
            self.registrations += 1
            self.registered.append(body)
            self.known = True
            return RegisterReply(heartbeat_interval_s=INTERVAL_S)
        assert isinstance(body, HeartbeatRequest)
        self.fits.append(body.latency)
        if not self.answers:
            raise DeadlineExceeded("nobody answers")
        return HeartbeatReply(known=self.known)


def fit(num_steps: int) -> LatencyFit:
    return LatencyFit(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, num_steps, num_steps)


def registration_with(
    coordinator: Coordinator, lines: list[str], *, on_registered: Callable[[WorkerInfo], None] = lambda info: None
) -> Registration:
    """`on_registered` hears with what this life was taken up anew."""
    return Registration(
        info=INFO,
        network=cast("Any", coordinator),
        coordinator_address="c:1",
        clock=VirtualClock(),
        load=WorkerLoad,
        transfers=TransferReport,
        latency=lambda: fit(1),
        on_gone=lambda life: None,
        on_registered_anew=lambda: on_registered(coordinator.registered[-1]),
        log=lines.append,
    )


def test_an_outage_is_said_once_when_it_begins_and_once_when_it_ends() -> None:
    async def main(program: Program) -> None:
        coordinator, lines = Coordinator(), list[str]()
        keeping = asyncio.create_task(registration_with(coordinator, lines).keep())
        await asyncio.sleep(INTERVAL_S / 2)

        async def outage(num_beats: int) -> list[str]:
            lines.clear()
            coordinator.answers = False
            await asyncio.sleep(num_beats * INTERVAL_S)
            assert lines == ["WARNING: the coordinator at c:1 does not answer: nobody answers"]
            coordinator.answers = True
            await asyncio.sleep(4 * INTERVAL_S)
            return lines[1:]

        assert await outage(60) == ["the coordinator at c:1 answers again after 30.0 s and 60 failed calls"]
        # The next one is said anew, and counted from its own beginning.
        assert await outage(1) == ["the coordinator at c:1 answers again after 0.5 s and 1 failed call"]
        keeping.cancel()
        await asyncio.wait([keeping])

    run(main, seed=0)


def test_a_coordinator_that_is_not_there_at_the_start_is_said_once_too() -> None:
    async def main(program: Program) -> None:
        coordinator, lines = Coordinator(), list[str]()
        coordinator.takes_up = False
        registration = registration_with(coordinator, lines)
        keeping = asyncio.create_task(registration.keep())
        await asyncio.sleep(4.8 * INTERVAL_S)
        assert lines == ["WARNING: the coordinator at c:1 does not answer: nobody listens"]
        coordinator.takes_up = True
        await registration.registered.wait()
        await asyncio.sleep(0)
        assert lines[1:] == ["the coordinator at c:1 answers again after 2.5 s and 5 failed calls"]
        keeping.cancel()
        await asyncio.wait([keeping])

    run(main, seed=0)


def test_what_changes_is_told_at_once_and_another_role_is_registered_with() -> None:
    async def main(program: Program) -> None:
        coordinator, registered = Coordinator(), list[WorkerInfo]()
        registration = registration_with(coordinator, [], on_registered=registered.append)
        keeping = asyncio.create_task(registration.keep())
        await asyncio.sleep(INTERVAL_S / 4)
        assert (coordinator.registrations, len(coordinator.fits)) == (1, 0)
        registration.tell_soon()
        await asyncio.sleep(INTERVAL_S / 4)
        assert len(coordinator.fits) == 1
        flipped = msgspec.structs.replace(INFO, role="decode")
        registration.changed(flipped)
        await asyncio.sleep(INTERVAL_S / 4)
        assert coordinator.registered == [INFO, flipped]
        assert len(coordinator.fits) == 2, "its load is told with the role"
        assert registered == [flipped], "what it holds is asked for anew"
        coordinator.answers = False
        registration.tell_soon()
        await asyncio.sleep(4 * INTERVAL_S)
        assert len(coordinator.fits) <= 2 + 5, "failures are not repeated at once"
        keeping.cancel()
        await asyncio.wait([keeping])

    run(main, seed=0)


def test_what_steps_take_is_told_when_it_changes_and_to_whoever_does_not_know_it() -> None:
    async def main(program: Program) -> None:
        coordinator = Coordinator()
        current = fit(1)
        registration = Registration(
            info=INFO,
            network=cast("Any", coordinator),
            coordinator_address="c:1",
            clock=VirtualClock(),
            load=WorkerLoad,
            transfers=TransferReport,
            latency=lambda: current,
            on_gone=lambda life: None,
            on_registered_anew=lambda: None,
            log=lambda line: None,
        )
        keeping = asyncio.create_task(registration.keep())

        # Registered at 0; from here on each look falls between two heartbeats.
        await asyncio.sleep(INTERVAL_S / 2)

        async def beats(count: int) -> list[LatencyFit | None]:
            coordinator.fits.clear()
            await asyncio.sleep(count * INTERVAL_S)
            return list(coordinator.fits)

        assert await beats(3) == [fit(1), None, None]
        current = fit(2)
        assert await beats(2) == [fit(2), None]
        coordinator.answers = False
        current = fit(3)
        assert await beats(2) == [fit(3), fit(3)], "said again until it was heard"
        coordinator.answers = True
        assert await beats(2) == [fit(3), None]
        coordinator.known = False
        assert await beats(1) == [None]
        await asyncio.sleep(INTERVAL_S)
        assert coordinator.registrations == 2
        assert await beats(2) == [fit(3), None], "a new coordinator knows nothing"
        keeping.cancel()
        await asyncio.wait([keeping])

    run(main, seed=0)
