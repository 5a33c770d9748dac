"""Limits of the disk tier."""

from __future__ import annotations

from dataclasses import dataclass

from contracts.errors import ConfigError
from kvstore.ssd.format import aligned, header_bytes_for, whole_pages

_MIB = 2**20
#: A tier has at least so many segments: one fills, one is free for what is moved, the others are given up in turn.
_FEWEST_SEGMENTS = 4
#: A segment holds at least so many blocks.
_FEWEST_BLOCKS = 8
#: No codec is expected to make blocks smaller than one part in so many.
_SMALLEST_SHARE = 16
_MOST_BLOCKS = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SsdSettings:
    #: What all files take at most.
    size_bytes: int
    #: One file. Smaller where `size_bytes` is small, larger where blocks are large: see `segment_bytes_for`.
    segment_bytes: int = 64 * _MIB
    #: Payload of one write, and of one read.
    record_bytes: int = 8 * _MIB
    read_bytes: int = 2 * _MIB
    #: Reads under way at once; more wait.
    num_reads: int = 4
    #: What may wait to be written or read: more is not taken.
    max_write_queue_bytes: int = 256 * _MIB
    max_read_queue_bytes: int = 2048 * _MIB
    #: What a read or a write may take in all.
    read_timeout_s: float = 5.0
    write_timeout_s: float = 30.0
    #: Finding what stands in the folder.
    open_timeout_s: float = 60.0
    #: What is written is safe from a crash of the machine after so long.
    sync_interval_s: float = 1.0
    #: Worth of a block halves whenever this share of the tier was written: the oldest of those that nobody asked for is
    #: worth a sixteenth of the newest.
    half_life_share: float = 0.25
    #: Of a segment that is given up, at most this share is written anew because it is worth it: writes grow by a third
    #: at most.
    kept_share: float = 0.25
    #: A segment of which pinned blocks take more than what this leaves is not given up.
    least_gain: float = 0.5
    #: How fast old segments are looked through for damage; 0: not at all.
    scrub_bytes_per_s: float = 16 * _MIB

    def __post_init__(self) -> None:
        for name in ("size_bytes", "segment_bytes", "record_bytes", "read_bytes", "num_reads", "half_life_share"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} of the disk tier is {getattr(self, name)}; it must be positive")

    def record_bytes_for(self, block_bytes: int) -> int:
        """Payload of a record: at least one block, and little of a segment, so that one fits beside what is moved."""
        share = self.segment_bytes_for(block_bytes) // 8 - header_bytes_for(1)
        return max(min(self.record_bytes, share), aligned(block_bytes))

    def max_blocks_for(self, block_bytes: int) -> int:
        """Blocks that are kept track of, however small a codec makes them."""
        return min(max(_SMALLEST_SHARE * self.size_bytes // block_bytes, 1024), _MOST_BLOCKS)

    def segment_bytes_for(self, block_bytes: int) -> int:
        """Of each new file. Raises ConfigError where the tier is too small for blocks of this size."""
        least = header_bytes_for(1) + whole_pages(block_bytes)
        fewest = _FEWEST_BLOCKS * least
        wanted = max(min(self.segment_bytes, self.size_bytes // 16), fewest)
        if _FEWEST_SEGMENTS * wanted > self.size_bytes:
            raise ConfigError(
                f"a disk tier of {self.size_bytes} bytes is too small for blocks of {block_bytes}: "
                f"it needs at least {_FEWEST_SEGMENTS * fewest}"
            )
        return whole_pages(wanted)
