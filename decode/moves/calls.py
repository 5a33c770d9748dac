"""What the moves of a worker ask of its shell: calls to peers and gateways. None of them waits, none raises."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from contracts.errors import TandemError
    from contracts.ids import GatewayId
    from contracts.messages import (
        DeclineRequest,
        HandoffReply,
        HandoffRequest,
        Peer,
        RequestKey,
        TakeOverRequest,
        YieldReply,
        YieldRequest,
    )
    from contracts.requests import Claim


class MoveCalls(Protocol):
    def offer(self, peer: Peer, ask: HandoffRequest, timeout_s: float) -> Awaitable[HandoffReply]:
        """The one that is awaited, by the holder of the lease; it raises what was answered."""
        ...

    def take_over(self, peer: Peer, ask: TakeOverRequest, on_answer: Callable[[TandemError | None], None]) -> None:
        """`on_answer` is called once: None: taken."""
        ...

    def ask_yield(self, peer: Peer, ask: YieldRequest, on_answer: Callable[[YieldReply | TandemError], None]) -> None:
        """`on_answer` is called once."""
        ...

    def decline(self, peer: Peer, ask: DeclineRequest) -> None:
        """Tells the source of a move, as well as can be."""
        ...

    def cancel(self, peer: Peer, key: RequestKey, reason: str) -> None:
        """Tells a peer to forget it, as well as can be."""
        ...

    def claim(self, gateway_id: GatewayId, claim: Claim) -> None:
        """With the next frame, which leaves at once. It is answered by a GRANT, or not."""
        ...

    def hears(self, gateway_id: GatewayId) -> bool:
        """Whether that gateway reads this worker's frames."""
        ...
