"""What a reader must know to reach a pool over UCX, and what it checks before it hands that to a C library."""

from __future__ import annotations

import hashlib

import msgspec

from contracts.errors import BadRequest
from contracts.ids import Incarnation
from kvtransfer.endpoint import decode

DIGEST_BYTES = 16


class UcxEndpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What `LeaseTerms.endpoints` holds for this transport. Whoever has it and reaches the network may read the
    pool."""

    #: Never two lives have the same one.
    agent: str
    #: NIXL's own description of the agent: addresses and memory keys. Opaque, and versioned by `software`.
    metadata: bytes
    software: str
    #: Where block 0 begins, in the holder's process or device.
    address: int
    num_blocks: int
    block_bytes: int
    #: Number of the CUDA device that holds the pool; None: host memory.
    device: int | None
    incarnation: Incarnation
    #: Of all the other fields: finds damage, not malice.
    digest: bytes = b""

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def __repr__(self) -> str:
        return f"<UcxEndpoint {self.agent} [{self.num_blocks} x {self.block_bytes} bytes]>"


def encode_endpoint(endpoint: UcxEndpoint) -> bytes:
    """Sets the digest."""
    return msgspec.msgpack.encode(msgspec.structs.replace(endpoint, digest=_digest(endpoint)))


def decode_endpoint(raw: bytes) -> UcxEndpoint:
    """Raises BadRequest for bytes that describe no pool. Nothing else may reach NIXL, which crashes on some."""
    endpoint = decode(raw, UcxEndpoint, "a UCX pool")
    if endpoint.digest != _digest(endpoint):
        raise BadRequest(f"endpoint of a UCX pool: damaged: {endpoint!r}")
    if endpoint.address < 1:
        raise BadRequest(f"endpoint of a UCX pool: {endpoint!r}")
    return endpoint


def _digest(endpoint: UcxEndpoint) -> bytes:
    content = msgspec.msgpack.encode(msgspec.structs.replace(endpoint, digest=b""))
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
