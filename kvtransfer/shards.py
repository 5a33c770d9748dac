"""Which bytes of a holder rank's block go where in a reader rank's block, when the two sides split heads differently.

A tensor-parallel rank keeps its own heads of every block: `[own head, layer, k/v, token, head_dim]`, a slice of the
model's block (`contracts.layout.BlockLayout`), because heads come first. With `degree` ranks and at least as many
heads, rank r keeps the r-th of `degree` equal runs of heads. With fewer heads than ranks each head is kept by
`degree / heads` neighbouring ranks.

Everything here is arithmetic on sizes; nothing touches a byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from contracts.layout import BlockLayout


@dataclass(frozen=True, slots=True, order=True)
class ByteRange:
    """`num_bytes` that go from byte `source` of the holder rank's block to byte `target` of the reader rank's."""

    target: int
    source: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's share of every block of a model."""

    layout: BlockLayout
    degree: int
    rank: int

    def __post_init__(self) -> None:
        """Raises ConfigError where the heads cannot be split so, or there is no such rank."""
        heads = self.layout.num_kv_heads
        if not 0 <= self.rank < self.degree:
            raise ConfigError(f"rank {self.rank} of {self.degree}")
        if heads % self.degree and self.degree % heads:
            raise ConfigError(f"{heads} KV heads cannot be shared by {self.degree} ranks: neither divides the other")

    @property
    def heads(self) -> range:
        """The model's heads that this rank keeps."""
        heads = self.layout.num_kv_heads
        if heads >= self.degree:
            each = heads // self.degree
            return range(self.rank * each, (self.rank + 1) * each)
        only = self.rank * heads // self.degree
        return range(only, only + 1)

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in a block: all layers, keys and values."""
        return self.layout.block_bytes // self.layout.num_kv_heads

    @property
    def block_bytes(self) -> int:
        """Bytes of this rank's block."""
        return len(self.heads) * self.head_bytes

    def offset_of(self, head: int) -> int:
        """Where a head of the model begins in this rank's block."""
        return (head - self.heads.start) * self.head_bytes


def sources(reader: Shard, holder_degree: int) -> tuple[int, ...]:
    """The holder ranks that together have every byte of the reader rank's block, each head from one of them.

    Of ranks that keep the same head, readers of the same head take different ones where they can, so that the
    copies share the load. Raises ConfigError where the holder's side cannot be split so.
    """
    Shard(reader.layout, holder_degree, 0)  # raises
    return tuple(dict.fromkeys(_rank_for(reader, head, holder_degree) for head in reader.heads))


def ranges(holder: Shard, reader: Shard) -> tuple[ByteRange, ...]:
    """What the reader rank takes from this holder rank, in the fewest pieces, by place in the reader's block.

    Over all of `sources` the pieces cover each byte of the reader's block once. Empty for any other holder rank.
    Raises ConfigError for two different models.
    """
    if holder.layout != reader.layout:
        raise ConfigError(f"layout: {holder.layout} at the holder, {reader.layout} at the reader")
    pieces: list[ByteRange] = []
    for head in reader.heads:
        if _rank_for(reader, head, holder.degree) != holder.rank:
            continue
        piece = ByteRange(reader.offset_of(head), holder.offset_of(head), reader.head_bytes)
        last = pieces[-1] if pieces else None
        if last is not None and _continues(last, piece):
            pieces[-1] = ByteRange(last.target, last.source, last.num_bytes + piece.num_bytes)
        else:
            pieces.append(piece)
    return tuple(pieces)


def _continues(last: ByteRange, piece: ByteRange) -> bool:
    return last.target + last.num_bytes == piece.target and last.source + last.num_bytes == piece.source


def _rank_for(reader: Shard, head: int, holder_degree: int) -> int:
    """The one holder rank that a head comes from."""
    heads = reader.layout.num_kv_heads
    if holder_degree <= heads:
        return head // (heads // holder_degree)
    copies = holder_degree // heads
    # Readers that keep this head too: the n-th of them takes the n-th of the holder's copies, in turns.
    readers = max(1, reader.degree // heads)
    return head * copies + (reader.rank % readers) * copies // readers
