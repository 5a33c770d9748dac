"""The coordinator's process shell: rpc in, the membership machine and the dispatch policy, rpc out."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from contracts.failpoints import Failpoint, RarePath
from contracts.messages import (
    DEREGISTER,
    DISPATCH,
    HEARTBEAT,
    MEMBERS,
    REGISTER,
    DispatchReply,
    Empty,
    HeartbeatReply,
    MembersReply,
    Placement,
    RegisterReply,
)
from coordinator.membership import LOOK_INTERVAL_S, Membership, MembershipLimits
from coordinator.policy.dispatch import DispatchLimits, dispatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from contracts.clock import Clock
    from contracts.messages import (
        DeregisterRequest,
        DispatchRequest,
        HeartbeatRequest,
        WorkerInfo,
    )
    from rpc import CallContext, Server

_ASKS_TO_REGISTER = Failpoint("coordinator.asks_to_register", "a worker is told to register although it is known")

_AVOIDS = RarePath("coordinator.avoids", "a request is placed that should avoid some workers")
_REFUSED = RarePath("coordinator.refused", "a request found no place")
_LIFE_LOST = RarePath("coordinator.life_lost", "a worker fell silent and was given up")


class CoordinatorShell:
    """Use: `register_on(server)`, then `async with shell:` for as long as it serves; a bug of its own cancels the
    body, and leaving raises it."""

    def __init__(
        self,
        clock: Clock,
        *,
        membership: MembershipLimits | None = None,
        limits: DispatchLimits | None = None,
        log: Callable[[str], None],
    ) -> None:
        self._clock = clock
        self._membership_limits = membership or MembershipLimits()
        self._limits = limits or DispatchLimits()
        self._log = log
        self.membership = Membership(self._membership_limits)
        #: Placements by outcome ("placement" or a rejection's code), for metrics.
        self.verdicts_total: dict[str, int] = {}
        #: Present between entering and leaving.
        self._group: asyncio.TaskGroup | None = None
        self._watching: asyncio.Task[None] | None = None

    def register_on(self, server: Server) -> None:
        server.register(REGISTER, self._on_register)
        server.register(HEARTBEAT, self._on_heartbeat)
        server.register(DEREGISTER, self._on_deregister)
        server.register(DISPATCH, self._on_dispatch)
        server.register(MEMBERS, self._on_members)

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._watching = self._group.create_task(self._watch(), name="coordinator-expiry")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        assert self._watching is not None, "made with the group"
        self._watching.cancel()
        if not isinstance(error, asyncio.CancelledError):
            # The body's own error leaves as it is, not as part of a group.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    async def _watch(self) -> None:
        """Nothing else would notice a silent worker while nobody asks."""
        while True:
            await self._clock.sleep(LOOK_INTERVAL_S)
            for sentence in self.membership.expire(self._clock.now_s()):
                _LIFE_LOST.reached()
                self._log(f"worker lost: {sentence}")

    async def _on_register(self, info: WorkerInfo, context: CallContext) -> RegisterReply:
        self.membership.register(info, self._clock.now_s())
        self._log(
            f"worker up: {info.worker_id} incarnation {info.incarnation} ({info.role}) at {info.address}, "
            f"{info.total_blocks} blocks, {info.device}"
        )
        return RegisterReply(heartbeat_interval_s=self._membership_limits.heartbeat_interval_s)

    async def _on_heartbeat(self, beat: HeartbeatRequest, context: CallContext) -> HeartbeatReply:
        now_s = self._clock.now_s()
        known = self.membership.heartbeat(beat.worker_id, beat.incarnation, beat.load, now_s, beat.transfers)
        known = known and not _ASKS_TO_REGISTER.fires()
        return HeartbeatReply(known=known, gone=self.membership.gone(now_s))

    async def _on_deregister(self, leave: DeregisterRequest, context: CallContext) -> Empty:
        if self.membership.deregister(leave.worker_id, leave.incarnation, self._clock.now_s()):
            self._log(f"worker left: {leave.worker_id} incarnation {leave.incarnation}: {leave.reason}")
        return Empty()

    async def _on_dispatch(self, ask: DispatchRequest, context: CallContext) -> DispatchReply:
        now_s = self._clock.now_s()
        verdicts = dispatch(ask.items, self.membership.live(now_s), self._limits)
        for item, verdict in zip(ask.items, verdicts, strict=True):
            outcome = "placement" if isinstance(verdict, Placement) else verdict.code
            self.verdicts_total[outcome] = self.verdicts_total.get(outcome, 0) + 1
            if isinstance(verdict, Placement):
                self.membership.book(item, verdict, now_s)
            else:
                _REFUSED.reached()
            if item.avoid:
                _AVOIDS.reached()
        return DispatchReply(verdicts=tuple(verdicts))

    async def _on_members(self, ask: Empty, context: CallContext) -> MembersReply:
        return MembersReply(members=self.membership.members(self._clock.now_s()))
