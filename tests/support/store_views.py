"""What those around a store's machine hold: readers, its disk, workers that give, and the coordinator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import BlockId, Generation
    from kvstore.tiers.events import ReadDisk, WriteDisk


def content(key: bytes) -> bytes:
    return b"kv of " + key


@dataclass(slots=True)
class Fetch:
    """What one reader knows."""

    keys: tuple[bytes, ...]
    blocks: tuple[BlockId, ...] = ()
    #: Blocks that it may read, from the first on.
    num_ready: int = 0
    #: Its lease will not grow any more: how many blocks it has, 0 where it was withdrawn.
    end: int | None = None


@dataclass(slots=True)
class Read:
    order: ReadDisk
    generations: tuple[Generation, ...]
    #: Blocks whose bytes the disk has begun to put down.
    begun: set[int] = field(default_factory=set[int])
    done: set[int] = field(default_factory=set[int])

    @property
    def undone(self) -> list[bytes]:
        return [key for index, key in enumerate(self.order.keys) if index not in self.done]


@dataclass(slots=True)
class Write:
    order: WriteDisk
    generations: tuple[Generation, ...]
    #: Blocks that stand on disk.
    landed: set[int] = field(default_factory=set[int])


@dataclass(slots=True)
class Keep:
    """Blocks that come from a worker."""

    keys: tuple[bytes, ...]
    #: Of the first key.
    position: int
    blocks: list[BlockId]
    #: Blocks whose bytes are whole.
    num_landed: int = 0


class KeySet:
    """`KeyNews`: the keys that the coordinator believes to be here."""

    def __init__(self, keys: Sequence[bytes]) -> None:
        self.keys = set(keys)

    def stored(self, key: bytes) -> None:
        self.keys.add(key)

    def removed(self, key: bytes) -> None:
        self.keys.discard(key)
