"""Token deltas on their way to gateways: one frame per step and gateway, never waiting for a reader.

A gateway that does not read is not allowed to fill this worker's memory: past `max_pending_deltas`, or after
`UNATTENDED_S` without a stream, it is given up: its deltas are dropped and its requests cancelled.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import WorkerUnavailable
from contracts.failpoints import Failpoint, RarePath
from contracts.requests import Frame

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from contracts.clock import Clock
    from contracts.ids import GatewayId, Incarnation, WorkerId
    from contracts.requests import Claim, GenerateRequest, TokenDelta

#: An empty frame goes out after this much silence, so that a gateway can tell idle from hung.
SIGN_OF_LIFE_S = 1.0
#: A gateway without a stream for this long is gone; nobody waits for its requests' tokens. One that lives opens a
#: lost stream again within a fraction of a second, and replays the requests of one that it cannot.
UNATTENDED_S = 3.0

_FLUSHED_LATER = Failpoint("worker.flushed_later", "what a step wrote leaves after a later one")

_GIVEN_UP = RarePath("worker.gateway_given_up", "a gateway that went away, or fell behind, was given up")


class _Mailbox:
    """Deltas for one gateway, and the flag that wakes its stream."""

    def __init__(self, now_s: float) -> None:
        self.deltas: list[TokenDelta] = []
        self.claims: list[Claim] = []
        self.ready = asyncio.Event()
        #: Grows when a newer stream of the same gateway takes over, or the reader was too slow.
        self.stream_number = 0
        #: Since when no stream has read it; None while one does.
        self.unattended_since_s: float | None = now_s


class _Alarm:
    """Sets `ready` whenever it was not put off for `SIGN_OF_LIFE_S`. It is put off with every frame: that sets no
    timer, the running one finds out."""

    def __init__(self, ready: asyncio.Event) -> None:
        self._ready = ready
        self._loop = asyncio.get_running_loop()
        self._due_s = self._loop.time() + SIGN_OF_LIFE_S
        self._timer = self._loop.call_at(self._due_s, self._look)

    def put_off(self) -> None:
        self._due_s = self._loop.time() + SIGN_OF_LIFE_S

    def cancel(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        if self._loop.time() >= self._due_s:
            self._ready.set()
            self.put_off()
        self._timer = self._loop.call_at(self._due_s, self._look)


class FrameOutbox:
    def __init__(
        self,
        *,
        worker_id: WorkerId,
        incarnation: Incarnation,
        clock: Clock,
        max_pending_deltas: int,
        on_given_up: Callable[[GatewayId, str], None],
    ) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation
        self._clock = clock
        self._max_pending_deltas = max_pending_deltas
        self._on_given_up = on_given_up
        self._mailboxes: dict[GatewayId, _Mailbox] = {}

    def emit(self, request: GenerateRequest, delta: TokenDelta) -> None:
        """Queues a delta; it leaves with the next `flush`."""
        self._mailbox(request.gateway_id).deltas.append(delta)

    def tell(self, gateway_id: GatewayId, delta: TokenDelta) -> None:
        """As `emit`, of a request that is not here."""
        self._mailbox(gateway_id).deltas.append(delta)

    def claim(self, gateway_id: GatewayId, claim: Claim) -> None:
        """Queues a claim, behind the deltas that are queued; it leaves with the next `flush`. Nothing happens where
        that gateway has no stream here: a claim is repeated."""
        if self.is_read_by(gateway_id):
            self._mailbox(gateway_id).claims.append(claim)

    def is_read_by(self, gateway_id: GatewayId) -> bool:
        """Whether this gateway has its stream here."""
        mailbox = self._mailboxes.get(gateway_id)
        return mailbox is not None and mailbox.unattended_since_s is None

    def flush(self) -> None:
        """Ends a step: wakes the streams that have something to send."""
        for gateway_id, mailbox in list(self._mailboxes.items()):
            if len(mailbox.deltas) > self._max_pending_deltas:
                self._give_up(gateway_id, mailbox, f"fell {len(mailbox.deltas)} deltas behind")
            elif (mailbox.deltas or mailbox.claims) and not _FLUSHED_LATER.fires():
                mailbox.ready.set()

    def expire(self, now_s: float) -> None:
        """Gives up the gateways that went away and did not come back."""
        for gateway_id, mailbox in list(self._mailboxes.items()):
            since_s = mailbox.unattended_since_s
            if since_s is not None and now_s - since_s > UNATTENDED_S:
                self._give_up(gateway_id, mailbox, f"has had no frame stream for {UNATTENDED_S:g} s")

    def _give_up(self, gateway_id: GatewayId, mailbox: _Mailbox, reason: str) -> None:
        _GIVEN_UP.reached()
        del self._mailboxes[gateway_id]
        mailbox.deltas, mailbox.claims = [], []
        mailbox.stream_number += 1
        mailbox.ready.set()
        self._on_given_up(gateway_id, reason)

    async def stream(self, gateway_id: GatewayId) -> AsyncGenerator[Frame, None]:
        """Frames for one gateway until it goes away, is given up, or opens a newer stream."""
        mailbox = self._mailbox(gateway_id)
        mailbox.stream_number += 1
        mine = mailbox.stream_number
        mailbox.unattended_since_s = None
        alarm = _Alarm(mailbox.ready)
        try:
            sequence_number = 0
            while mailbox.stream_number == mine:
                yield self._frame(sequence_number, mailbox)
                sequence_number += 1
                # Until there is something to send, or a sign of life is due.
                alarm.put_off()
                await mailbox.ready.wait()
        finally:
            alarm.cancel()
            if mailbox.stream_number == mine:
                mailbox.unattended_since_s = self._clock.now_s()
        # What woke this stream was meant for the newer one.
        mailbox.ready.set()
        raise WorkerUnavailable(
            f"the frame stream of {gateway_id} at {self._worker_id} was ended: a newer one took over, or it fell behind"
        )

    def _frame(self, sequence_number: int, mailbox: _Mailbox) -> Frame:
        deltas, mailbox.deltas = tuple(mailbox.deltas), []
        claims, mailbox.claims = tuple(mailbox.claims), []
        mailbox.ready.clear()
        return Frame(
            worker_id=self._worker_id,
            incarnation=self._incarnation,
            sequence_number=sequence_number,
            deltas=deltas,
            claims=claims,
        )

    def _mailbox(self, gateway_id: GatewayId) -> _Mailbox:
        mailbox = self._mailboxes.get(gateway_id)
        if mailbox is None:
            mailbox = self._mailboxes[gateway_id] = _Mailbox(self._clock.now_s())
        return mailbox
