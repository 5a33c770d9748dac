"""The cluster as the coordinator last told it, and where requests go by that while it does not answer. Stores take no
requests and send no frames: they are no part of it.

The policy is the coordinator's own, the simplest of them: least loaded, over the workers that were up. How loaded they
are is known for a moment; after it, every gateway goes by what it has placed itself. Nothing is refused for latency
targets: what others place is not known.

A worker that a coordinator does not tell any more is believed in for a while all the same, unless it had fallen silent:
a coordinator that was just started knows nobody until the workers have registered again. One that hears nobody at all
is cut off itself, most likely: then a worker whose frames come here is believed in, silent or not, for as long as a
snapshot is.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from contracts.messages import Peer, Placement, Rejection, WorkerLife
from coordinator.conductor import Conductor
from coordinator.live_costs import LiveCosts
from coordinator.policy.settings import AdmissionRule, ConductorSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from contracts.ids import WorkerId
    from contracts.messages import DispatchItem, Member, WorkerInfo, WorkerLoad
    from coordinator.policy.fleet_view import Flags
    from gateway.limits import GatewayLimits

#: Codes with which a placement fails for want of a worker, not for the request's own sake.
_NOBODY = "not_ready"


@dataclass(slots=True)
class _Believed:
    member: Member
    #: Since when the coordinator answers without naming it.
    unnamed_since_s: float | None = None
    #: When its frames were last known to come, since then.
    heard_s: float = -math.inf

    @property
    def life(self) -> WorkerLife:
        return WorkerLife(self.member.info.worker_id, self.member.info.incarnation)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnLoad:
    """What a gateway has placed at a worker and knows to be there still."""

    waiting_requests: int = 0
    pending_prompt_tokens: int = 0
    running_decodes: int = 0
    context_tokens: int = 0

    def __add__(self, other: OwnLoad) -> OwnLoad:
        return OwnLoad(
            waiting_requests=self.waiting_requests + other.waiting_requests,
            pending_prompt_tokens=self.pending_prompt_tokens + other.pending_prompt_tokens,
            running_decodes=self.running_decodes + other.running_decodes,
            context_tokens=self.context_tokens + other.context_tokens,
        )


_NO_LOAD = OwnLoad()


class Snapshot:
    """No I/O, no clock. Times of calls must not go backwards."""

    def __init__(self, limits: GatewayLimits) -> None:
        self._limits = limits
        self._workers: dict[WorkerId, _Believed] = {}
        #: `members_mark` of the last answer.
        self.mark = 0
        #: When a coordinator last answered; None: never.
        self._told_s: float | None = None
        #: Whether, by its last answer, no worker is heard by it.
        self._hears_nobody = False
        #: Made, and brought up to date, when it is asked: mostly it never is.
        self._conductor: Conductor | None = None
        #: The lives that it knows.
        self._conducted: dict[WorkerId, Member] = {}
        #: When it was told of loads; None: not since the coordinator's last answer.
        self._loads_s: float | None = None

    def __repr__(self) -> str:
        return f"<Snapshot [{len(self._workers)} workers] told at {self._told_s}>"

    @property
    def is_empty(self) -> bool:
        return not self._workers

    @property
    def unnamed(self) -> set[WorkerId]:
        """Workers that are believed in although the coordinator's last answer did not name them."""
        return {worker_id for worker_id, believed in self._workers.items() if believed.unnamed_since_s is not None}

    @property
    def named(self) -> list[Peer]:
        """Those of the coordinator's last answer."""
        infos = [believed.member.info for believed in self._workers.values() if believed.unnamed_since_s is None]
        return _peers(infos)

    @property
    def unproven(self) -> list[Peer]:
        """Where the coordinator hears nobody, those of them whose frames have not come since: opening their streams
        will tell."""
        infos = [
            believed.member.info
            for believed in self._workers.values()
            if self._hears_nobody
            and believed.unnamed_since_s is not None
            and believed.heard_s < believed.unnamed_since_s
        ]
        return _peers(infos)

    @property
    def members(self) -> tuple[Member, ...]:
        """Those that are believed to be up, as last told."""
        return tuple(believed.member for believed in self._workers.values())

    @property
    def was_told(self) -> bool:
        return self._told_s is not None

    def age_s(self, now_s: float) -> float:
        """Since a coordinator last answered; infinite where none ever did."""
        return float("inf") if self._told_s is None else now_s - self._told_s

    def is_usable(self, now_s: float) -> bool:
        return bool(self._workers) and self.age_s(now_s) <= self._limits.snapshot_ttl_s

    def told(
        self, members: Sequence[Member], now_s: float, *, mark: int = 0, heard: Collection[WorkerLife] = ()
    ) -> None:
        """A coordinator's answer. `heard`: lives whose frames come to this gateway."""
        self._told_s = now_s
        self.mark = mark
        self._loads_s = None
        # A store that is heard tells as well as a worker that the coordinator hears.
        self._hears_nobody = all(self._was_silent(member) for member in members)
        members = [member for member in members if member.info.role != "store"]
        named = {member.info.worker_id for member in members}
        for worker_id in [worker_id for worker_id in self._workers if worker_id not in named]:
            believed = self._workers[worker_id]
            if believed.unnamed_since_s is None:
                believed.unnamed_since_s = now_s
            if believed.life in heard:
                believed.heard_s = now_s
            if not self._is_believed(believed, believed.unnamed_since_s, now_s):
                del self._workers[worker_id]
        for member in members:
            self._workers[member.info.worker_id] = _Believed(member)

    def _is_believed(self, believed: _Believed, unnamed_since_s: float, now_s: float) -> bool:
        """Although the coordinator does not name it."""
        if not self._hears_nobody:
            return not self._was_silent(believed.member) and now_s - unnamed_since_s <= self._limits.unnamed_for_s
        last_s = max(unnamed_since_s, believed.heard_s)
        return now_s - last_s <= self._limits.unnamed_for_s and now_s - unnamed_since_s <= self._limits.snapshot_ttl_s

    def place(
        self,
        item: DispatchItem,
        now_s: float,
        *,
        lost: Collection[WorkerLife],
        heard: Collection[WorkerLife] = (),
        own: Callable[[], Mapping[WorkerId, OwnLoad]],
    ) -> Placement | Rejection:
        """By the policy; counts as load from now on.

        Workers of `lost` get nothing. Those that the coordinator called silent get something only where there is no
        other, unless this gateway `heard` them lately. `own()` is what this gateway has
        where: it is all that is known of their load once the coordinator's last answer is too old.
        """
        if self._conductor is None:
            self._conductor = _conductor()
        conductor = self._conductor
        self._bring_up_to_date(conductor, now_s, own)
        # Its keys would be looked up in a directory of nothing.
        item = msgspec.structs.replace(item, block_keys=b"", slo_class="")
        up, silent = self._usable(conductor, lost, heard)
        verdict = _decide(conductor, item, now_s, up)
        if silent.any() and isinstance(verdict, Rejection) and verdict.code == _NOBODY:
            verdict = _decide(conductor, item, now_s, up | silent)
        if isinstance(verdict, Rejection):
            return verdict
        reason = f"by this gateway, from what it heard of the cluster {self.age_s(now_s):.1f} s ago: {verdict.reason}"
        return msgspec.structs.replace(verdict, reason=reason)

    def _usable(
        self, conductor: Conductor, lost: Collection[WorkerLife], heard: Collection[WorkerLife]
    ) -> tuple[Flags, Flags]:
        """By row of the fleet: those that were heard lately, and those that were not; both without the lost."""
        up: list[bool] = []
        silent: list[bool] = []
        for info in conductor.fleet.view().infos:
            believed = self._workers[info.worker_id]
            is_here = believed.life not in lost
            is_silent = self._was_silent(believed.member) and believed.life not in heard
            up.append(is_here and not is_silent)
            silent.append(is_here and is_silent)
        return np.array(up, np.bool_), np.array(silent, np.bool_)

    def _was_silent(self, member: Member) -> bool:
        return member.state == "suspect" or member.heartbeat_age_s > self._limits.silent_after_s

    def _bring_up_to_date(
        self, conductor: Conductor, now_s: float, own: Callable[[], Mapping[WorkerId, OwnLoad]]
    ) -> None:
        known_s, interval_s = self._loads_s, self._limits.members_interval_s
        if known_s is None:
            self._follow(conductor, now_s)
            loads = {worker_id: believed.member.load for worker_id, believed in self._workers.items()}
        elif now_s - known_s >= interval_s:
            here = own()
            loads = {
                worker_id: _with_own(believed.member.load, here.get(worker_id, _NO_LOAD))
                for worker_id, believed in self._workers.items()
            }
        else:
            return
        self._loads_s = now_s
        for worker_id, load in loads.items():
            conductor.report(worker_id, load, now_s)

    def _follow(self, conductor: Conductor, now_s: float) -> None:
        """The conductor learns who has come and who has gone."""
        for worker_id, member in list(self._conducted.items()):
            believed = self._workers.get(worker_id)
            if believed is None or believed.member.info != member.info:
                conductor.remove(worker_id)
                del self._conducted[worker_id]
        for worker_id, believed in self._workers.items():
            if worker_id not in self._conducted:
                conductor.add(believed.member.info, now_s)
            self._conducted[worker_id] = believed.member


def _peers(infos: Iterable[WorkerInfo]) -> list[Peer]:
    return [Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address) for info in infos]


def _conductor() -> Conductor:
    return Conductor(
        costs=LiveCosts(),
        slos={},
        default_slo=None,
        settings=ConductorSettings(policy="least_loaded", admission=AdmissionRule(form="none"), max_directory_blocks=1),
        rng=random.Random(0),
    )


def _decide(conductor: Conductor, item: DispatchItem, now_s: float, usable: Flags) -> Placement | Rejection:
    return conductor.in_words(item, conductor.decide(item, now_s, usable), now_s)


def _with_own(load: WorkerLoad, own: OwnLoad) -> WorkerLoad:
    return msgspec.structs.replace(
        load,
        waiting_requests=own.waiting_requests,
        pending_prompt_tokens=own.pending_prompt_tokens,
        pending_prompt_pairs=0.0,
        running_decodes=own.running_decodes,
        context_tokens=own.context_tokens,
    )
