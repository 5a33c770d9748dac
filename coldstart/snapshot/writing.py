"""Writes a snapshot: all of it takes the place of the one before, or nothing does."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldstart.durable import DurableFiles
from coldstart.snapshot.format import (
    HEADER_BYTES,
    MAX_SECTION_BYTES,
    BlockEntry,
    Section,
    Table,
    checksum,
    encode_head,
    encode_table,
)
from contracts.errors import Cancelled, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from coldstart.snapshot.codecs import CodecRegistry
    from coldstart.snapshot.format import Owner

_FILE_MODE = 0o600
PART_SUFFIX = ".part"
_SYNC_BYTES = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A section to be."""

    name: str
    kind: str
    codec: str
    #: Called once, when its turn has come: only one section is in memory at a time.
    data: Callable[[], memoryview]
    blocks: tuple[BlockEntry, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    num_bytes: int
    num_sections: int
    num_blocks: int


def write_snapshot(
    path: Path,
    owner: Owner,
    drafts: Iterable[Draft],
    codecs: CodecRegistry,
    *,
    is_enough: Callable[[], bool] = lambda: False,
    is_cancelled: Callable[[], bool] = lambda: False,
    files: DurableFiles | None = None,
) -> Written:
    """Blocks. What is there stays until all is written. Once there `is_enough`, no further section is begun:
    those needed first are there by then.

    Raises LoadError when the disk takes no more, Cancelled when `is_cancelled` says so between two
    sections. Then nothing is left of the new one; a process that is killed leaves a file named `*.part`.
    """
    files = files or DurableFiles()
    part = path.with_name(f"{path.name}.{os.getpid()}{PART_SUFFIX}")
    try:
        files.make_folder(path.parent)
        try:
            descriptor = files.open(part)
            try:
                os.fchmod(descriptor, _FILE_MODE)
                written = _fill(descriptor, owner, drafts, codecs, is_enough, is_cancelled, files)
                files.sync(descriptor)
            finally:
                os.close(descriptor)
            # Whoever cancels may change what was read from then on, and not before.
            _go_on(is_cancelled)
            files.rename(part, path)
        except Exception:
            files.remove(part)
            raise
        files.sync_folder(path.parent)
    except OSError as error:
        raise LoadError(f"{path}: cannot be written: {error.strerror}") from error
    return written


def _fill(
    descriptor: int,
    owner: Owner,
    drafts: Iterable[Draft],
    codecs: CodecRegistry,
    is_enough: Callable[[], bool],
    is_cancelled: Callable[[], bool],
    files: DurableFiles,
) -> Written:
    files.truncate(descriptor, 0)
    sections: list[Section] = []
    end = synced = HEADER_BYTES
    for draft in drafts:
        _go_on(is_cancelled)
        if is_enough():
            break
        data = draft.data()
        if data.nbytes > MAX_SECTION_BYTES:
            raise LoadError(
                f"section {draft.name} of a snapshot has {data.nbytes} bytes, more than {MAX_SECTION_BYTES}"
            )
        codec, stored = codecs.encode(draft.codec, data)
        with memoryview(stored) as view:
            files.write(descriptor, view, end)
            sections.append(
                Section(
                    name=draft.name,
                    kind=draft.kind,
                    codec=codec,
                    offset=end,
                    stored_bytes=view.nbytes,
                    num_bytes=data.nbytes,
                    checksum=checksum(view),
                    blocks=draft.blocks,
                )
            )
            end += view.nbytes
        if end - synced >= _SYNC_BYTES:
            # Else most of the time would be taken by the last one, when it is too late to write less.
            files.sync(descriptor)
            synced = end
    table = encode_table(Table(owner=owner, sections=tuple(sections)))
    files.write(descriptor, table, end)
    # Until this stands the file is none.
    files.write(descriptor, encode_head(end, table), 0)
    return Written(end + len(table), len(sections), sum(len(section.blocks) for section in sections))


def _go_on(is_cancelled: Callable[[], bool]) -> None:
    if is_cancelled():
        raise Cancelled("a snapshot is not written to its end")
