"""What the endpoints of all transports have in common: MessagePack that describes a pool."""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from contracts.errors import BadRequest


class PoolEndpoint(Protocol):
    @property
    def num_blocks(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...


EndpointT = TypeVar("EndpointT", bound=PoolEndpoint)


def decode(raw: bytes, kind: type[EndpointT], what: str) -> EndpointT:
    """Raises BadRequest, naming `what`, for bytes that describe no pool. The endpoint's `repr` tells no secret."""
    try:
        endpoint = msgspec.msgpack.decode(raw, type=kind)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"endpoint of {what}: {error}") from error
    if endpoint.num_blocks < 1 or endpoint.block_bytes < 1:
        raise BadRequest(f"endpoint of {what}: {endpoint!r}")
    return endpoint
