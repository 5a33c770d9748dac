"""What moves ask of their worker's shell, written down; the answers are given by hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.messages import HandoffReply

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.errors import TandemError
    from contracts.ids import GatewayId
    from contracts.messages import (
        DeclineRequest,
        HandoffRequest,
        Peer,
        RequestKey,
        TakeOverRequest,
        YieldReply,
        YieldRequest,
    )
    from contracts.requests import Claim


@dataclass
class RecordingCalls:
    """Implements `decode.moves.calls.MoveCalls`."""

    offers: list[HandoffRequest] = field(default_factory=list["HandoffRequest"])
    #: Raised by the next offers.
    refusal: TandemError | None = None
    taken_over: list[tuple[TakeOverRequest, Callable[[TandemError | None], None]]] = field(
        default_factory=list["tuple[TakeOverRequest, Callable[[TandemError | None], None]]"]
    )
    yields: list[tuple[YieldRequest, Callable[[YieldReply | TandemError], None]]] = field(
        default_factory=list["tuple[YieldRequest, Callable[[YieldReply | TandemError], None]]"]
    )
    declined: list[DeclineRequest] = field(default_factory=list["DeclineRequest"])
    cancelled: list[RequestKey] = field(default_factory=list["RequestKey"])
    claims: list[Claim] = field(default_factory=list["Claim"])
    #: Gateways that read no frames.
    deaf: set[GatewayId] = field(default_factory=set["GatewayId"])

    async def offer(self, peer: Peer, ask: HandoffRequest, timeout_s: float) -> HandoffReply:
        self.offers.append(ask)
        if self.refusal is not None:
            raise self.refusal
        return HandoffReply(verdict="reserved")

    def take_over(self, peer: Peer, ask: TakeOverRequest, on_answer: Callable[[TandemError | None], None]) -> None:
        self.taken_over.append((ask, on_answer))

    def ask_yield(self, peer: Peer, ask: YieldRequest, on_answer: Callable[[YieldReply | TandemError], None]) -> None:
        self.yields.append((ask, on_answer))

    def decline(self, peer: Peer, ask: DeclineRequest) -> None:
        self.declined.append(ask)

    def cancel(self, peer: Peer, key: RequestKey, reason: str) -> None:
        self.cancelled.append(key)

    def claim(self, gateway_id: GatewayId, claim: Claim) -> None:
        self.claims.append(claim)

    def hears(self, gateway_id: GatewayId) -> bool:
        return gateway_id not in self.deaf
