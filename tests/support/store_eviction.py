"""Eviction policies for a store's memory: the real ones, and any whatsoever; what they are told is written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from kvstore.tiers.dram import EvictionSuggestions, Victim


@dataclass(frozen=True, slots=True)
class Suggested:
    entry: int


class RecordingEviction:
    """`EvictionSuggestions` that remembers what it was told, and sees that it was told what can be.

    Whom it names: as `policy` does; without one least recently used first, what is needed last; or anyone, with `rng`:
    then the store's own care is all that keeps what must stay.
    """

    def __init__(self, policy: EvictionSuggestions | None = None, *, rng: random.Random | None = None) -> None:
        self._policy = policy
        self._rng = rng
        #: All entries, least recently used first, and their positions.
        self.entries: dict[int, int] = {}
        self.need: tuple[int, ...] = ()
        #: Entries that went for want of room, in order.
        self.evicted: list[int] = []

    def stored(self, entry: int, *, position: int, now_s: float, key_hint: int = 0) -> None:
        assert entry not in self.entries, f"entry {entry} is stored twice"
        self.entries[entry] = position
        if self._policy is not None:
            self._policy.stored(entry, position=position, now_s=now_s, key_hint=key_hint)

    def hit(self, entries: Sequence[int], now_s: float) -> None:
        for entry in entries:
            self.entries[entry] = self.entries.pop(entry)
        if self._policy is not None:
            self._policy.hit(entries, now_s)

    def removed(self, entry: int, *, evicted: bool) -> None:
        del self.entries[entry]
        if evicted:
            self.evicted.append(entry)
        if self._policy is not None:
            self._policy.removed(entry, evicted=evicted)

    def needed(self, entries: Sequence[int]) -> None:
        unknown = [entry for entry in entries if entry not in self.entries]
        assert not unknown, f"entries {unknown} are needed, and hold nothing"
        self.need = tuple(entries)
        if self._policy is not None:
            self._policy.needed(entries)

    def victims(self, count: int, now_s: float, may: Callable[[int], bool]) -> Sequence[Victim]:
        rank = {entry: index for index, entry in enumerate(reversed(self.need), 1)}
        order = [entry for entry in sorted(self.entries, key=lambda entry: rank.get(entry, 0)) if may(entry)]
        if self._policy is not None:
            found = self._policy.victims(count, now_s, may)
            assert len(found) == min(count, len(order)), "a policy names all that are needed, if so many may go"
            return found
        if self._rng is not None:
            self._rng.shuffle(order)
        return [Suggested(entry) for entry in order[:count]]
