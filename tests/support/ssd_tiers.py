"""Small disk tiers for tests: blocks whose bytes follow from their key, over files in memory or a real folder."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from contracts.layout import BlockLayout, KvIdentity
from kvstore.ssd.records import StoredBlock
from kvstore.ssd.settings import SsdSettings
from kvstore.ssd.tier import SsdTier
from simulator.clock import VirtualClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from kvstore.ssd.files import BlockFiles

#: 3,072 bytes a block: not whole pages.
LAYOUT = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=16, block_tokens=4, dtype="float32")
BLOCK_BYTES = LAYOUT.block_bytes
IDENTITY = KvIdentity(model_fingerprint="m", layout=LAYOUT, rope_base=10000.0, protocol_version=1)
OTHER_IDENTITY = KvIdentity(model_fingerprint="n", layout=LAYOUT, rope_base=10000.0, protocol_version=1)

#: Eight records of two blocks each.

SEGMENT_BYTES = 24 * 4096

SETTINGS = SsdSettings(size_bytes=16 * SEGMENT_BYTES, segment_bytes=SEGMENT_BYTES, scrub_bytes_per_s=0)


def settings(**changes: Any) -> SsdSettings:
    values = {name: getattr(SETTINGS, name) for name in SETTINGS.__slots__}
    return SsdSettings(**{**values, **changes})


def key(number: int) -> bytes:
    return hashlib.sha256(b"%d" % number).digest()


def payload(number: int) -> bytes:
    return hashlib.shake_128(b"block %d" % number).digest(BLOCK_BYTES)


def block(number: int, *, lossy: bool = False) -> StoredBlock:
    return StoredBlock(key=key(number), position=number, payload=memoryview(payload(number)), lossy=lossy)


def blocks(numbers: Iterable[int]) -> list[StoredBlock]:
    return [block(number) for number in numbers]


@asynccontextmanager
async def open_tier(files: BlockFiles, **changes: Any) -> AsyncGenerator[SsdTier]:
    """`changes` are of the tier's arguments."""
    values: dict[str, Any] = {"identity": IDENTITY, "settings": SETTINGS, "clock": None, **changes}
    values["clock"] = values["clock"] or VirtualClock()
    async with SsdTier(files=files, **values) as tier:
        yield tier


async def read(tier: SsdTier, numbers: Sequence[int]) -> list[bytes | None]:
    """The bytes that are there; None for a miss. What is there must be what was stored."""
    targets = [bytearray(BLOCK_BYTES) for _ in numbers]
    told: list[tuple[int, bool]] = []
    found = await tier.read(
        [key(number) for number in numbers],
        [memoryview(target) for target in targets],
        lambda index, is_there: told.append((index, is_there)),
    )
    assert told == list(enumerate(found)), "each is told once, in order"
    for number, target, is_there in zip(numbers, targets, found, strict=True):
        assert not is_there or bytes(target) == payload(number), f"wrong bytes for {number}"
    return [bytes(target) if is_there else None for target, is_there in zip(targets, found, strict=True)]


async def held(tier: SsdTier, numbers: Sequence[int]) -> list[int]:
    """Those of the numbers that can be read."""
    found = await read(tier, numbers)
    return [number for number, data in zip(numbers, found, strict=True) if data is not None]
