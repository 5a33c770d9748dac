"""What may become of a message on the in-memory network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    import random

#: After a loss both ends learn that the connection is broken, as gRPC's keep-alive would tell them.
BROKEN_AFTER_S = 3.0

PacketKind = Literal["request", "hang_up", "body", "reply", "end", "error"]

#: Nothing follows one of these from server to caller. "reply" is a unary call's only body.
LAST_KINDS: frozenset[PacketKind] = frozenset({"reply", "end", "error"})


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """What a fate may depend on: one packet of one call."""

    #: Hosts of the sender and the receiver.
    source: str
    target: str
    method: str
    kind: PacketKind
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fate:
    """What becomes of one message."""

    #: From sending to delivery.
    delay_s: float = 0.0
    #: "lost": nobody is told, nothing later in that direction of the call arrives, and both ends notice after
    #: `BROKEN_AFTER_S`. "reset": every open call of that caller to that address ends now, at both ends; the
    #: callers get WorkerUnavailable.
    outcome: Literal["arrives", "lost", "reset"] = "arrives"
    #: Not None, for the request of a unary call that arrives: it reaches the server once more, so long after the
    #: first, as when a network layer sends a call again. Both are served, the first reply is the call's. The second
    #: ends by itself or at its deadline: it is nobody's to cancel. Of other messages nothing is repeated.
    repeat_after_s: float | None = None


#: Seconds from sending to delivery; None: lost; a `Fate` for all else.
Latency = Callable[[Message, "random.Random"], Fate | float | None]


def loopback_latency(message: Message, rng: random.Random) -> float:
    """0.1 to 0.4 ms, as gRPC takes on one machine."""
    return rng.uniform(0.0001, 0.0004)
