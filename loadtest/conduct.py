"""One run: the same plan against one server, or against several in turns, with the client watching itself."""

from __future__ import annotations

import asyncio
import gc
import signal
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loadtest import machine
from loadtest.gauges import GaugeWatch
from loadtest.pacer import DelayWatch, Pacer
from loadtest.player import Player, RunClock
from loadtest.progress import BAR_INTERVAL_S, RunProgress

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from loadtest.gauges import GaugePoint
    from loadtest.http.client import HttpClient
    from loadtest.plan import Plan
    from loadtest.player import Bodies
    from loadtest.record import RequestRecord
    from loadtest.settings import Limits, Target
    from workload.slo import SloClass

#: Between the word to start and the first request.
START_DELAY_S = 0.05
#: How often a search looks whether anything is left to be decided.
DECIDE_INTERVAL_S = 0.1
#: Between two runs: at least, and as long as the server says that it is busy.
SETTLE_S = 0.3
MAX_SETTLE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One server, ready to be asked what the plan says."""

    target: Target
    client: HttpClient
    bodies: Bodies
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What became of the plan at one server, and how the client did meanwhile."""

    target: Target
    #: In the order in which they became due; those that never did are not here.
    records: list[RequestRecord]
    #: How late the event loop came to what was due, in seconds, every 10 ms.
    loop_delays_s: array[float]
    #: Of one core.
    client_cpu_share: float
    #: The server's own count of its requests, where it tells.
    gauges: tuple[GaugePoint, ...]
    #: Why the server's own count ends early, or is missing; None: it does not.
    no_gauges_because: str | None


class _Turn:
    """One side while the run lasts."""

    def __init__(self, side: Side, plan: Plan, pacer: Pacer, concurrency: int | None) -> None:
        self.side = side
        self.plan = plan
        self.clock = RunClock(machine.now_s)
        self.gauges = GaugeWatch(side.client, self.clock.now_s)
        self.player = Player(
            plan=plan,
            sender=side.client,
            bodies=side.bodies,
            pacer=pacer,
            clock=self.clock,
            limits=side.limits,
            concurrency=concurrency,
        )
        self.played_s = 0.0
        self.cpu_s = 0.0
        self.loop_delays_s: array[float] = array("d")


class Conductor:
    """Carries plans out, one after another, on the running event loop. Ctrl-C stops the run that is under way: what is
    on the wire is cut off, and what was measured is returned. A second Ctrl-C interrupts the program."""

    def __init__(self, *, concurrency: int | None = None) -> None:
        self._concurrency = concurrency
        #: Ctrl-C came.
        self.was_stopped = False
        self._players: list[Player] = []

    async def play(
        self,
        sides: Sequence[Side],
        plan: Plan,
        *,
        what: str,
        num_rounds: int = 1,
        decide: Sequence[SloClass] | None = None,
    ) -> tuple[Played, ...]:
        """The plan at every side, part after part, and within a round one side after the other: A B, B A, A B ...

        `decide` gives the SLO classes of a search for goodput: once everything was sent, requests that have missed
        their TTFT target already are not waited for.
        """
        timer, watch_timer = machine.TimerFd(), machine.TimerFd()
        pacer, watch_pacer = Pacer(timer, machine.now_s), Pacer(watch_timer, machine.now_s)
        turns = [_Turn(side, plan, pacer, self._concurrency) for side in sides]
        self._players = [turn.player for turn in turns]
        for side in sides:
            side.client.after_read = pacer.poll
        try:
            with self._interruptible(), _without_garbage_collection():
                for number, items in enumerate(plan.rounds(num_rounds)):
                    for turn in turns if number % 2 == 0 else reversed(turns):
                        told = (
                            what if len(sides) == 1 else f"{turn.side.target.name}, part {number + 1} of {num_rounds}"
                        )
                        await self._part(turn, number, items, watch_pacer, told, decide)
        finally:
            for each in (pacer, watch_pacer):
                each.close()
            for fd in (timer, watch_timer):
                fd.close()
        return tuple(self._played(turn) for turn in turns)

    async def _part(
        self, turn: _Turn, number: int, items: range, watch_pacer: Pacer, what: str, decide: Sequence[SloClass] | None
    ) -> None:
        if self.was_stopped:
            return
        start_s, cpu_s = turn.played_s, machine.cpu_s()
        turn.clock.start_at(start_s, in_s=START_DELAY_S)
        delay = DelayWatch(watch_pacer, machine.now_s, turn.loop_delays_s)
        watches = [asyncio.create_task(_show(turn.player, what, turn.plan.num_requests_of(items)))]
        watches.append(asyncio.create_task(turn.gauges.run()))
        if decide is not None:
            watches.append(asyncio.create_task(_stop_when_decided(turn, decide)))
        try:
            await turn.player.play(items, start_s=start_s, part=number)
        finally:
            delay.stop()
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
        turn.played_s = turn.clock.now_s()
        turn.cpu_s += machine.cpu_s() - cpu_s

    async def settle(self, side: Side) -> None:
        """Before another run: what the last one left at the server must not burden the next."""
        await asyncio.sleep(SETTLE_S)
        await GaugeWatch(side.client, machine.now_s).wait_until_idle(MAX_SETTLE_S)

    def _played(self, turn: _Turn) -> Played:
        return Played(
            target=turn.side.target,
            records=turn.player.records,
            loop_delays_s=turn.loop_delays_s,
            client_cpu_share=turn.cpu_s / turn.played_s if turn.played_s > 0 else 0.0,
            gauges=tuple(turn.gauges.points),
            no_gauges_because=turn.gauges.stopped_because,
        )

    @contextmanager
    def _interruptible(self) -> Generator[None]:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    def _stop(self) -> None:
        self.was_stopped = True
        asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        for player in self._players:
            player.stop()


@contextmanager
def _without_garbage_collection() -> Generator[None]:
    """A collection stops everything for longer than a send may be late. Records form no cycles."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


async def _show(player: Player, what: str, num_requests: int) -> None:
    already = player.num_ended
    with RunProgress(what, num_requests, already, machine.now_s) as progress:
        while True:
            await asyncio.sleep(BAR_INTERVAL_S)
            progress.update(player)


async def _stop_when_decided(turn: _Turn, slos: Sequence[SloClass]) -> None:
    ttft_s = {slo.name: slo.ttft_ms / 1e3 for slo in slos}
    while True:
        await asyncio.sleep(DECIDE_INTERVAL_S)
        now_s = turn.clock.now_s()
        if turn.player.all_sent and all(
            not record.chunk_s and now_s - record.due_s > ttft_s[record.slo_class]
            for record in turn.player.open_records()
        ):
            turn.player.give_up_open()
            return
