"""One tier's eviction: told what is stored, hit and removed, it says what should go. The store disposes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from contracts.errors import InvariantBroken
from kvstore.eviction import policies
from kvstore.eviction.columns import NO_PARENT, NOT_NEEDED, Columns
from kvstore.eviction.ghosts import Ghosts
from kvstore.eviction.policies import Learned
from kvstore.eviction.reuse import ReuseModel, classes, watched_s
from kvstore.eviction.s3_fifo import S3Fifo
from kvstore.eviction.suggestions import PART_ENTRIES, Suggestions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.config import EvictionPolicyName
    from kvstore.eviction.columns import Rows
    from kvstore.eviction.policies import Score, Scores

_SCORES: dict[EvictionPolicyName, Score] = {
    "lru": policies.lru,
    "lfu_aged": policies.lfu_aged,
    "cost_aware": policies.cost_aware,
    "scheduler_aware": policies.scheduler_aware,
}
_LEARNING: tuple[EvictionPolicyName, ...] = ("cost_aware", "scheduler_aware")

#: The model is brought up to date after so many uses for each entry, at the latest...
_LEARN_SHARE = 1 / 8
#: ... and after so many when there were few.
_LEARN_FIRST = 64
#: What was learned counts half after so many uses for each entry.
_FORGET_TURNOVERS = 32


class Victim(NamedTuple):
    """A suggestion: this entry should go."""

    entry: int
    #: A word for metrics.
    reason: str


class Eviction:
    """Entries are numbers below `capacity_entries`, the tier's own: one that was removed may be stored again as another
    block. Times are the caller's clock, in seconds, and never go back. Not thread-safe; no clock, no chance."""

    def __init__(self, policy_name: EvictionPolicyName, capacity_entries: int) -> None:
        """Raises ValueError for a capacity below 1."""
        if capacity_entries < 1:
            raise ValueError(f"capacity_entries must be at least 1, got {capacity_entries}")
        self.policy_name: EvictionPolicyName = policy_name
        self.capacity_entries = capacity_entries
        # The last row is that of an entry which asks to be admitted.
        self.columns = Columns(capacity_entries + 1)
        self._num_stored = 0
        self._next_serial = 1
        self._s3 = S3Fifo(self.columns, capacity_entries) if policy_name == "s3_fifo" else None
        self._suggestions = Suggestions(self.columns, self._score)
        self._model: ReuseModel | None = None
        self._ghosts: Ghosts | None = None
        if policy_name in _LEARNING:
            self._model = ReuseModel(_FORGET_TURNOVERS * capacity_entries)
            self._ghosts = Ghosts(capacity_entries, self._model)
        self._latest_s = 0.0
        self._uses = 0
        self._learn_after = _LEARN_FIRST
        self._half_life_s = np.inf
        self._needed: Rows = np.zeros(0, np.int64)
        #: What the last victim was worth.
        self._bar = -np.inf

    def __len__(self) -> int:
        """Entries stored."""
        return self._num_stored

    def stored(
        self,
        entry: int,
        *,
        position: int,
        now_s: float,
        size_bytes: int = 1,
        recompute_s: float = 1.0,
        key_hint: int = 0,
        parent: int = NO_PARENT,
        hits: int = 0,
    ) -> None:
        """A block is in the tier as `entry` from now on.

        `position` in its sequence, in blocks. `recompute_s`: what computing it again would take; where all are alike in
        that and in size, neither matters. `key_hint`: 64 bits of its key, by which it is known when it comes back; 0:
        unknown. `parent`: entry of the block before it; without it blocks of one prompt still leave from their end as
        long as they were used together. `hits`: those in another tier that it comes from. Raises InvariantBroken where
        the entry is in use, or the numbers cannot be.
        """
        columns = self.columns
        if not 0 <= entry < self.capacity_entries or columns.is_stored[entry]:
            raise InvariantBroken(f"eviction: entry {entry} of {self.capacity_entries} is in use or cannot be")
        if parent != NO_PARENT and not (0 <= parent < self.capacity_entries and columns.is_stored[parent]):
            raise InvariantBroken(f"eviction: entry {entry} behind {parent}, which is not stored")
        self._fill(entry, position=position, size_bytes=size_bytes, recompute_s=recompute_s, now_s=now_s, hits=hits)
        self._latest_s = now_s
        columns.is_stored[entry] = True
        columns.key_hint[entry] = key_hint
        columns.serial[entry] = self._next_serial
        self._next_serial = (self._next_serial + 1) % 2**32
        columns.parent[entry] = parent
        if parent != NO_PARENT:
            columns.parent_serial[entry] = columns.serial[parent]
            columns.num_children[parent] += 1
            columns.is_inner[parent] = True
        columns.num_touched = max(columns.num_touched, entry + 1)
        self._num_stored += 1
        self._uses += 1
        if self._ghosts is not None:
            hits_before = self._ghosts.come_back(key_hint, now_s)
            if hits_before is not None:
                columns.hits[entry] = max(hits, hits_before + 1)
        if self._s3 is not None:
            self._s3.stored(entry, now_s)

    def hit(self, entries: Rows | Sequence[int], now_s: float) -> None:
        """Distinct entries were used, for one prompt. Raises InvariantBroken where one is not stored."""
        columns = self.columns
        rows = np.asarray(entries, np.int64)
        if not len(rows):
            return
        if rows.min() < 0 or rows.max() >= self.capacity_entries or not columns.is_stored[rows].all():
            raise InvariantBroken(f"eviction: a hit of entries {rows[:16].tolist()}, of which not all are stored")
        self._latest_s = now_s
        idle_s = now_s - columns.last_used_s[rows]
        if self._model is not None:
            self._model.reused(classes(columns.hits[rows], columns.is_inner[rows]), idle_s)
        columns.aged_uses[rows] = columns.aged_uses[rows] * np.exp2(-idle_s / self._half_life_s) + 1.0
        columns.hits[rows] += 1
        columns.last_used_s[rows] = now_s
        self._uses += len(rows)
        if self._s3 is not None:
            self._s3.hit(rows)

    def removed(self, entry: int, evicted: bool) -> None:
        """The entry is not in the tier any more; `evicted`: for want of room, so that it would still be of use. Raises
        InvariantBroken where it is not stored."""
        columns = self.columns
        if not 0 <= entry < self.capacity_entries or not columns.is_stored[entry]:
            raise InvariantBroken(f"eviction: entry {entry} is not stored")
        parent = columns.parent_of(entry)
        if parent != NO_PARENT:
            columns.num_children[parent] -= 1
        if self._s3 is not None:
            self._s3.removed(entry, evicted)
        if self._ghosts is not None and evicted:
            self._ghosts.left(
                int(columns.key_hint[entry]),
                float(columns.last_used_s[entry]),
                int(columns.hits[entry]),
                bool(columns.is_inner[entry]),
                self._latest_s,
            )
        columns.is_stored[entry] = False
        self._num_stored -= 1

    def needed(self, entries: Rows | Sequence[int]) -> None:
        """What waiting requests need, soonest first; replaces what was told before. Entries that are not stored are
        passed over. Raises InvariantBroken for numbers that cannot be entries."""
        columns = self.columns
        columns.need[self._needed] = NOT_NEEDED
        rows = np.asarray(entries, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= self.capacity_entries):
            raise InvariantBroken(f"eviction: entries needed that cannot be; there are {self.capacity_entries}")
        # Of one that is named twice the first rank counts: the one written last.
        ranks = np.flatnonzero(columns.is_stored[rows])[::-1]
        self._needed = rows[ranks]
        columns.need[self._needed] = ranks
        if self.policy_name == "scheduler_aware":
            self._suggestions.forget()

    def victims(self, count: int, now_s: float, may: Callable[[int], bool]) -> list[Victim]:
        """Up to `count` entries to give up, in that order; fewer only where `may` lets no more go.

        `may(entry)`: the store can give it up (nobody reads it, no pin). No entry is suggested before those behind it.
        Nothing changes until the store says `removed`.
        """
        if count < 1:
            return []
        self._latest_s = now_s
        if self._s3 is not None:
            return [Victim(entry, reason) for entry, reason in self._s3.suggest(count, now_s, may)]
        self._learn(now_s)
        found = self._suggestions.suggest(count, now_s, may)
        if found:
            self._bar = found[-1][1]
        return [Victim(entry, self._reason(entry, score)) for entry, score in found]

    def admits(
        self,
        *,
        position: int,
        now_s: float,
        size_bytes: int = 1,
        recompute_s: float = 1.0,
        key_hint: int = 0,
        hits: int = 0,
    ) -> bool:
        """Whether storing such a block, for which something else has to go, is worth it: there is room, or it is worth
        as much as what went last. `hits`: those in the tier that it comes from."""
        if self._s3 is not None or self._num_stored < self.capacity_entries:
            return True
        hits_before = None if self._ghosts is None else self._ghosts.hits(key_hint)
        hits = hits if hits_before is None else max(hits, hits_before + 1)
        asking = self.capacity_entries
        self._fill(asking, position=position, size_bytes=size_bytes, recompute_s=recompute_s, now_s=now_s, hits=hits)
        # Sequences go on more often than not.
        self.columns.is_inner[asking] = True
        return bool(self._score(np.array([asking]), now_s)[0] >= self._bar)

    # --- inside -----------------------------------------------------------------------------------------

    def _fill(self, row: int, *, position: int, size_bytes: int, recompute_s: float, now_s: float, hits: int) -> None:
        if size_bytes < 1 or recompute_s < 0 or position < 0:
            raise InvariantBroken(f"eviction: a block of {size_bytes} bytes, {recompute_s} s, at position {position}")
        columns = self.columns
        columns.last_used_s[row] = now_s
        columns.hits[row] = hits
        columns.aged_uses[row] = 1.0 + hits
        columns.position[row] = position
        columns.size_bytes[row] = size_bytes
        columns.recompute_s[row] = recompute_s
        columns.need[row] = NOT_NEEDED
        columns.is_inner[row] = False
        columns.num_children[row] = 0

    def _score(self, rows: Rows, now_s: float) -> Scores:
        densities = None if self._model is None else self._model.densities
        learned = Learned(self._half_life_s, _NOTHING if densities is None else densities)
        return _SCORES[self.policy_name](self.columns, rows, now_s, learned)

    def _learn(self, now_s: float) -> None:
        if self._uses < self._learn_after:
            return
        columns = self.columns
        # Of a large tier a sample, like the suggestions.
        step = -(-columns.num_touched // PART_ENTRIES)
        rows = np.arange(0, columns.num_touched, step)
        rows = rows[columns.is_stored[rows]]
        idle_s = now_s - columns.last_used_s[rows]
        self._half_life_s = max(1.0, float(idle_s.mean())) if len(rows) else np.inf
        if self._model is not None and self._ghosts is not None:
            here = watched_s(classes(columns.hits[rows], columns.is_inner[rows]), idle_s)
            self._model.learn(step * here + self._ghosts.tell(now_s), self._uses)
        self._learn_after = min(2 * self._learn_after, max(_LEARN_FIRST, int(_LEARN_SHARE * self.capacity_entries)))
        self._uses = 0
        self._suggestions.forget()

    def _reason(self, entry: int, score: float) -> str:
        columns = self.columns
        if score == -np.inf:
            return "no_beginning"
        if columns.need[entry] != NOT_NEEDED and self.policy_name == "scheduler_aware":
            return "needed_latest"
        return _REASONS[self.policy_name] if columns.hits[entry] else "never_reused"


_NOTHING = np.zeros((0, 0))
_REASONS: dict[EvictionPolicyName, str] = {
    "lru": "least_recently_used",
    "lfu_aged": "least_often_used",
    "cost_aware": "least_worth",
    "scheduler_aware": "least_worth",
}
