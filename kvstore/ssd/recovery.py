"""Finds again what stands in the files of a folder."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import ConfigError, NoCapacity
from kvstore.ssd.format import (
    FORMAT_VERSION,
    PAGE_BYTES,
    SUPERBLOCK,
    block_checksum,
    header_bytes_of,
    parse_segment_path,
    read_header,
    whole_pages,
)
from kvstore.ssd.superblock import read_superblock, superblock

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from contracts.clock import Clock
    from kvstore.ssd.catalogue import Segment
    from kvstore.ssd.files import BlockFiles, FileEntry
    from kvstore.ssd.format import RecordHeader
    from kvstore.ssd.holdings import Holdings

#: Segments that are looked through at once.
_NUM_SCANS = 4
#: What is read at once to find the next record behind a damaged header.
_SEARCH_BYTES = 2**20
#: Superblocks are smaller.
_MAX_SUPERBLOCK_BYTES = 65_536
#: More than any file's age: a clock was wrong.
_OLDEST_S = 10 * 365 * 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovered:
    #: Ours, the newest last.
    segments: Sequence[Segment]
    #: Segments of other identities.
    others: Sequence[FileEntry]
    next_sequence: int


async def open_folder(files: BlockFiles, name: str) -> None:
    """Takes the folder, called `name` in messages, for this process. Raises OSError; ConfigError where the folder is of
    another format: then nothing in it is touched."""
    await files.claim()
    try:
        standing, version = read_superblock(await files.load(SUPERBLOCK, _MAX_SUPERBLOCK_BYTES))
    except FileNotFoundError:
        standing, version = "damaged", 0
    if standing == "other":
        raise ConfigError(
            f"{name} has KV blocks of format {version}, this build reads and writes format {FORMAT_VERSION}: "
            "delete that folder, or give store.ssd.path another one"
        )
    if standing == "damaged":
        # Every record says its format itself: what is of another one is not taken for one of ours.
        await files.replace(SUPERBLOCK, superblock())


async def recover(files: BlockFiles, holdings: Holdings, identity: bytes, clock: Clock) -> Recovered:
    """Enters what the headers in our segments say into the catalogue, which is empty; of a key that stands in several,
    the newest. The blocks' bytes are not looked at. Raises OSError."""
    ours: list[tuple[int, FileEntry]] = []
    others: list[FileEntry] = []
    for entry in await files.list():
        if (named := parse_segment_path(entry.path)) is None:
            continue
        if named[0] == identity:
            ours.append((named[1], entry))
        else:
            others.append(entry)
    ours.sort(key=lambda each: each[0])
    slots = asyncio.Semaphore(_NUM_SCANS)

    async def scan(sequence: int, entry: FileEntry) -> list[tuple[int, RecordHeader]]:
        async with slots:
            return await scan_segment(files, entry.path, sequence, identity, entry.num_bytes)

    scans = await asyncio.gather(*(scan(sequence, entry) for sequence, entry in ours))
    segments: list[Segment] = []
    try:
        for (sequence, entry), records in zip(ours, scans, strict=True):
            if records:
                segments.append(await _enter(files, holdings, entry, sequence, records, clock))
            else:
                holdings.to_delete[entry.path] = entry.num_bytes
    except BaseException:
        holdings.forget_all()
        raise
    return Recovered(segments=segments, others=others, next_sequence=ours[-1][0] + 1 if ours else 1)


async def _enter(
    files: BlockFiles,
    holdings: Holdings,
    entry: FileEntry,
    sequence: int,
    records: list[tuple[int, RecordHeader]],
    clock: Clock,
) -> Segment:
    catalogue = holdings.catalogue
    segment = catalogue.open_segment(sequence, entry.num_bytes)
    for offset, header in records:
        known = catalogue.has(header.keys)
        for index in known.nonzero()[0].tolist():
            # A copy that a crash tore must not hide the one that it was made of.
            known[index] = not await _is_sound(files, entry.path, offset, header.keys[index], header.rows[index])
        rows = header.rows[~known]
        age_s = min(max(clock.wall_s() - header.wall_s, 0.0), _OLDEST_S)
        # Those beyond what is kept track of are passed over.
        with suppress(NoCapacity):
            if len(rows):
                catalogue.record(segment, offset, rows, clock.now_s(), age_s=age_s)
        segment.tail = offset + header.record_bytes
    return segment


async def _is_sound(files: BlockFiles, path: str, offset: int, key: bytes, row: np.void) -> bool:
    """Whether the bytes of one block of the record at `offset` are what was written."""
    start = offset + int(row["start"])
    first_page = start // PAGE_BYTES * PAGE_BYTES
    end = start + int(row["length"])

    def check(data: memoryview) -> bool:
        block = data[start - first_page : end - first_page]
        return len(block) == end - start and block_checksum(key, block) == int(row["checksum"])

    try:
        return await files.read(path, first_page, whole_pages(end) - first_page, check)
    except OSError:
        return False


async def scan_segment(
    files: BlockFiles, path: str, sequence: int, identity: bytes, num_bytes: int
) -> list[tuple[int, RecordHeader]]:
    """Its records and where they begin. Where a header is damaged, the search goes on behind it; a page of zeros ends
    it, for nothing was written from there on. What cannot be read ends it too."""
    found: list[tuple[int, RecordHeader]] = []
    offset = 0
    try:
        while offset + PAGE_BYTES <= num_bytes:
            header, is_blank = await _header_at(files, path, sequence, identity, offset, num_bytes)
            if header is not None:
                found.append((offset, header))
                offset += header.record_bytes
            else:
                next_offset = None if is_blank else await _next_magic(files, path, offset + PAGE_BYTES, num_bytes)
                if next_offset is None:
                    break
                offset = next_offset
    except OSError:
        # What was found before can still be asked for.
        return found
    return found


async def _header_at(
    files: BlockFiles, path: str, sequence: int, identity: bytes, offset: int, num_bytes: int
) -> tuple[RecordHeader | None, bool]:
    """The header there, and whether there is nothing but zeros."""
    page = await files.read(path, offset, PAGE_BYTES, bytes)
    header_bytes = header_bytes_of(memoryview(page))
    if header_bytes > PAGE_BYTES and offset + header_bytes <= num_bytes:
        data = await files.read(path, offset, header_bytes, bytes)
    else:
        data = page
    header = read_header(
        memoryview(data), sequence=sequence, offset=offset, identity=identity, room_bytes=num_bytes - offset
    )
    return header, not any(page)


async def _next_magic(files: BlockFiles, path: str, offset: int, num_bytes: int) -> int | None:
    """The next page that looks like a header's begin."""

    def search(data: memoryview) -> int | None:
        pages = range(0, len(data) - PAGE_BYTES + 1, PAGE_BYTES)
        return next((start for start in pages if header_bytes_of(data[start : start + PAGE_BYTES])), None)

    while offset + PAGE_BYTES <= num_bytes:
        length = min(_SEARCH_BYTES, (num_bytes - offset) // PAGE_BYTES * PAGE_BYTES)
        start = await files.read(path, offset, length, search)
        if start is not None:
            return offset + start
        offset += length
    return None
