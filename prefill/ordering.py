"""The order in which waiting prompts are read: three orders, each one number per prompt. Pure.

A prompt's number is fixed when it comes (and changes at most once, see below), so that a queue is a heap and nobody
has to look at everybody again because time has passed. Ageing is part of the number: it is a time, and what comes
later starts further back.

    fcfs      received
    shortest  received + ageing * log2(tokens): waiting `ageing_s` longer counts like half the tokens
    edf       when the first token is due, but no later than `UNHURRIED_AGEINGS * ageing_s` after it was received; a
              prompt without a target is due then (earliest deadline first; first come first served among those)

each less `ageing * priority`: one priority more counts like `ageing_s` more of waiting, within the bounds of
`contracts.requests.counted_priority`. So nobody starves: no prompt goes before another of its tenant that was received
more than `longest_span_s` before it.

Under overload earliest-deadline-first serves everybody just too late, one after the other. A prompt whose first token
cannot be in time any more therefore counts like one without a target from then on: behind those that still can be,
but not for ever.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from contracts.requests import MOST_PRIORITY, counted_priority

if TYPE_CHECKING:
    from collections.abc import Mapping

#: A prompt without a target, or with one later than that, is due so many ageing times after it was received.
UNHURRIED_AGEINGS = 6.0

OrderName = Literal["fcfs", "shortest", "edf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueRules:
    """How prompts wait. Raises ValueError for numbers that are no such rules."""

    order: OrderName = "edf"
    #: See the module.
    ageing_s: float = 10.0
    #: Whether tenants take turns by what they got (`prefill.fairness`); else all prompts are one tenant's.
    fair: bool = True
    #: Shares of tenants where they compete, > 0; those not named have 1.
    tenant_weights: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)

    def __post_init__(self) -> None:
        if not 0 < self.ageing_s < math.inf:
            raise ValueError(f"ageing_s must be above 0 and finite: {self.ageing_s}")
        for tenant, weight in self.tenant_weights.items():
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of tenant {tenant!r} must be above 0 and finite: {weight}")


class Place(NamedTuple):
    """Where a prompt stands: smaller keys go first, equal ones as they came."""

    key: float
    #: Past this time its first token cannot be in time; infinite where it has no target, or none that matters.
    late_after_s: float
    #: Its key from then on; never smaller than `key`.
    late_key: float


def place_of(
    rules: QueueRules,
    *,
    received_s: float,
    tokens: int,
    due_s: float | None = None,
    read_s: float = 0.0,
    priority: int = 0,
) -> Place:
    """The place of a prompt of `tokens` > 0 tokens that are not cached. Pure.

    All times are on one clock. `due_s`: when its first token should be there; None: no target. `read_s`: what reading
    it takes at least.
    """
    ageing_s = rules.ageing_s
    head_start_s = ageing_s * counted_priority(priority)
    if rules.order == "edf":
        unhurried_s = received_s + UNHURRIED_AGEINGS * ageing_s
        late_key = unhurried_s - head_start_s
        if due_s is None or due_s >= unhurried_s:
            return Place(late_key, math.inf, late_key)
        return Place(due_s - head_start_s, due_s - read_s, late_key)
    key = received_s - head_start_s
    if rules.order == "shortest":
        key += ageing_s * math.log2(max(1, tokens))
    return Place(key, math.inf, key)


def longest_span_s(rules: QueueRules, *, max_tokens: int, priorities: int = 2 * MOST_PRIORITY) -> float:
    """No prompt goes before one of its tenant that was received more than this earlier, where both have at most
    `max_tokens` tokens and their priorities differ by at most `priorities`; the default is what counts. Pure."""
    priorities = min(priorities, 2 * MOST_PRIORITY)
    if rules.order == "edf":
        return rules.ageing_s * (UNHURRIED_AGEINGS + priorities)
    ageings = math.log2(max(1, max_tokens)) if rules.order == "shortest" else 0.0
    return rules.ageing_s * (ageings + priorities)
