"""The reading side of the collective transport: one courier per holder, with one group of two, fetches its pulls
one after the other.

Bytes come into staging memory and are copied into the pool while the pull lives. So a pull that is stopped is
terminal at once, whatever the holder does: what still comes for it is received and dropped, or the group broken.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import secrets
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import (
    Cancelled,
    IncompatiblePeer,
    Internal,
    NoCapacity,
    NotFound,
    TandemError,
    WorkerUnavailable,
)
from contracts.messages import MEET, PART, SEND, MeetRequest, PartRequest, SendRequest
from kvtransfer.collective_group import DEPTH, FIRST_TAG, PROOF_BYTES, READER, Meeting, advance_tag
from kvtransfer.collective_pieces import pieces
from kvtransfer.transport import PullResult, check_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from contracts.clock import Clock
    from kvtransfer.collective_endpoint import Endpoint
    from kvtransfer.collective_group import Group, MakeGroup
    from kvtransfer.collective_pieces import BlockCopier, Piece
    from kvtransfer.transport import BlockPair
    from rpc.api import Network

#: Pulls of one holder that wait for their turn.
MAX_WAITING_PULLS = 1024

#: For a holder's answer to a call of ours, and for the connection that follows a meeting.
CALL_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 3.0

#: For one message of at most `PIECE_BYTES`, after the one before.
PIECE_TIMEOUT_S = 3.0

#: For the farewell to a holder.
PART_TIMEOUT_S = 0.5

#: A group nobody used for this long is let go.
IDLE_S = 30.0

#: What is left of a stopped pull is received and dropped up to here; of a longer one the group is broken.
MAX_DRAIN_BYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What all couriers of a transport share."""

    clock: Clock
    network: Network
    copier: BlockCopier
    make_group: MakeGroup
    advertise: Callable[[bytes], bytes]
    #: Names this transport to holders.
    reader: str
    group_numbers: Iterator[int]


class CollectivePull:
    """`kvtransfer.transport.Pull` of a courier. Its end and every copy into the pool exclude each other."""

    def __init__(self, pairs: Sequence[BlockPair], asked_s: float, clock: Clock) -> None:
        self.pairs = tuple(pairs)
        self._asked_s = asked_s
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[PullResult] = self._loop.create_future()
        self._lock = threading.Lock()
        self._started_s: float | None = None
        # Under the lock, all three.
        self._ended = False
        self._num_bytes = 0
        self._landed_s = asked_s

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._result)

    def request_stop(self) -> None:
        self.finish(Cancelled("the pull was stopped"))

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def landed(self) -> bool:
        """Some of its bytes are in the pool."""
        return self._num_bytes > 0

    def start(self) -> None:
        """Its turn has come, and the group is there."""
        self._started_s = self._clock.now_s()

    def land(self, copy: Callable[[], None], num_bytes: int) -> None:
        """Runs `copy` unless the pull has ended. Any thread."""
        with self._lock:
            if not self._ended:
                copy()
                self._num_bytes += num_bytes
                self._landed_s = self._clock.now_s()

    def finish(self, error: TandemError | None) -> None:
        """Ends it, if it has not: nothing lands after this. Event loop only."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
        started_s = self._clock.now_s() if self._started_s is None else self._started_s
        # From the asking for the bytes on: when the first of a message came is not known.
        wire_s = max(0.0, self._landed_s - started_s)
        wait_s = started_s - self._asked_s
        self._result.set_result(PullResult(num_bytes=self._num_bytes, wire_s=wire_s, wait_s=wait_s, error=error))


class _Met:
    """A connected group, and how far its numbering got."""

    def __init__(self, group: Group, number: int) -> None:
        self.group = group
        self.number = number
        self.next_tag = FIRST_TAG
        self._pulls = 0

    def count_pull(self) -> int:
        """The number of the next pull."""
        self._pulls += 1
        return self._pulls


class Courier:
    """Fetches from one holder. Made by the transport, which closes it."""

    def __init__(self, reading: Reading, endpoint: Endpoint) -> None:
        self._reading = reading
        self._endpoint = endpoint
        self._waiting: asyncio.Queue[CollectivePull] = asyncio.Queue(MAX_WAITING_PULLS)
        #: The one whose turn it is.
        self._current: CollectivePull | None = None
        #: Of the group in use, if there is one.
        self._met: _Met | None = None
        #: Whether the holder is to hear of the end.
        self._tells = True
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def idle(self) -> bool:
        return self._current is None and self._waiting.empty()

    def submit(self, pull: CollectivePull) -> None:
        try:
            self._waiting.put_nowait(pull)
        except asyncio.QueueFull:
            pull.finish(NoCapacity(f"{MAX_WAITING_PULLS} pulls wait for {self._endpoint!r}"))

    async def close(self, reason: str, *, tell: bool) -> None:
        """Ends all pulls, then the group; `tell` says whether there is a holder to hear of it."""
        self._tells = tell
        self._finish_all(Cancelled(reason))
        self._task.cancel()
        # Not gathered for its outcome: that was told to the pulls.
        await asyncio.wait({self._task})

    def _finish_all(self, error: TandemError) -> None:
        if self._current is not None:
            self._current.finish(error)
        while not self._waiting.empty():
            self._waiting.get_nowait().finish(error)

    async def _run(self) -> None:
        try:
            while True:
                self._current = await self._next()
                if not self._current.ended:
                    self._current.finish(await self._serve(self._current))
                self._current = None
        finally:
            if self._tells:
                await self._part()
            else:
                await self._drop()

    async def _next(self) -> CollectivePull:
        try:
            async with asyncio.timeout(IDLE_S):
                return await self._waiting.get()
        except TimeoutError:
            await self._part()
        return await self._waiting.get()

    async def _serve(self, pull: CollectivePull) -> TandemError | None:
        try:
            check_pairs(pull.pairs, self._endpoint.num_blocks, self._reading.copier.num_blocks)
            ours, theirs = self._reading.copier.block_bytes, self._endpoint.block_bytes
            if ours != theirs:
                raise IncompatiblePeer(f"block_bytes: {ours} here, {theirs} there")
            known = self._met is not None
            try:
                await self._fetch(pull)
            except (NotFound, WorkerUnavailable):
                # The holder may have let an old group go, which says nothing about the holder.
                if not known or pull.landed or pull.ended:
                    raise
                await self._fetch(pull)
        except NotFound as error:
            return WorkerUnavailable(f"the holder at {self._endpoint!r} lost the group at once: {error.message}")
        except TandemError as error:
            return error
        except Exception as error:
            # Whatever went wrong, the pull is over, and who waits must know.
            return Internal(f"collective transfer: {type(error).__name__}: {error}")
        return None

    # --- the group --------------------------------------------------------------------------------------

    async def _meet(self) -> _Met:
        """A connected group: the one there is, or a new one."""
        if self._met is not None:
            return self._met
        number = next(self._reading.group_numbers)
        reading, endpoint = self._reading, self._endpoint
        group = reading.make_group(READER, timeout_s=CONNECT_TIMEOUT_S)
        try:
            own = await group.call(group.open)
            expected = secrets.token_bytes(PROOF_BYTES)
            request = MeetRequest(
                target=endpoint.incarnation,
                secret=endpoint.secret,
                reader=reading.reader,
                group=number,
                address=reading.advertise(own.address),
                bound=own.bound,
                proof=expected,
            )
            channel = reading.network.channel(endpoint.address)
            reply = await channel.call(MEET, request, timeout_s=CALL_TIMEOUT_S)
            await group.call(
                group.connect, own, Meeting(reply.address, reply.bound), proof=reply.proof, expected=expected
            )
        except BaseException:
            await group.close()
            raise
        self._met = _Met(group, number)
        return self._met

    async def _drop(self) -> _Met | None:
        """Closes the group, if there is one. Its holder sees the connection end when it next sends."""
        met, self._met = self._met, None
        if met is not None:
            await met.group.close()
        return met

    async def _part(self) -> None:
        """Closes the group, if there is one, and tells the holder, who may not be there to hear it."""
        met = await self._drop()
        if met is None:
            return
        body = PartRequest(
            target=self._endpoint.incarnation,
            secret=self._endpoint.secret,
            reader=self._reading.reader,
            group=met.number,
        )
        with contextlib.suppress(TandemError):
            channel = self._reading.network.channel(self._endpoint.address)
            await channel.call(PART, body, timeout_s=PART_TIMEOUT_S)

    # --- one pull ---------------------------------------------------------------------------------------

    async def _fetch(self, pull: CollectivePull) -> None:
        """Raises what went wrong; the group is gone then."""
        met = await self._meet()
        pull.start()
        if not pull.pairs:
            return
        plan = tuple(pieces(len(pull.pairs), self._reading.copier.block_bytes))
        body = SendRequest(
            target=self._endpoint.incarnation,
            secret=self._endpoint.secret,
            reader=self._reading.reader,
            group=met.number,
            pull=met.count_pull(),
            first_tag=met.next_tag,
            blocks=tuple(source for source, _ in pull.pairs),
        )
        channel = self._reading.network.channel(self._endpoint.address)
        # Begun together: the messages may overtake the answer, and only the slower is waited for.
        receiving = asyncio.ensure_future(met.group.call(self._receive, met.group, met.next_tag, plan, pull))
        asking = asyncio.ensure_future(channel.call(SEND, body, timeout_s=CALL_TIMEOUT_S))
        met.next_tag = advance_tag(met.next_tag, len(plan))
        try:
            await asyncio.wait((receiving, asking), return_when=asyncio.FIRST_EXCEPTION)
            # A refusal says more than what then became of the group.
            for each in (asking, receiving):
                if each.done():
                    each.result()
        except BaseException:
            asking.cancel()
            await self._drop()
            await asyncio.gather(receiving, asking, return_exceptions=True)
            raise

    def _receive(self, group: Group, first_tag: int, plan: Sequence[Piece], pull: CollectivePull) -> None:
        """On the group's thread. Raises unless all messages of the pull have come."""
        slots, copier = group.slots, self._reading.copier
        targets = tuple(target for _, target in pull.pairs)

        def post(index: int) -> None:
            group.post_receive(slots.tensor(index, plan[index].num_bytes), advance_tag(first_tag, index))

        for index in range(min(DEPTH, len(plan))):
            post(index)
        left_bytes = sum(piece.num_bytes for piece in plan)
        for index, piece in enumerate(plan):
            if pull.ended and left_bytes > MAX_DRAIN_BYTES:
                raise Cancelled("the pull was stopped")
            group.wait(PIECE_TIMEOUT_S)
            staged = slots.array(index, piece.num_bytes)
            pull.land(functools.partial(copier.scatter, staged, targets, piece), piece.num_bytes)
            left_bytes -= piece.num_bytes
            if index + DEPTH < len(plan):
                post(index + DEPTH)
