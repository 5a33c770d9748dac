"""Prompts that wait: the queue that live workers and studies share, in the order of `prefill.ordering` within a tenant
and of `prefill.fairness` between tenants."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable
from heapq import heapify, heappop, heappush, heapreplace, nsmallest
from typing import Generic, TypeVar

from prefill.fairness import TokenCounters
from prefill.ordering import Place, QueueRules, place_of

ItemT = TypeVar("ItemT", bound=Hashable)

#: A line keeps so many entries of items that are gone beside as many as it has items.
_SLACK = 32


class _Entry(Generic[ItemT]):
    __slots__ = ("item", "late_after_s", "late_key", "line", "tokens")

    def __init__(self, item: ItemT, line: _Line[ItemT], tokens: int, place: Place) -> None:
        #: None: gone.
        self.item: ItemT | None = item
        self.line = line
        self.tokens = tokens
        self.late_after_s = place.late_after_s
        self.late_key = place.late_key


class _Line(Generic[ItemT]):
    """The items of one tenant, and some that are gone; by key, then as they came."""

    __slots__ = ("heap", "num_items", "tenant")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.heap: list[tuple[float, int, _Entry[ItemT]]] = []
        self.num_items = 0

    def first(self, now_s: float) -> ItemT:
        """There must be one."""
        heap = self.heap
        while True:
            _, number, entry = heap[0]
            if entry.item is None:
                heappop(heap)
            elif now_s > entry.late_after_s:
                entry.late_after_s = math.inf
                heapreplace(heap, (entry.late_key, number, entry))
            else:
                return entry.item

    def upcoming(self, limit: int, now_s: float) -> list[_Entry[ItemT]]:
        """At most so many, in order."""
        places = (
            (entry.late_key if now_s > entry.late_after_s else key, number, entry)
            for key, number, entry in self.heap
            if entry.item is not None
        )
        return [entry for _, _, entry in nsmallest(limit, places)]

    def note_gone(self) -> None:
        self.num_items -= 1
        if len(self.heap) > 2 * self.num_items + _SLACK:
            self.heap = [place for place in self.heap if place[2].item is not None]
            heapify(self.heap)


class WaitingQueue(Generic[ItemT]):
    """Items without blocks, in the order in which they get them.

    The first changes when a better one comes, when its tenant is charged, and when it turns out to be late: ask anew
    at each decision. Operations are O(log n) amortised, and between tenants as `TokenCounters` says. Not thread-safe.
    """

    def __init__(self, rules: QueueRules) -> None:
        self._rules = rules
        self._counters = TokenCounters(rules.tenant_weights)
        #: Of tenants with items.
        self._lines: dict[str, _Line[ItemT]] = {}
        #: All items, as they came: an OrderedDict finds its first at once though others left before.
        self._entries: OrderedDict[ItemT, _Entry[ItemT]] = OrderedDict()
        self._num_added = 0
        #: Of all items.
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, item: ItemT) -> bool:
        return item in self._entries

    def add(
        self,
        item: ItemT,
        *,
        tokens: int,
        received_s: float,
        tenant: str = "",
        due_s: float | None = None,
        read_s: float = 0.0,
        priority: int = 0,
    ) -> None:
        """`tokens` are those to be computed, as far as known; the rest as in `place_of`. The item must not be here.
        `received_s` should not fall from one call to the next."""
        tenant = tenant if self._rules.fair else ""
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(tenant)
            self._counters.wait(tenant)
        place = place_of(
            self._rules, received_s=received_s, tokens=tokens, due_s=due_s, read_s=read_s, priority=priority
        )
        entry = _Entry(item, line, tokens, place)
        self._entries[item] = entry
        heappush(line.heap, (place.key, self._num_added, entry))
        line.num_items += 1
        self._num_added += 1
        self.num_tokens += tokens

    def first(self, now_s: float) -> ItemT:
        """Whose turn it is; there must be an item."""
        lines = self._lines
        line = next(iter(lines.values())) if len(lines) == 1 else lines[self._counters.next()]
        return line.first(now_s)

    def upcoming(self, limit: int, now_s: float) -> list[ItemT]:
        """At most so many items in the order of their turns, if nobody else comes and each is charged its tokens; the
        first is `first`. O(n) in the items that wait."""
        lines = {tenant: iter(line.upcoming(limit, now_s)) for tenant, line in self._lines.items()}
        counters = {tenant: self._counters.counter(tenant) for tenant in lines}
        items: list[ItemT] = []
        while counters and len(items) < limit:
            tenant = min(counters, key=counters.__getitem__)
            entry = next(lines[tenant], None)
            if entry is None or entry.item is None:
                del counters[tenant]
                continue
            items.append(entry.item)
            counters[tenant] = self._counters.after(tenant, counters[tenant], entry.tokens)
        return items

    def oldest(self) -> ItemT:
        """The one that has waited longest; there must be one."""
        return next(iter(self._entries))

    def discard(self, item: ItemT) -> bool:
        """Takes it out, without charging anybody; False where it is not here."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return False
        entry.item = None
        self.num_tokens -= entry.tokens
        line = entry.line
        line.note_gone()
        if not line.num_items:
            del self._lines[line.tenant]
            self._counters.rest(line.tenant)
        return True

    def charge(self, tenant: str, uncached_tokens: int) -> None:
        """These tokens are going to be computed for this tenant: to be told as soon as its item has left."""
        if self._rules.fair:
            self._counters.charge(tenant, uncached_tokens)
