"""What the disk tier of checkpoints writes down beside them, and how it is checked."""

from __future__ import annotations

import hashlib

import msgspec
import xxhash

from contracts.errors import CorruptCheckpoint

VERSION = 1
#: Smaller files carry a checksum and are checked whenever the checkpoint is taken; those of weights have checksums of
#: their own (`coldstart.format`), and are checked when they are read.
MAX_CHECKED_BYTES = 64 << 20

_HASH_CHARS = 16


class CheckpointKey(msgspec.Struct, frozen=True, order=True, kw_only=True):
    """What a tier's checkpoint is of. Two with equal keys hold the same weights in the same form."""

    #: `engine.safetensors_files.model_fingerprint`, or, before a checkpoint was ever here, what tells contents of a
    #: remote folder apart (`coldstart.download_plan.original_key`).
    identity: str
    dtype: str
    tensor_parallel: int

    @property
    def folder(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()[:40]


class KeptFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_bytes: int
    #: XXH3-64; None for a large one.
    checksum: int | None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Beside each whole checkpoint of a tier; its time of change is that of the last use."""

    version: int
    key: CheckpointKey
    #: Where it came from, for people.
    origin: str
    files: tuple[KeptFile, ...]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)


class Reservation(msgspec.Struct, frozen=True, kw_only=True):
    """Beside each checkpoint that is being written."""

    version: int
    key: CheckpointKey
    num_bytes: int


def encode_record(record: Manifest | Reservation) -> bytes:
    body = msgspec.json.encode(record)
    return f"{xxhash.xxh3_64_hexdigest(body)}\n".encode() + body


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Raises CorruptCheckpoint."""
    try:
        found = msgspec.json.decode(_body(data, where), type=Manifest)
    except msgspec.DecodeError as error:
        raise CorruptCheckpoint(f"{where}: damaged: {error}") from error
    if found.version != VERSION:
        raise CorruptCheckpoint(f"{where}: of version {found.version}, read here is version {VERSION}")
    return found


def decode_reservation(data: bytes, *, where: str) -> Reservation:
    """Raises CorruptCheckpoint."""
    try:
        return msgspec.json.decode(_body(data, where), type=Reservation)
    except msgspec.DecodeError as error:
        raise CorruptCheckpoint(f"{where}: damaged: {error}") from error


def _body(data: bytes, where: str) -> bytes:
    head, _, body = data.partition(b"\n")
    if len(head) != _HASH_CHARS or xxhash.xxh3_64_hexdigest(body).encode() != head:
        raise CorruptCheckpoint(f"{where}: damaged: its checksum is wrong")
    return body
