"""The file that says which format a folder of the disk tier has: whoever reads another leaves the folder alone."""

from __future__ import annotations

from typing import Literal

import msgspec
from xxhash import xxh3_64_hexdigest

from kvstore.ssd.format import FORMAT_VERSION

Standing = Literal["ours", "other", "damaged"]


class _Superblock(msgspec.Struct, frozen=True, kw_only=True):
    what: str
    #: Later formats keep this name and `check`, so that every build can say which one it met.
    format: int
    #: XXH3-64 of "<what> <format>": tells another version from a damaged file.
    check: str


_WHAT = "KV blocks of tandem; delete the folder to drop them"


def superblock() -> bytes:
    """What a folder of this format says."""
    block = _Superblock(what=_WHAT, format=FORMAT_VERSION, check=_check(_WHAT, FORMAT_VERSION))
    return msgspec.json.format(msgspec.json.encode(block), indent=2) + b"\n"


def read_superblock(data: bytes) -> tuple[Standing, int]:
    """Whose the folder is, and its format version (0 where that cannot be read)."""
    try:
        block = msgspec.json.decode(data, type=_Superblock)
    except msgspec.DecodeError:
        return "damaged", 0
    if block.check != _check(block.what, block.format):
        return "damaged", 0
    return ("ours" if block.format == FORMAT_VERSION else "other"), block.format


def _check(what: str, version: int) -> str:
    return xxh3_64_hexdigest(f"{what} {version}".encode())
