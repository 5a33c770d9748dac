"""Asks the coordinator where requests run: one call in flight, everything that came meanwhile in the next.

One call that fails begins an *outage*: from then on requests are placed by the snapshot, at once, and the coordinator
is tried in the background until it answers. Where the snapshot knows nobody either, requests wait for the coordinator.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity, NotReady, TandemError
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import DISPATCH, DispatchItem, DispatchRequest, Placement, Rejection
from gateway.replay import WAKING
from gateway.snapshot import OwnLoad, Snapshot

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from structlog.typing import FilteringBoundLogger

    from contracts.clock import Clock
    from contracts.ids import GatewayId, RequestId, WorkerId
    from contracts.messages import TtftTally, WorkerLife
    from gateway.limits import GatewayLimits
    from gateway.stats import CoreStats
    from rpc import Network

    Answer = Placement | Rejection | TandemError

#: What a rejected client is told where the coordinator could not be asked.
_RETRY_AFTER_S = 1.0

_DISPATCH_LATE = Failpoint("gateway.dispatch_late", "the coordinator is asked late, for more requests at once")
_DISPATCH_TWICE = Failpoint("gateway.dispatch_twice", "the coordinator's answer is lost, it is asked again")
_LONGEST_LATENESS_S = 0.2

_BY_SNAPSHOT = RarePath("gateway.by_snapshot", "a request was placed without the coordinator")
_SNAPSHOT_TOO_OLD = RarePath("gateway.snapshot_too_old", "a request was refused, no coordinator answers any more")


@dataclass(slots=True)
class _Outage:
    since_s: float
    #: Placed meanwhile.
    num_placed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a dispatcher sees of its gateway when it has to decide by itself."""

    #: Lives of workers whose frames do not reach us.
    lost: Callable[[], Collection[WorkerLife]]
    #: Lives whose frames came lately.
    heard: Callable[[], Collection[WorkerLife]]
    #: What is at which worker.
    own_loads: Callable[[], Mapping[WorkerId, OwnLoad]]
    #: Asks the coordinator who is there, and tells the snapshot if it answers.
    follow_members: Callable[[], Awaitable[None]]
    #: Has that done soon: the coordinator knows others than the snapshot does.
    on_other_members: Callable[[], None]
    #: What became of accepted requests since the last call.
    outcomes: Callable[[], tuple[TtftTally, ...]]


class Dispatcher:
    """`on_answer` is called once for every item that was not discarded: with the coordinator's verdict or the
    snapshot's, or with an error when there is none."""

    def __init__(
        self,
        network: Network,
        clock: Clock,
        coordinator_address: str,
        gateway_id: GatewayId,
        limits: GatewayLimits,
        surroundings: Surroundings,
        on_answer: Callable[[RequestId, Answer], None],
        stats: CoreStats,
        log: FilteringBoundLogger,
    ) -> None:
        self.snapshot = Snapshot(limits)
        self._network = network
        self._clock = clock
        self._address = coordinator_address
        self._gateway_id = gateway_id
        self._limits = limits
        self._surroundings = surroundings
        self._on_answer = on_answer
        self._stats = stats
        self._log = log
        #: Items not yet part of a call, oldest first; at most `max_waiting_dispatch`.
        self._waiting: dict[RequestId, DispatchItem] = {}
        self._wanted = asyncio.Event()
        self._outage: _Outage | None = None
        #: Set exactly while there is one.
        self._is_out = asyncio.Event()

    def add(self, item: DispatchItem) -> None:
        """Raises NoCapacity when too many requests wait for the coordinator."""
        if len(self._waiting) >= self._limits.max_waiting_dispatch:
            raise NoCapacity(
                f"{len(self._waiting)} requests already wait for the coordinator, the limit",
                retry_after_s=_RETRY_AFTER_S,
                reason="gateway_full",
            )
        self._waiting[item.request_id] = item
        self._wanted.set()

    def discard(self, request_id: RequestId) -> None:
        self._waiting.pop(request_id, None)

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            await _DISPATCH_LATE.delay(_LONGEST_LATENESS_S)
            batch = self._take()
            if not batch:
                self._wanted.clear()
                continue
            for item, answer in zip(batch, await self._answers(batch), strict=True):
                self._on_answer(item.request_id, answer)

    async def look_for_coordinator(self) -> None:
        """Ends outages."""
        while True:
            await self._is_out.wait()
            await self._clock.sleep(self._limits.probe_interval_s)
            if self._outage is not None and not isinstance(await self._ask(()), TandemError):
                self._end_outage()

    def _take(self) -> tuple[DispatchItem, ...]:
        ids = list(self._waiting)[: self._limits.max_dispatch_batch]
        return tuple(self._waiting.pop(request_id) for request_id in ids)

    async def _answers(self, batch: tuple[DispatchItem, ...]) -> Sequence[Answer]:
        """Parallel to `batch`."""
        if self._outage is not None and self.snapshot.was_told:
            return self._without_coordinator(batch)
        verdicts = await self._ask(batch)
        if not isinstance(verdicts, TandemError):
            self._end_outage()
            await self._look_for_unnamed(verdicts)
            verdicts = await self._once_more(batch, verdicts)
            return [self._second_look(item, verdict) for item, verdict in zip(batch, verdicts, strict=True)]
        self._begin_outage(verdicts)
        return self._without_coordinator(batch) if self.snapshot.was_told else [verdicts] * len(batch)

    async def _ask(self, batch: tuple[DispatchItem, ...]) -> Sequence[Placement | Rejection] | TandemError:
        """Verdicts parallel to `batch`, or why there are none."""
        request = DispatchRequest(gateway_id=self._gateway_id, items=batch, outcomes=self._surroundings.outcomes())
        timeout_s = self._limits.dispatch_timeout_s
        if self.snapshot.is_usable(self._clock.now_s()):
            timeout_s = min(timeout_s, self._limits.dispatch_timeout_with_snapshot_s)
        try:
            channel = self._network.channel(self._address)
            if _DISPATCH_TWICE.fires():
                await channel.call(DISPATCH, request, timeout_s=timeout_s)
            reply = await channel.call(DISPATCH, request, timeout_s=timeout_s)
        except TandemError as error:
            return _no_answer(f"did not answer ({error.code})")
        if len(reply.verdicts) != len(batch):
            return _no_answer(f"answered {len(reply.verdicts)} of {len(batch)} requests")
        if reply.members_mark != self.snapshot.mark:
            self._surroundings.on_other_members()
        return reply.verdicts

    # --- without the coordinator ------------------------------------------------------------------

    def _begin_outage(self, error: TandemError) -> None:
        if self._outage is None:
            now_s = self._clock.now_s()
            self._outage = _Outage(now_s)
            self._is_out.set()
            self._stats.coordinator_outages += 1
            can_place = self.snapshot.is_usable(now_s)
            self._log.warning("coordinator_lost", error=error.message, requests_go_on=can_place)

    def _end_outage(self) -> None:
        outage, self._outage = self._outage, None
        if outage is not None:
            self._is_out.clear()
            after_s = round(self._clock.now_s() - outage.since_s, 3)
            self._log.warning("coordinator_back", after_s=after_s, placed_without=outage.num_placed)

    def _without_coordinator(self, batch: tuple[DispatchItem, ...]) -> list[Answer]:
        now_s = self._clock.now_s()
        if self.snapshot.is_usable(now_s):
            return [self._by_snapshot(item, now_s) for item in batch]
        if self.snapshot.is_empty:
            return [_no_answer("did not answer")] * len(batch)
        _SNAPSHOT_TOO_OLD.reached()
        return [self._too_old(item, now_s) for item in batch]

    def _by_snapshot(self, item: DispatchItem, now_s: float) -> Answer:
        verdict = self._place(item, now_s)
        if isinstance(verdict, Placement):
            self._count(verdict)
        elif verdict.code == NotReady.code:
            # The coordinator may know better, once it is back.
            return _no_answer(f"did not answer; by this gateway's own knowledge, {verdict.message}")
        return verdict

    async def _look_for_unnamed(self, verdicts: Sequence[Placement | Rejection]) -> None:
        """Where the coordinator lacks workers: whether it has lost sight of any that we know."""
        is_of_use = self.snapshot.is_usable(self._clock.now_s())
        if is_of_use and any(_lacks_workers(verdict) for verdict in verdicts):
            await self._surroundings.follow_members()

    async def _once_more(
        self, batch: tuple[DispatchItem, ...], verdicts: Sequence[Placement | Rejection]
    ) -> Sequence[Placement | Rejection]:
        """Those that it knew no workers for may have been asked while these registered: it names them by now."""
        now_s = self._clock.now_s()
        if self.snapshot.unnamed or not self.snapshot.is_usable(now_s):
            return verdicts
        late = [
            index
            for index, (item, verdict) in enumerate(zip(batch, verdicts, strict=True))
            if _lacks_workers(verdict) and isinstance(self._place(item, now_s), Placement)
        ]
        if not late:
            return verdicts
        again = await self._ask(tuple(batch[index] for index in late))
        if isinstance(again, TandemError):
            return verdicts
        newer = dict(zip(late, again, strict=True))
        return [newer.get(index, verdict) for index, verdict in enumerate(verdicts)]

    def _second_look(self, item: DispatchItem, verdict: Placement | Rejection) -> Placement | Rejection:
        """A coordinator that was just started does not know its workers yet, and one that is cut off from them not any
        more; we may. Those that just failed are left out: it may be right."""
        if isinstance(verdict, Placement):
            self._stats.placed("coordinator")
            return verdict
        now_s = self._clock.now_s()
        if not (_lacks_workers(verdict) and self.snapshot.unnamed and self.snapshot.is_usable(now_s)):
            return verdict
        ours = self._place(item, now_s)
        if isinstance(ours, Rejection):
            return verdict
        chosen = {ours.prefill.worker_id, ours.decode.worker_id}
        if chosen & set(item.avoid) or not chosen & self.snapshot.unnamed:
            return verdict
        self._count(ours)
        return ours

    def _place(self, item: DispatchItem, now_s: float) -> Placement | Rejection:
        around = self._surroundings
        return self.snapshot.place(item, now_s, lost=around.lost(), heard=around.heard(), own=around.own_loads)

    def _count(self, placement: Placement) -> None:
        _BY_SNAPSHOT.reached()
        self._stats.placed("snapshot")
        if self._outage is not None:
            self._outage.num_placed += 1

    def _too_old(self, item: DispatchItem, now_s: float) -> Rejection:
        return Rejection(
            request_id=item.request_id,
            code=NotReady.code,
            message=f"no coordinator has answered for {self.snapshot.age_s(now_s):.0f} s; requests are placed without "
            f"one for {self._limits.snapshot_ttl_s:g} s",
            retry_after_s=_RETRY_AFTER_S,
            reason="no_coordinator",
        )


def _lacks_workers(verdict: Placement | Rejection) -> bool:
    """It knows of none; not: it knows that there are none but those that leave, and has one started."""
    return isinstance(verdict, Rejection) and verdict.code == NotReady.code and verdict.reason != WAKING


def _no_answer(what: str) -> TandemError:
    return NotReady(f"the coordinator {what}", retry_after_s=_RETRY_AFTER_S, reason="no_coordinator")
