"""How a reader finds a holder's side of the collective transport: an rpc address and what to say there."""

from __future__ import annotations

import msgspec

from contracts.errors import BadRequest
from contracts.ids import Incarnation
from kvtransfer.endpoint import decode

SECRET_BYTES = 16


class Endpoint(msgspec.Struct, frozen=True, array_like=True):
    """A registered pool. Only its owner hands this out, and only to those who may read the pool."""

    address: str
    incarnation: Incarnation
    secret: bytes
    num_blocks: int
    block_bytes: int

    def __repr__(self) -> str:
        # Not the secret.
        return f"<Endpoint {self.address} [{self.num_blocks} x {self.block_bytes} bytes]>"


def encode_endpoint(endpoint: Endpoint) -> bytes:
    return msgspec.msgpack.encode(endpoint)


def decode_endpoint(raw: bytes) -> Endpoint:
    """Raises BadRequest for bytes that describe no pool."""
    endpoint = decode(raw, Endpoint, "a collective transport")
    if len(endpoint.secret) != SECRET_BYTES:
        raise BadRequest(f"endpoint of a collective transport: {endpoint!r}")
    return endpoint
