"""Whose prompt is next: virtual token counters (VTC; Sheng et al., "Fairness in Serving Large Language Models",
OSDI'24, algorithm 2), for the prompt tokens that a worker computes.

Each tenant has a counter of the tokens that were computed for it, divided by its weight; of the tenants with waiting
prompts the one with the smallest counter is next. A tenant that comes back after a pause is lifted to the smallest
counter among those that waited all the time (or to that of whoever was served last, when nobody waits): what it did
not ask for it has not saved up. Nobody's turn is left idle, so the worker works as long as anybody waits.

Bound (the paper's for clients with waiting requests, without its decode term): between two tenants that both have
prompts waiting throughout some span, the tokens computed for them in it, each divided by its weight, differ by at most
twice the largest charge divided by its tenant's weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Tenants without waiting prompts whose counters are kept.
MAX_REMEMBERED = 1024


class TokenCounters:
    """Not thread-safe. Operations are O(1), but `next` after a change looks at every tenant that waits."""

    def __init__(self, weights: Mapping[str, float], max_remembered: int = MAX_REMEMBERED) -> None:
        """`weights` > 0; 1 for tenants not named."""
        self._weights = dict(weights)
        self._max_remembered = max_remembered
        #: Tenants that wait, in the order in which they began to.
        self._waiting: dict[str, float] = {}
        #: Of the others: the least recently served first.
        self._resting: dict[str, float] = {}
        #: Where a tenant begins when nobody waits: the counter of the last that stopped waiting.
        self._last: str | None = None
        self._next: str | None = None

    def counter(self, tenant: str) -> float:
        """0 for tenants that were forgotten or never known."""
        return self._waiting.get(tenant, self._resting.get(tenant, 0.0))

    def after(self, tenant: str, counter: float, tokens: int) -> float:
        """What its counter of `counter` would be with so many tokens more."""
        return counter + tokens / self._weights.get(tenant, 1.0)

    def wait(self, tenant: str) -> None:
        """Its first prompt waits."""
        first = self.next() if self._waiting else self._last
        level = 0.0 if first is None else self.counter(first)
        self._waiting[tenant] = max(self._resting.pop(tenant, 0.0), level)
        self._next = None

    def rest(self, tenant: str) -> None:
        """None of its prompts waits any more."""
        self._resting[tenant] = self._waiting.pop(tenant)
        self._last = tenant
        self._next = None
        self._forget()

    def charge(self, tenant: str, tokens: int) -> None:
        """So many prompt tokens are computed for it; to be told when a prompt leaves the queue, before anybody asks
        who is next."""
        if tokens < 0:
            raise ValueError(f"tenant {tenant!r} cannot be charged {tokens} tokens")
        counters = self._waiting if tenant in self._waiting else self._resting
        counters[tenant] = self.after(tenant, counters.pop(tenant, 0.0), tokens)
        self._next = None
        self._forget()

    def next(self) -> str:
        """The tenant with the smallest counter among those that wait; there must be one. Equal ones take turns."""
        if self._next is None:
            waiting = self._waiting
            self._next = next(iter(waiting)) if len(waiting) == 1 else min(waiting, key=waiting.__getitem__)
        return self._next

    def _forget(self) -> None:
        """Resting tenants beyond the limit lose their counters: the one first that has not been served for longest."""
        while len(self._resting) > self._max_remembered:
            oldest = next(tenant for tenant in self._resting if tenant != self._last)
            del self._resting[oldest]
