"""The coordinator's process shell: rpc in, membership and the conductor, rpc out."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Self

import msgspec

from contracts.failpoints import Failpoint, RarePath
from contracts.messages import (
    BLOCK_EVENTS,
    DEREGISTER,
    DISPATCH,
    HEARTBEAT,
    MEMBERS,
    REGISTER,
    BlockEventsReply,
    DispatchReply,
    Empty,
    HeartbeatReply,
    MembersReply,
    RegisterReply,
    Rejection,
)
from coordinator.conductor import Conductor, ConductorSettings
from coordinator.decision import Refused
from coordinator.directory.sync import DirectorySync
from coordinator.live_costs import LiveCosts
from coordinator.membership import ALL_UP, LOOK_INTERVAL_S, Membership, MembershipLimits
from coordinator.operations_shell import OperationsShell
from coordinator.rebalancer import Rebalancer
from coordinator.refusal_lines import RefusalLines
from coordinator.shell_figures import ShellFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

    from contracts.clock import Clock
    from contracts.ids import WorkerId
    from contracts.messages import (
        BlockEvents,
        DeregisterRequest,
        DispatchItem,
        DispatchRequest,
        HeartbeatRequest,
        LatencyFit,
        Placement,
        TransferReport,
        WorkerInfo,
        WorkerLoad,
    )
    from coordinator.autoscaler import Autoscaler
    from coordinator.decision import Chosen
    from coordinator.directory.directory import Match
    from coordinator.membership import Standing
    from coordinator.operation_terms import OperationLimits
    from coordinator.policy.fleet_view import Flags, FleetView
    from coordinator.rebalancer import Bandwidth, RebalanceSettings
    from rpc import CallContext, Network, Server

#: Upkeep of the directory is done in parts of so many slots, at most some 2 ms each, with pauses for others.
SWEEP_SLOTS = 16_384
SWEEP_PAUSE_S = 0.004

_ASKS_TO_REGISTER = Failpoint("coordinator.asks_to_register", "a worker is told to register although it is known")

_AVOIDS = RarePath("coordinator.avoids", "a request is placed that should avoid some workers")
_REFUSED = RarePath("coordinator.refused", "a request found no place")
_SUSPECTS_USED = RarePath("coordinator.suspects_used", "nobody else than suspects could take a request")
_LIFE_LOST = RarePath("coordinator.life_lost", "a worker fell silent and was given up")

#: Targets that would be missed are no reason to take a worker that may be dead.
_FINAL = frozenset({"ttft", "tpot"})


class CoordinatorShell:
    """Use: `register_on(server)`, then `async with shell:` for as long as it serves; a bug of its own cancels the
    body, and leaving raises it."""

    def __init__(
        self,
        clock: Clock,
        *,
        conductor: Conductor | None = None,
        membership: MembershipLimits | None = None,
        on_decision: Callable[[DispatchItem, Chosen | Refused, float], None] | None = None,
        on_transfers: Callable[[WorkerId, TransferReport], None] | None = None,
        on_gone: Callable[[WorkerId], None] | None = None,
        network: Network | None = None,
        operations: OperationLimits | None = None,
        rebalancing: RebalanceSettings | None = None,
        bandwidth: Bandwidth | None = None,
        log: Callable[[str], None],
    ) -> None:
        """Without `conductor`: one without SLO classes, which learns costs from the workers' own steps and links.
        `network`: over which workers and node agents are given orders; None: they are not. `rebalancing`: when requests
        move between workers; None: they do not. `bandwidth`: of the ways between these.

        `on_decision` hears of each decision right after it was made: its rows are those of `conductor.fleet.view()`
        at that moment only. `on_transfers` hears of what workers measured of their links, `on_gone` of those whose
        lives are over.
        """
        if conductor is None:
            costs = LiveCosts()
            conductor = default_conductor(costs)
            on_transfers, on_gone = on_transfers or costs.observe_transfers, on_gone or costs.forget_links
        self._clock = clock
        self._membership_limits = membership or MembershipLimits()
        self._on_decision = on_decision
        self._on_transfers = on_transfers
        self._log = log
        self.conductor = conductor
        self.directory_sync = DirectorySync(conductor.directory)
        self._on_gone = on_gone
        self.membership = Membership(self._membership_limits, _Roll(conductor, self.directory_sync, self._gone))
        #: None without a network.
        self.operations: OperationsShell | None = None
        if network is not None:
            self.operations = OperationsShell(
                network=network, clock=clock, membership=self.membership, limits=operations, log=log
            )
        self.figures = ShellFigures()
        #: None where nothing moves requests.
        self.rebalancer: Rebalancer | None = None
        if network is not None and rebalancing is not None:
            self.rebalancer = Rebalancer(
                clock,
                network,
                rebalancing,
                conductor,
                standing=lambda: self.membership.standing(clock.now_s()),
                closed=self.closed,
                keep_answers=self._keep_answers,
                bandwidth=bandwidth,
                log=log,
            )
            self.figures.rebalancing = self.rebalancer.figures
        #: Hears of decisions and their outcomes; None: no pool follows the load.
        self.scaler: Autoscaler | None = None
        self._refusals = RefusalLines(conductor)
        self._usable = _Usable(conductor)
        #: Present between entering and leaving.
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def register_on(self, server: Server) -> None:
        server.register(REGISTER, self._on_register)
        server.register(HEARTBEAT, self._on_heartbeat)
        server.register(BLOCK_EVENTS, self._on_block_events)
        server.register(DEREGISTER, self._on_deregister)
        server.register(DISPATCH, self._on_dispatch)
        server.register(MEMBERS, self._on_members)
        if self.operations is not None:
            self.operations.register_on(server)

    def fleet(self) -> FleetView:
        """The present lives and their load, as the last decision would see them."""
        self.membership.standing(self._clock.now_s())
        return self.conductor.fleet.view()

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._tasks = [
            self._group.create_task(self._watch(), name="coordinator-expiry"),
            self._group.create_task(self._sweep(), name="coordinator-sweep"),
        ]
        if self.operations is not None:
            self._tasks.append(self._group.create_task(self.operations.run(), name="coordinator-operations"))
        if self.rebalancer is not None:
            self._tasks.append(self._group.create_task(self.rebalancer.run(), name="coordinator-rebalancer"))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        for task in self._tasks:
            task.cancel()
        if not isinstance(error, asyncio.CancelledError):
            # The body's own error leaves as it is, not as part of a group.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    def _gone(self, worker_id: WorkerId) -> None:
        if self._on_gone is not None:
            self._on_gone(worker_id)
        if self.rebalancer is not None:
            self.rebalancer.gone(worker_id)

    async def _watch(self) -> None:
        """Nothing else would notice a silent worker while nobody asks."""
        while True:
            await self._clock.sleep(LOOK_INTERVAL_S)
            for sentence in self.membership.expire(self._clock.now_s()):
                _LIFE_LOST.reached()
                self._log(f"worker lost: {sentence}")
            self._tell(self._refusals.look(self._clock.now_s()))

    async def _sweep(self) -> None:
        """What the directory puts off until there is time."""
        while True:
            await self._clock.sleep(LOOK_INTERVAL_S)
            while self.conductor.directory.sweep(SWEEP_SLOTS):
                await self._clock.sleep(SWEEP_PAUSE_S)

    # --- workers ----------------------------------------------------------------------------------

    async def _on_register(self, info: WorkerInfo, context: CallContext) -> RegisterReply:
        self.membership.register(info, self._clock.now_s())
        self._log(
            f"worker up: {info.worker_id} incarnation {info.incarnation} ({info.role}) at {info.address}, "
            f"{info.total_blocks} blocks, {info.device}"
        )
        return RegisterReply(heartbeat_interval_s=self._membership_limits.heartbeat_interval_s)

    async def _on_heartbeat(self, beat: HeartbeatRequest, context: CallContext) -> HeartbeatReply:
        now_s = self._clock.now_s()
        known = self.membership.heartbeat(
            beat.worker_id, beat.incarnation, beat.load, now_s, beat.transfers, beat.latency
        )
        if known and beat.transfers is not None and self._on_transfers is not None:
            self._on_transfers(beat.worker_id, beat.transfers)
        if known and self.rebalancer is not None:
            self.rebalancer.heard(beat.worker_id, beat.load, now_s)
        known = known and not _ASKS_TO_REGISTER.fires()
        return HeartbeatReply(known=known, gone=self.membership.gone(now_s))

    async def _on_block_events(self, events: BlockEvents, context: CallContext) -> BlockEventsReply:
        if not self.membership.knows(events.worker_id, events.incarnation, self._clock.now_s()):
            return BlockEventsReply(known=False)
        number = self.conductor.number_of(events.worker_id)
        return self.directory_sync.handle(events, number, events.incarnation)

    async def _on_deregister(self, leave: DeregisterRequest, context: CallContext) -> Empty:
        if self.membership.deregister(leave.worker_id, leave.incarnation, self._clock.now_s()):
            self._log(f"worker left: {leave.worker_id} incarnation {leave.incarnation}: {leave.reason}")
        return Empty()

    # --- gateways ---------------------------------------------------------------------------------

    async def _on_dispatch(self, ask: DispatchRequest, context: CallContext) -> DispatchReply:
        begun_s = self._clock.now_s()
        for tally in ask.outcomes:
            self.conductor.margins.note(tally)
            if self.scaler is not None:
                self.scaler.judged(tally, begun_s)
        standing = self.membership.standing(begun_s)
        matches = self.conductor.matches(ask.items)
        each_s = (self._clock.now_s() - begun_s) / max(1, len(matches))
        verdicts = [
            self._verdict(item, match, standing, each_s) for item, match in zip(ask.items, matches, strict=True)
        ]
        return DispatchReply(verdicts=tuple(verdicts), members_mark=self.membership.mark)

    def _verdict(
        self, item: DispatchItem, match: Match | None, standing: Standing, prepared_s: float
    ) -> Placement | Rejection:
        """`prepared_s`: what was spent on it before."""
        now_s = self._clock.now_s()
        closed = self.closed()
        if standing is ALL_UP and not closed:
            decision = self.conductor.decide(item, now_s, match=match)
        else:
            item, decision = self._decide_warily(item, match, standing, closed, now_s)
        if self._on_decision is not None:
            self._on_decision(item, decision, now_s)
        verdict = self.conductor.in_words(item, decision, now_s)
        if self.scaler is not None:
            self.scaler.decided(item, decision, now_s)
        if isinstance(decision, Refused) and isinstance(verdict, Rejection):
            _REFUSED.reached()
            if self.scaler is not None:
                verdict = self.scaler.reworded(decision, verdict)
            self._tell(self._refusals.refused(item, decision, verdict, now_s))
        if item.avoid:
            _AVOIDS.reached()
        outcome = decision.why if isinstance(decision, Refused) else "placement"
        self.figures.count(outcome, self._clock.now_s() - now_s + prepared_s)
        return verdict

    def _tell(self, lines: Iterable[str]) -> None:
        for line in lines:
            self._log(line)

    def closed(self) -> frozenset[WorkerId]:
        """Those that get no new request: they drain, or are about to."""
        draining = self.membership.draining
        if self.operations is None or not self.operations.leaving:
            return draining
        return draining | self.operations.leaving

    def _keep_answers(self) -> frozenset[WorkerId]:
        """Of those: whose answers stay there all the same."""
        return frozenset() if self.operations is None else self.operations.keep_answers

    def _decide_warily(
        self, item: DispatchItem, match: Match | None, standing: Standing, closed: frozenset[WorkerId], now_s: float
    ) -> tuple[DispatchItem, Chosen | Refused]:
        """With suspects only where nobody else can take it, and as few of them as possible; and rather with a suspect
        than with one that the item avoids. Returns the item that was decided."""
        up, heard = self._usable.flags(standing, closed)
        decision = self.conductor.decide(item, now_s, up, match)
        if not standing.suspects or not isinstance(decision, Refused) or decision.why in _FINAL:
            return item, decision
        _SUSPECTS_USED.reached()
        suspects = tuple(sorted(standing.suspects))
        if item.avoid:
            wary = msgspec.structs.replace(item, avoid=suspects)
            not_avoided = heard & ~self.conductor.fleet.view().rows_of(item.avoid)
            decision = self.conductor.decide(wary, now_s, not_avoided, match)
            if not isinstance(decision, Refused) or decision.why in _FINAL:
                return wary, decision
        wary = msgspec.structs.replace(item, avoid=(*item.avoid, *suspects))
        return wary, self.conductor.decide(wary, now_s, heard, match)

    async def _on_members(self, ask: Empty, context: CallContext) -> MembersReply:
        return MembersReply(
            members=self.membership.members(self._clock.now_s()),
            members_mark=self.membership.mark,
            coordinator=self.figures.message(self.conductor, self.directory_sync),
        )


def default_conductor(costs: LiveCosts, settings: ConductorSettings | None = None) -> Conductor:
    """Without SLO classes, and the same draws in every run."""
    return Conductor(
        costs=costs, slos={}, default_slo=None, settings=settings or ConductorSettings(), rng=random.Random(0)
    )


class _Roll:
    """Whoever must know which lives there are."""

    def __init__(
        self, conductor: Conductor, directory_sync: DirectorySync, on_gone: Callable[[WorkerId], None] | None
    ) -> None:
        self._conductor = conductor
        self._directory_sync = directory_sync
        self._on_gone = on_gone

    def add(self, info: WorkerInfo, now_s: float) -> None:
        self._conductor.add(info, now_s)

    def remove(self, worker_id: WorkerId) -> None:
        self._directory_sync.forget(worker_id)
        self._conductor.remove(worker_id)
        if self._on_gone is not None:
            self._on_gone(worker_id)

    def report(self, worker_id: WorkerId, load: WorkerLoad, now_s: float, fit: LatencyFit | None = None) -> None:
        self._conductor.report(worker_id, load, now_s, fit)


class _Usable:
    """Who may be used, as flags by row of the fleet; made once for as long as nothing changes."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor
        self._view: FleetView | None = None
        self._standing: Standing | None = None
        self._closed: frozenset[WorkerId] = frozenset()
        self._flags: tuple[Flags, Flags]

    def flags(self, standing: Standing, closed: frozenset[WorkerId]) -> tuple[Flags, Flags]:
        """Who is up, and who may be used if need be; of those who take requests at all."""
        view = self._conductor.fleet.view()
        if view is not self._view or standing is not self._standing or closed != self._closed:
            heard = ~view.rows_of(standing.unheard | closed)
            self._view, self._standing, self._closed = view, standing, closed
            self._flags = heard & ~view.rows_of(standing.suspects), heard
        return self._flags
