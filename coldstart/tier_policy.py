"""Which checkpoints leave a machine's disk when another one needs room. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """One checkpoint of the tier, or one that is being written."""

    folder: str
    #: What it takes, or will take when it is written.
    num_bytes: int
    #: Unix time of the last use.
    used_s: float
    #: Somebody uses or writes it now.
    is_pinned: bool
    is_complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    folder: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomPlan:
    #: In the order in which they go. Empty where it does not fit: nothing goes in vain.
    victims: tuple[Victim, ...]
    fits: bool
    reason: str


def plan_room(residents: Iterable[Resident], *, needed_bytes: int, capacity_bytes: int) -> RoomPlan:
    """Room for `needed_bytes` more: what a dead process left half-written goes first, then what was not used for the
    longest time; what is pinned stays."""
    all_residents = list(residents)
    used_bytes = sum(resident.num_bytes for resident in all_residents)
    pinned_bytes = sum(resident.num_bytes for resident in all_residents if resident.is_pinned)
    if pinned_bytes + needed_bytes > capacity_bytes:
        reason = f"{needed_bytes} bytes do not fit beside {pinned_bytes} in use: there is room for {capacity_bytes}"
        return RoomPlan(victims=(), fits=False, reason=reason)
    idle = [resident for resident in all_residents if not resident.is_pinned]
    # The name makes it the same choice for every process.
    idle.sort(key=lambda resident: (resident.is_complete, resident.used_s, resident.folder))
    victims: list[Victim] = []
    for resident in idle:
        if used_bytes + needed_bytes <= capacity_bytes:
            break
        why = "not used for the longest time" if resident.is_complete else "left half-written by a dead process"
        victims.append(Victim(folder=resident.folder, reason=f"{why}; {needed_bytes} bytes need room"))
        used_bytes -= resident.num_bytes
    return RoomPlan(
        victims=tuple(victims), fits=True, reason=f"{len(victims)} make room" if victims else "there is room"
    )
