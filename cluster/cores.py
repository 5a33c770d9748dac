"""Which cores and how many compute threads each worker of a machine gets.

Pure. Two teams of spinning threads on the same cores slow each other many times over, so workers get cores of
their own as long as there are enough; beyond that each runs one thread and the cores are shared evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

#: A number of compute threads, or as many as the worker's cores.
Threads = int | Literal["auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreDemand:
    """What the configuration says of one worker."""

    #: Cores of its pool, in order; "auto": any that nobody claimed.
    cores: tuple[int, ...] | Literal["auto"] = "auto"
    threads: Threads = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreShare:
    cores: tuple[int, ...]
    threads: int


def assign_cores(allowed: Sequence[int], demands: Sequence[CoreDemand]) -> list[CoreShare]:
    """One share for each demand, parallel to `demands`.

    Workers of one pool with the same explicit list divide it; the others divide what is left of `allowed`
    (all of it, if nothing is). Earlier workers get the larger parts. Every share has a core and a thread.
    """
    assert allowed, "a process runs on at least one core"
    claimed = {core for demand in demands if demand.cores != "auto" for core in demand.cores}
    unclaimed = tuple(core for core in allowed if core not in claimed) or tuple(allowed)
    shares: dict[int, CoreShare] = {}
    for cores in dict.fromkeys(demand.cores for demand in demands):
        members = [index for index, demand in enumerate(demands) if demand.cores == cores]
        wanted: list[Threads] = [demands[index].threads for index in members]
        own = cores if isinstance(cores, tuple) else unclaimed
        shares.update(zip(members, _divide(own, wanted), strict=True))
    return [shares[index] for index in range(len(demands))]


def _divide(cores: tuple[int, ...], wanted: Sequence[Threads]) -> list[CoreShare]:
    """Contiguous parts of `cores` that do not overlap, as long as every worker can have what it wants."""
    fixed = sum(count for count in wanted if count != "auto")
    num_auto = sum(count == "auto" for count in wanted)
    if fixed + num_auto > len(cores):
        return _overlap(cores, [1 if count == "auto" else count for count in wanted])
    spare = iter(_even_parts(len(cores) - fixed, num_auto))
    out: list[CoreShare] = []
    start = 0
    for count in wanted:
        size = next(spare) if count == "auto" else count
        out.append(CoreShare(cores=cores[start : start + size], threads=size))
        start += size
    return out


def _overlap(cores: tuple[int, ...], counts: Sequence[int]) -> list[CoreShare]:
    """Each worker continues where the one before ended, round and round."""
    out: list[CoreShare] = []
    start = 0
    for count in counts:
        own = {cores[(start + offset) % len(cores)] for offset in range(count)}
        out.append(CoreShare(cores=tuple(sorted(own)), threads=count))
        start += count
    return out


def _even_parts(total: int, num_parts: int) -> list[int]:
    """`total` in `num_parts` sizes that differ by at most one, larger ones first."""
    if num_parts == 0:
        return []
    size, larger = divmod(total, num_parts)
    return [size + (index < larger) for index in range(num_parts)]
