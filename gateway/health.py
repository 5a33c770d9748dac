"""Whether the cluster behind this gateway can answer: read from the coordinator, remembered briefly."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from contracts.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.clock import Clock
    from contracts.messages import Member
    from gateway.core import GatewayCore
    from gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthReport:
    ok: bool
    reason: str
    #: Living workers that can do it.
    num_prefill: int = 0
    num_decode: int = 0
    #: Of these, not heard of for a while.
    num_suspect: int = 0
    #: The coordinator answered.
    is_heard: bool = True

    def as_json(self) -> dict[str, object]:
        return {
            "status": "ok" if self.ok else "unavailable",
            "reason": self.reason,
            "prefill_workers": self.num_prefill,
            "decode_workers": self.num_decode,
            **({"suspect_workers": self.num_suspect} if self.num_suspect else {}),
        }


def judge(members: Sequence[Member], max_heartbeat_age_s: float) -> HealthReport:
    """Pure. Able to answer: at least one living worker for each half of a request."""
    workers = [member for member in members if member.info.role != "store"]
    living = [member for member in workers if member.heartbeat_age_s <= max_heartbeat_age_s]
    num_prefill = sum(member.info.role in ("prefill", "mixed") for member in living)
    num_decode = sum(member.info.role in ("decode", "mixed") for member in living)
    missing = [name for name, number in (("prefill", num_prefill), ("decode", num_decode)) if not number]
    return HealthReport(
        ok=not missing,
        reason=f"no {' and no '.join(missing)} worker" if missing else "serving",
        num_prefill=num_prefill,
        num_decode=num_decode,
        num_suspect=sum(member.state == "suspect" for member in living),
    )


class HealthCheck:
    def __init__(self, core: GatewayCore, settings: GatewaySettings, clock: Clock) -> None:
        self._core = core
        self._settings = settings
        self._clock = clock
        #: The last report and when it was made; one call at a time makes a new one.
        self._known: tuple[HealthReport, float] | None = None
        self._turn = asyncio.Lock()

    async def report(self) -> HealthReport:
        async with self._turn:
            if self._known is not None:
                report, made_s = self._known
                if self._clock.now_s() - made_s < self._settings.health_cache_s:
                    return report
            report = await self._ask()
            self._known = (report, self._clock.now_s())
            return report

    async def _ask(self) -> HealthReport:
        try:
            members = await self._core.members()
        except TandemError as error:
            return self._without_coordinator(f"the coordinator did not answer ({error.code})")
        return judge(members, self._settings.max_heartbeat_age_s)

    def _without_coordinator(self, reason: str) -> HealthReport:
        """Requests are answered for a while all the same, by what it told last."""
        snapshot = self._core.snapshot
        report = judge(snapshot.members, self._settings.max_heartbeat_age_s)
        if not (report.ok and snapshot.is_usable(self._clock.now_s())):
            return HealthReport(ok=False, reason=reason, is_heard=False)
        return replace(report, reason=f"{report.reason}; {reason}", is_heard=False)
