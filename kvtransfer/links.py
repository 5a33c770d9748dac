"""Which transport the pulls from one holder take: a pure choice from what was measured, with its reason.

A transport that is much slower than its class must not be used in silence: RDMA that fell back to TCP looks like
a working cluster with hundredfold latency. So each measurement is held against what its class ordinarily does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Below a fifth of its class a transport is something else than it says.
SLOW_FACTOR = 5.0

#: What a handoff typically moves: the choice weighs latency and bandwidth by the time this takes.
TYPICAL_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClass:
    """What a transport should do between two workers."""

    #: For people, e.g. "shared memory" or "TCP on eth0".
    name: str
    bandwidth_bytes_per_s: float
    #: Of one block.
    latency_s: float


#: Cautious: probes run on machines that are busy starting. A fifth of these is what is refused.
SHARED_MEMORY = LinkClass(name="shared memory", bandwidth_bytes_per_s=1.0e9, latency_s=0.02)
SAME_MACHINE = LinkClass(name="memory of the same machine", bandwidth_bytes_per_s=0.5e9, latency_s=0.02)
LOOPBACK = LinkClass(name="TCP on loopback", bandwidth_bytes_per_s=0.1e9, latency_s=0.05)
RDMA = LinkClass(name="RDMA", bandwidth_bytes_per_s=5.0e9, latency_s=0.005)
#: Of a network whose speed is not known.
TCP = LinkClass(name="TCP", bandwidth_bytes_per_s=0.1e9, latency_s=0.05)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One transport to one holder. `problem` says why the figures are missing."""

    transport: str
    bandwidth_bytes_per_s: float | None = None
    latency_s: float | None = None
    problem: str = ""

    @property
    def typical_s(self) -> float:
        """Time of a typical handoff's bytes; infinite where it was not measured."""
        if self.bandwidth_bytes_per_s is None or self.latency_s is None:
            return float("inf")
        return self.latency_s + TYPICAL_BYTES / self.bandwidth_bytes_per_s

    def __str__(self) -> str:
        if self.bandwidth_bytes_per_s is None or self.latency_s is None:
            return f"{self.transport}: {self.problem}"
        return f"{self.transport}: {self.bandwidth_bytes_per_s / 1e9:.2f} GB/s, {self.latency_s * 1e3:.2f} ms a block"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPolicy:
    """What is expected of each transport, by name, and whether less is accepted."""

    classes: Mapping[str, LinkClass] = field(default_factory=dict[str, LinkClass])
    allow_slow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkChoice:
    """`transport` None: none is acceptable, and `reason` says why not."""

    transport: str | None
    reason: str
    #: What is to be said of each measured transport, by name.
    notes: Mapping[str, str] = field(default_factory=dict[str, str])


def shortfall(measured: Measured, expected: LinkClass | None) -> str | None:
    """Why a measurement is not acceptable; None when it is."""
    if measured.bandwidth_bytes_per_s is None or measured.latency_s is None:
        return measured.problem or "not measured"
    if expected is None:
        return None
    needed = expected.bandwidth_bytes_per_s / SLOW_FACTOR
    if measured.bandwidth_bytes_per_s < needed:
        return (
            f"{measured.bandwidth_bytes_per_s / 1e9:.3f} GB/s is less than a fifth of the "
            f"{expected.bandwidth_bytes_per_s / 1e9:g} GB/s of {expected.name}"
        )
    if measured.latency_s > expected.latency_s * SLOW_FACTOR:
        return (
            f"{measured.latency_s * 1e3:.1f} ms a block is more than five times the "
            f"{expected.latency_s * 1e3:g} ms of {expected.name}"
        )
    return None


def best_of(first: Measured | None, second: Measured) -> Measured:
    """The better figures of two measurements of one way: what a link did once, it can do."""
    if first is None or first.bandwidth_bytes_per_s is None or first.latency_s is None:
        return second
    if second.bandwidth_bytes_per_s is None or second.latency_s is None:
        return first
    return Measured(
        transport=second.transport,
        bandwidth_bytes_per_s=max(first.bandwidth_bytes_per_s, second.bandwidth_bytes_per_s),
        latency_s=min(first.latency_s, second.latency_s),
    )


def choose(measurements: Sequence[Measured], policy: LinkPolicy) -> LinkChoice:
    """The acceptable transport that moves a typical handoff fastest; ties go to the one named first.

    Raises ConfigError where nothing was measured at all: no transport is common to the two.
    """
    if not measurements:
        raise ConfigError("no transport is common to the two workers")
    notes: dict[str, str] = {}
    acceptable: list[Measured] = []
    for measured in measurements:
        short = shortfall(measured, policy.classes.get(measured.transport))
        if short is None:
            acceptable.append(measured)
        else:
            notes[measured.transport] = short
    if not acceptable and policy.allow_slow:
        acceptable = [measured for measured in measurements if measured.bandwidth_bytes_per_s is not None]
    if not acceptable:
        return LinkChoice(
            transport=None,
            reason="; ".join(f"{name}: {note}" for name, note in notes.items()),
            notes=notes,
        )
    best = min(acceptable, key=lambda measured: measured.typical_s)
    for measured in acceptable:
        if measured is not best:
            notes.setdefault(measured.transport, f"slower than {best.transport}")
    others = "; ".join(str(measured) for measured in measurements if measured is not best)
    why = f"{best}" if not others else f"{best} (others: {others})"
    if best.transport in notes:
        why = f"{why}; allowed though slow: {notes[best.transport]}"
    return LinkChoice(transport=best.transport, reason=why, notes=notes)
