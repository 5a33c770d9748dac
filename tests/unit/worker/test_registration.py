"""What a worker tells the coordinator with its heartbeats, and when it repeats itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

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
        self.registrations = 0
        self.fits: list[LatencyFit | None] = []

    def channel(self, address: str) -> Coordinator:
        return self

    async def call(self, method: object, body: Any, *, timeout_s: float) -> RegisterReply | HeartbeatReply:
        if method is REGISTER:
            self.registrations += 1
            self.known = True
            return RegisterReply(heartbeat_interval_s=INTERVAL_S)
        assert isinstance(body, HeartbeatRequest)
        self.fits.append(body.latency)
        if not self.answers:
            raise DeadlineExceeded("nobody answers")
        return HeartbeatReply(known=self.known)


def fit(num_steps: int) -> LatencyFit:
    return LatencyFit(0.1, 0.1, 0.1, 0.1, 0.1, 0.1, num_steps, num_steps)


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
