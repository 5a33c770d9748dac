"""Names for things that cross a process boundary."""

from __future__ import annotations

from typing import NewType

#: One client request as the cluster knows it; unique for the life of a gateway. Made by the gateway.
RequestId = NewType("RequestId", str)

#: A worker's configured name, stable over restarts ("prefill-0").
WorkerId = NewType("WorkerId", str)

#: One life of a process: grows with each start of the same worker. Stale messages are told by it.
Incarnation = NewType("Incarnation", int)

#: A request's try. Grows when the gateway replays a request from its tokens.
Attempt = NewType("Attempt", int)

#: Which worker may stream a request now. Grows with each migration or replay; granted by the gateway.
OwnerEpoch = NewType("OwnerEpoch", int)

#: A gateway process; token frames are addressed to it.
GatewayId = NewType("GatewayId", str)

#: Unique over all holders and their incarnations: "<worker>/<incarnation>/<counter>".
LeaseId = NewType("LeaseId", str)

#: Index of a block in one worker's pool.
BlockId = NewType("BlockId", int)

#: 64-bit count of how often a block was freed; a reader that saw an older one read other bytes.
Generation = NewType("Generation", int)
