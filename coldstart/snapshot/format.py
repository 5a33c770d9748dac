"""The file: sections in the order in which the next life is expected to need them, and a table of them.

    0       16 bytes "tandem-snapshot\\n"
    16      version, and the table's offset, length and checksum (little endian: u32, 4 bytes of zeros, u64, u64, u64)
    48      the sections' bytes, one after another
            the table (MessagePack), to the end of the file

A file without its header is none: that is written last. The table says what the state is of, and of every section its
kind, its codec and the XXH3-64 of its stored bytes. Damage to a section costs that section, damage to anything else all
of them. (Sabre, OSDI'24, restores the pages of a snapshot in the order of a recorded start, compressed; here the
recorded unit is what a worker asks for: a block of KV, or a section.)
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Annotated

import msgspec
import xxhash

from contracts.errors import LoadError
from contracts.layout import KvIdentity

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"tandem-snapshot\n"
VERSION = 1
_HEAD = struct.Struct("<I4xQQQ")
HEADER_BYTES = len(MAGIC) + _HEAD.size
#: Of a table: a million blocks have one of some 80 MB.
MAX_TABLE_BYTES = 256 << 20
#: Of a section, stored or not: what a reader has in memory at once.
MAX_SECTION_BYTES = 64 << 20
KEY_BYTES = 32

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
_Word = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
_Key = Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]


class Owner(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a snapshot is of: in any other life it means nothing."""

    #: Model, dtype and layout of KV.
    identity: KvIdentity
    #: The program that computed it.
    build: str

    def mismatch(self, other: Owner) -> str | None:
        """The first difference, with both values; None: what one wrote the other may use."""
        if (found := self.identity.mismatch(other.identity)) is not None:
            return found
        return None if self.build == other.build else f"build: {self.build!r} here, {other.build!r} there"


class BlockEntry(msgspec.Struct, frozen=True, array_like=True):
    """One block of a section of KV."""

    key: _Key
    #: The key of the block before it; None of the first of a prompt. Without that one nobody finds this one.
    parent: _Key | None
    #: Prompts that shared it lately.
    uses: Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: _Word
    #: What its bytes mean ("kv", "steps").
    kind: _Word
    codec: _Word
    offset: _Size
    stored_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SECTION_BYTES)]
    num_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_SECTION_BYTES)]
    #: XXH3-64 of the stored bytes.
    checksum: Annotated[int, msgspec.Meta(ge=0)]
    #: What it holds, where that are blocks: all of one size.
    blocks: tuple[BlockEntry, ...] = ()


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    owner: Owner
    sections: tuple[Section, ...]


class Head(msgspec.Struct, frozen=True):
    table_offset: int
    table_bytes: int
    table_checksum: int


_TABLE = msgspec.msgpack.Decoder(Table)


def checksum(data: Buffer) -> int:
    """XXH3-64: finds damage, is no defence against forgery."""
    return xxhash.xxh3_64_intdigest(data)


def encode_table(table: Table) -> bytes:
    return msgspec.msgpack.encode(table)


def encode_head(table_offset: int, table: bytes) -> bytes:
    return MAGIC + _HEAD.pack(VERSION, table_offset, len(table), checksum(table))


def decode_head(data: bytes, file_bytes: int, *, where: str) -> Head:
    """`data`: the first bytes of a file of `file_bytes`. Raises LoadError beginning with `where`."""
    if len(data) < HEADER_BYTES or data[: len(MAGIC)] != MAGIC:
        raise LoadError(f"{where}: not a snapshot, or one that was not written to its end")
    version, offset, length, expected = _HEAD.unpack_from(data, len(MAGIC))
    if version != VERSION:
        raise LoadError(f"{where}: written in version {version} of the format, read here is version {VERSION}")
    if offset < HEADER_BYTES or length > MAX_TABLE_BYTES or offset + length != file_bytes:
        raise LoadError(f"{where}: damaged: {file_bytes} bytes, a table of {length} from {offset} on")
    return Head(offset, length, expected)


def decode_table(data: bytes, head: Head, *, where: str) -> Table:
    """What is returned is consistent in itself. Raises LoadError beginning with `where`."""
    if len(data) != head.table_bytes or checksum(data) != head.table_checksum:
        raise LoadError(f"{where}: damaged: the checksum of its table is wrong")
    try:
        table = _TABLE.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise LoadError(f"{where}: its table cannot be read: {error}") from error
    end = HEADER_BYTES
    for section in table.sections:
        if section.offset != end:
            raise LoadError(f"{where}: section {section.name} begins at {section.offset}, not at {end}")
        end += section.stored_bytes
        if section.blocks and section.num_bytes % len(section.blocks):
            raise LoadError(
                f"{where}: section {section.name}: {section.num_bytes} bytes in {len(section.blocks)} blocks"
            )
    if end != head.table_offset:
        raise LoadError(f"{where}: sections end at {end}, the table begins at {head.table_offset}")
    return table
