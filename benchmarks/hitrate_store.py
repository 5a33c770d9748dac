"""A store of KV blocks without the KV: what it would hold, by the store's own eviction, and by Belady's."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.eviction import NO_PARENT, Eviction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.config import EvictionPolicyName
    from workload import WorkloadRequest

#: Computing a token takes as long, wherever it stands: hit rates count tokens.
TOKEN_S = 1e-4
TOKEN_BYTES = 1


@dataclass(frozen=True, slots=True)
class Rates:
    """Shares of prompt tokens that were held, in an unbroken run from the start of their prompt."""

    whole: float
    #: Of the requests of the second half alone, by a store that has seen the first.
    second_half: float


class Tally:
    def __init__(self, requests: Sequence[WorkloadRequest]) -> None:
        self._tokens = [0, 0]
        self._hit_tokens = [0, 0]
        self._half = len(requests) // 2

    def add(self, index: int, request: WorkloadRequest, num_blocks: int) -> None:
        half = index >= self._half
        self._tokens[half] += request.prompt_tokens
        self._hit_tokens[half] += min(num_blocks * request.hash_block_tokens, request.prompt_tokens)

    def rates(self) -> Rates:
        return Rates(sum(self._hit_tokens) / sum(self._tokens), self._hit_tokens[1] / self._tokens[1])


def replay(
    requests: Sequence[WorkloadRequest], policy: EvictionPolicyName, capacity_blocks: int, look_ahead: int = 0
) -> Rates:
    """Every prompt is written to the store on arrival; what it lacks takes the places of what `policy` suggests, which
    is never a block of this prompt. `look_ahead`: so many requests behind each are known to wait."""
    eviction = Eviction(policy, capacity_blocks)
    entries: dict[int, int] = {}
    ids: dict[int, int] = {}
    free = list(range(capacity_blocks))[::-1]
    #: Entries of the present prompt.
    ours: set[int] = set()

    def may(entry: int) -> bool:
        return entry not in ours

    tally = Tally(requests)
    for index, request in enumerate(requests):
        now_s = request.arrival_s
        held = [entries.get(hash_id, NO_PARENT) for hash_id in request.hash_ids]
        num_leading = held.index(NO_PARENT) if NO_PARENT in held else len(held)
        tally.add(index, request, num_leading)
        if look_ahead:
            waiting = requests[index + 1 : index + 1 + look_ahead]
            eviction.needed([entries[each] for one in waiting for each in one.hash_ids if each in entries])
        ours.clear()
        ours.update(entry for entry in held if entry != NO_PARENT)
        eviction.hit(sorted(ours), now_s)
        num_missing = len(held) - len(ours)
        for victim in eviction.victims(num_missing - len(free), now_s, may):
            eviction.removed(victim.entry, evicted=True)
            del entries[ids.pop(victim.entry)]
            free.append(victim.entry)
        parent = NO_PARENT
        for position, hash_id in enumerate(request.hash_ids):
            entry = held[position]
            if entry == NO_PARENT:
                if not free:
                    break
                entry = free.pop()
                tokens = min(request.hash_block_tokens, request.prompt_tokens - position * request.hash_block_tokens)
                eviction.stored(
                    entry,
                    position=position,
                    size_bytes=request.hash_block_tokens * TOKEN_BYTES,
                    recompute_s=max(1, tokens) * TOKEN_S,
                    now_s=now_s,
                    key_hint=hash_id + 1,
                    parent=parent,
                )
                entries[hash_id], ids[entry] = entry, hash_id
            parent = entry
    return tally.rates()


def belady(requests: Sequence[WorkloadRequest], capacity_blocks: int) -> Rates:
    """What is needed latest, or never, goes first or does not come in at all (Belady, 1966); among equals the end of
    a prompt. A block is needed no later than those behind it, so no beginning goes before its end."""
    #: By request, when each of its blocks is needed next: the number of that request.
    next_uses: list[list[float]] = []
    seen: dict[int, int] = {}
    for index in range(len(requests) - 1, -1, -1):
        next_uses.append([seen.get(hash_id, math.inf) for hash_id in requests[index].hash_ids])
        seen.update(dict.fromkeys(requests[index].hash_ids, index))
    next_uses.reverse()
    held: dict[int, float] = {}
    #: (minus next use, minus position, id): the latest first. Those used since are skipped.
    latest: list[tuple[float, int, int]] = []
    tally = Tally(requests)
    for index, request in enumerate(requests):
        num_leading = next((at for at, each in enumerate(request.hash_ids) if each not in held), len(request.hash_ids))
        tally.add(index, request, num_leading)
        for position, (hash_id, next_use) in enumerate(zip(request.hash_ids, next_uses[index], strict=True)):
            held.pop(hash_id, None)
            if next_use < math.inf:
                held[hash_id] = next_use
                heapq.heappush(latest, (-next_use, -position, hash_id))
        while len(held) > capacity_blocks:
            minus_next_use, _, hash_id = heapq.heappop(latest)
            if held.get(hash_id) == -minus_next_use:
                del held[hash_id]
    return tally.rates()
