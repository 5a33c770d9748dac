"""The holding side of the collective transport: answers meetings, and sends blocks to each reader on the thread
of that reader's group. A reader that freezes or dies costs its own group, after the deadline of one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from contracts.errors import (
    BadRequest,
    NoCapacity,
    NotFound,
    StaleIncarnation,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from contracts.messages import Empty, MeetReply, MeetRequest, PartRequest, SendRequest
from kvtransfer.collective_group import DEPTH, FIRST_TAG, HOLDER, LAST_TAG, PROOF_BYTES, Meeting, advance_tag
from kvtransfer.collective_pieces import pieces

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtransfer.collective_endpoint import Endpoint
    from kvtransfer.collective_group import Group, MakeGroup
    from kvtransfer.collective_pieces import BlockCopier
    from kvtransfer.transport import Pool

#: Readers that have a group at a time; the one idle for longest goes first.
MAX_READERS = 64

#: Pulls of one reader that wait for its group's thread.
MAX_WAITING_SENDS = 8

#: For the reader to connect after a meeting, and to take one message after the one before.
CONNECT_TIMEOUT_S = 3.0
PIECE_TIMEOUT_S = 3.0

#: A group nobody used for this long is let go; longer than the readers', who say so when they do.
IDLE_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What the holding side of a transport works with."""

    endpoint: Endpoint
    copier: BlockCopier
    pool: Pool
    make_group: MakeGroup
    advertise: Callable[[bytes], bytes]


class _Guest:
    """A reader's group, and what it asked for."""

    def __init__(self, group: Group, number: int) -> None:
        self.group = group
        self.number = number
        #: The last pull that was accepted.
        self.pull = 0
        self.asked: asyncio.Queue[SendRequest] = asyncio.Queue(MAX_WAITING_SENDS)
        self.sending = False
        self.task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return not self.sending and self.asked.empty()


class HolderSide:
    """Answers the collective transport's calls for one registered pool."""

    def __init__(self, holding: Holding) -> None:
        self._holding = holding
        self._tensor: torch.Tensor | None = torch.frombuffer(holding.pool.view(), dtype=torch.uint8)
        #: By reader, least recently used first.
        self._guests: dict[str, _Guest] = {}
        #: Meetings under way: they count as readers.
        self._meeting = 0
        #: Groups being let go.
        self._leaving: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Ends all groups. Calls after this get WorkerUnavailable."""
        self._tensor = None
        for reader in list(self._guests):
            self._dismiss(reader)
        while self._leaving:
            await asyncio.wait(self._leaving)

    # --- calls ------------------------------------------------------------------------------------------

    def _check(self, body: MeetRequest | SendRequest | PartRequest) -> None:
        endpoint = self._holding.endpoint
        if body.target != endpoint.incarnation:
            raise StaleIncarnation(f"this is life {endpoint.incarnation} of the holder, not {body.target}")
        if not hmac.compare_digest(body.secret, endpoint.secret):
            raise Unauthorized(f"the holder at {endpoint!r} was given the wrong secret")
        if self._tensor is None:
            raise WorkerUnavailable(f"the holder at {endpoint!r} is closed")

    async def meet(self, body: MeetRequest) -> MeetReply:
        self._check(body)
        if len(body.proof) != PROOF_BYTES:
            raise BadRequest(f"collective/Meet: a proof of {len(body.proof)} bytes, not {PROOF_BYTES}")
        self._dismiss(body.reader)
        self._make_room()
        holding = self._holding
        group = holding.make_group(HOLDER, timeout_s=CONNECT_TIMEOUT_S)
        self._meeting += 1
        try:
            own = await group.call(group.open)
            self._check(body)
        except BaseException:
            await group.close()
            raise
        finally:
            self._meeting -= 1
        # Of two meetings at once with one reader the later stands.
        self._dismiss(body.reader)
        guest = self._guests[body.reader] = _Guest(group, body.group)
        expected = secrets.token_bytes(PROOF_BYTES)
        guest.task = asyncio.get_running_loop().create_task(self._attend(body, guest, own, expected))
        return MeetReply(address=holding.advertise(own.address), bound=own.bound, proof=expected)

    def send(self, body: SendRequest) -> Empty:
        self._check(body)
        guest = self._guests.get(body.reader)
        if guest is None or guest.number != body.group:
            raise NotFound(f"no group {body.group} with reader {body.reader}")
        if body.pull <= guest.pull:
            return Empty()
        num_blocks = self._holding.copier.num_blocks
        for block in body.blocks:
            if not 0 <= block < num_blocks:
                raise BadRequest(f"block {block} of a holder that has {num_blocks}")
        if not FIRST_TAG <= body.first_tag <= LAST_TAG:
            raise BadRequest(f"collective/Send: tag {body.first_tag}")
        try:
            guest.asked.put_nowait(body)
        except asyncio.QueueFull:
            raise NoCapacity(f"{MAX_WAITING_SENDS} pulls of reader {body.reader} wait already") from None
        guest.pull = body.pull
        # To the end of the order of use.
        self._guests[body.reader] = self._guests.pop(body.reader)
        return Empty()

    def part(self, body: PartRequest) -> Empty:
        self._check(body)
        guest = self._guests.get(body.reader)
        if guest is not None and guest.number == body.group:
            self._dismiss(body.reader)
        return Empty()

    # --- groups -----------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Raises NoCapacity."""
        if len(self._guests) + self._meeting < MAX_READERS:
            return
        idle = next((reader for reader, guest in self._guests.items() if guest.idle), None)
        if idle is None:
            raise NoCapacity(f"{MAX_READERS} readers at a time, and none of them idle")
        self._dismiss(idle)

    def _dismiss(self, reader: str) -> None:
        """Ends a reader's group, if it has one; `_leaving` knows until it is gone."""
        guest = self._forget(reader)
        if guest is not None and guest.task is not None:
            guest.task.cancel()

    def _forget(self, reader: str) -> _Guest | None:
        guest = self._guests.pop(reader, None)
        if guest is not None and guest.task is not None:
            self._leaving.add(guest.task)
            guest.task.add_done_callback(self._leaving.discard)
        return guest

    async def _attend(self, body: MeetRequest, guest: _Guest, own: Meeting, expected: bytes) -> None:
        """Serves one group to its end, whatever ends it."""
        group, reader = guest.group, body.reader
        peer = Meeting(body.address, body.bound)
        try:
            # What goes wrong with the connection the reader sees for itself; here it only ends the group.
            with contextlib.suppress(TandemError, TimeoutError):
                await group.call(group.connect, own, peer, proof=body.proof, expected=expected)
                while True:
                    async with asyncio.timeout(IDLE_S):
                        request = await guest.asked.get()
                    guest.sending = True
                    await group.call(self._send_blocks, group, request)
                    guest.sending = False
        finally:
            if self._guests.get(reader) is guest:
                self._forget(reader)
            await group.close()

    def _send_blocks(self, group: Group, request: SendRequest) -> None:
        """On the group's thread. Raises unless the reader took everything."""
        copier, pool, blocks = self._holding.copier, self._tensor, request.blocks
        if pool is None:
            raise WorkerUnavailable("the holder is closed")
        for index, piece in enumerate(pieces(len(blocks), copier.block_bytes)):
            if group.num_posted == DEPTH:
                group.wait(PIECE_TIMEOUT_S)
            span = copier.span(blocks, piece)
            if span is None:
                # The slot was waited for: it is `DEPTH` messages old.
                copier.gather(blocks, piece, group.slots.array(index, piece.num_bytes))
                tensor = group.slots.tensor(index, piece.num_bytes)
            else:
                tensor = pool[span : span + piece.num_bytes]
            group.post_send(tensor, advance_tag(request.first_tag, index))
        while group.num_posted:
            group.wait(PIECE_TIMEOUT_S)
