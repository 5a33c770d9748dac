"""What a decision log says by itself: how many were refused, for what, of which class and tenant, and when. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coordinator.decision_records import Decision
    from simulator.rejects.reader import DecisionHistory

#: How a request without targets, and one without a tenant, is called.
NO_CLASS = "(no targets)"
NO_TENANT = "(none)"
_NUM_PARTS = 12
#: Parts from here on are told in whole seconds.
_LONG_PART_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Of requests with one property. A request that was decided more than once counts by its last decision."""

    name: str
    offered: int
    #: By reason, most frequent first.
    refused_for: dict[str, int]

    @property
    def refused(self) -> int:
        return sum(self.refused_for.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    everything: Count
    by_class: tuple[Count, ...]
    by_tenant: tuple[Count, ...]
    #: Equal parts of the log's time, named by the seconds since its first decision.
    over_time: tuple[Count, ...]
    num_decisions: int
    #: Unix time of the first decision, and seconds to the last.
    began_at: float
    span_s: float


def last_decisions(decisions: Iterator[Decision] | list[Decision]) -> dict[str, Decision]:
    """Of each request."""
    return {decision.request: decision for decision in decisions}


def summarise(history: DecisionHistory) -> Summary:
    """Raises ValueError without a decision."""
    timed = [(stretch.unix_s(each), each) for stretch in history.stretches for each in stretch.decisions]
    if not timed:
        raise ValueError("a log without decisions has no summary")
    # Ids are not repeated between coordinators' lives: gateways make them.
    last = {each.request: (at, each) for at, each in timed}
    began_at = min(at for at, _ in timed)
    span_s = max(at for at, _ in timed) - began_at
    part_s = max(span_s, 1e-9) / _NUM_PARTS

    decimals = 0 if part_s >= _LONG_PART_S else 1

    def part_of(at: float) -> int:
        return min(_NUM_PARTS - 1, int((at - began_at) / part_s))

    requests = [each for _, each in last.values()]
    parts: list[list[Decision]] = [[] for _ in range(_NUM_PARTS)]
    for at, each in last.values():
        parts[part_of(at)].append(each)
    return Summary(
        everything=_count("all", requests),
        by_class=_by(requests, lambda each: each.slo_class or NO_CLASS),
        by_tenant=_by(requests, lambda each: each.tenant or NO_TENANT),
        over_time=tuple(
            _count(f"{number * part_s:,.{decimals}f} - {(number + 1) * part_s:,.{decimals}f} s", part)
            for number, part in enumerate(parts)
            if span_s > 0
        ),
        num_decisions=len(timed),
        began_at=began_at,
        span_s=span_s,
    )


def _by(requests: list[Decision], name_of: Callable[[Decision], str]) -> tuple[Count, ...]:
    groups: dict[str, list[Decision]] = {}
    for each in requests:
        groups.setdefault(name_of(each), []).append(each)
    return tuple(_count(name, groups[name]) for name in sorted(groups))


def _count(name: str, requests: list[Decision]) -> Count:
    reasons = Counter(each.outcome for each in requests if not each.is_placed)
    return Count(name=name, offered=len(requests), refused_for=dict(reasons.most_common()))
