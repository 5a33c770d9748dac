"""A worker's place in the cluster: registers with the coordinator, beats, hears of lives that ended, says goodbye."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from contracts.errors import StaleIncarnation, TandemError
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import DEREGISTER, HEARTBEAT, REGISTER, DeregisterRequest, HeartbeatRequest
from worker.outage_lines import OutageLines
from worker.watchdog import LifeOver

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.messages import LatencyFit, TransferReport, WorkerInfo, WorkerLife, WorkerLoad
    from rpc import Network

#: Between tries before the coordinator has said how often it wants to hear.
FIRST_INTERVAL_S = 0.5
TIMEOUT_S = 1.0

_BEAT_LATE = Failpoint("worker.heartbeat_late", "a heartbeat is late by up to two others")
#: With the time that a heartbeat may take this is well below what the coordinator calls silence.
_LONGEST_LATENESS_S = 1.0

_REGISTERED_AGAIN = RarePath("worker.registered_again", "the coordinator does not know this life any more")
_NOT_HEARD = RarePath("worker.coordinator_silent", "the coordinator did not answer")
_FENCED = RarePath("worker.fenced", "the coordinator has given this life up")


class Registration:
    """Use: `await keep()` beside the rest of the worker; `await leave(reason)` once nothing is open any more."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        network: Network,
        coordinator_address: str,
        clock: Clock,
        load: Callable[[], WorkerLoad],
        transfers: Callable[[], TransferReport],
        latency: Callable[[], LatencyFit],
        on_gone: Callable[[WorkerLife], None],
        on_registered_anew: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """`on_gone` hears of each life that the coordinator has given up, once; `latency` is told when it has changed.
        `on_registered_anew` is called whenever this life was taken up but for the first time."""
        self._info = info
        #: What the coordinator was told of this life; None: nothing that still holds.
        self._told_info: WorkerInfo | None = None
        #: Something is to be told before its time.
        self._news = asyncio.Event()
        self._network = network
        self._address = coordinator_address
        self._load = load
        self._transfers = transfers
        self._latency = latency
        #: What of it this coordinator knows; None: nothing.
        self._told_latency: LatencyFit | None = None
        self._on_gone = on_gone
        self._on_registered_anew = on_registered_anew
        self._log = log
        #: Set once the coordinator has taken this life up.
        self.registered = asyncio.Event()
        #: Ended lives that were passed on.
        self._buried: frozenset[WorkerLife] = frozenset()
        at = f"the coordinator at {coordinator_address}"
        self._outage = OutageLines(f"{at} does not answer", f"{at} answers again", clock, log)

    async def keep(self) -> None:
        """Registers, then beats; registers again whenever the coordinator does not know this life.

        Raises LifeOver when the coordinator has given this life up: the others were told that its leases are void, so
        it must not go on as if they stood.
        """
        interval_s = FIRST_INTERVAL_S
        while True:
            self._news.clear()
            try:
                if self._told_info is self._info:
                    await _BEAT_LATE.delay(_LONGEST_LATENESS_S)
                    if not await self._beat():
                        self._told_info = None
                else:
                    info = self._info
                    taken_up = await self._network.channel(self._address).call(REGISTER, info, timeout_s=TIMEOUT_S)
                    if self._told_info is not None:
                        # Its load is not known there under this role, and is waited for.
                        self._news.set()
                    self._told_info, interval_s = info, taken_up.heartbeat_interval_s
                    self._told_latency = None
                    if self.registered.is_set():
                        self._on_registered_anew()
                    self.registered.set()
                self._outage.answered()
            except StaleIncarnation as error:
                _FENCED.reached()
                raise LifeOver(error.message) from error
            except TandemError as error:
                _NOT_HEARD.reached()
                self._outage.failed(error)
            await self._pause(interval_s)

    def tell_soon(self) -> None:
        """What the load says is not to wait for its turn."""
        self._news.set()

    def changed(self, info: WorkerInfo) -> None:
        """Registers this life anew, with what has changed of it."""
        self._info = info
        self._news.set()

    async def _pause(self, interval_s: float) -> None:
        """Until the next beat is due, or there is something to tell."""
        with suppress(TimeoutError):
            async with asyncio.timeout(interval_s):
                await self._news.wait()

    async def leave(self, reason: str) -> None:
        """Says goodbye, if the coordinator listens."""
        ask = DeregisterRequest(worker_id=self._info.worker_id, incarnation=self._info.incarnation, reason=reason)
        try:
            await self._network.channel(self._address).call(DEREGISTER, ask, timeout_s=TIMEOUT_S)
        except TandemError as error:
            self._log(f"could not say goodbye to the coordinator: {error.message}")

    async def _beat(self) -> bool:
        """Whether the coordinator knows this life."""
        latency = self._latency()
        beat = HeartbeatRequest(
            worker_id=self._info.worker_id,
            incarnation=self._info.incarnation,
            load=self._load(),
            transfers=self._transfers(),
            latency=None if latency == self._told_latency else latency,
        )
        reply = await self._network.channel(self._address).call(HEARTBEAT, beat, timeout_s=TIMEOUT_S)
        self._told_latency = latency
        gone = frozenset(reply.gone)
        # The coordinator repeats each for a while.
        for life in sorted(gone - self._buried):
            self._on_gone(life)
        self._buried = gone
        if not reply.known:
            _REGISTERED_AGAIN.reached()
        return reply.known
