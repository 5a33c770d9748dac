"""One process group of two, with a thread of its own: what blocks in it holds up nobody else.

The group is made without a default group, environment or rendezvous server: what each side must know of the
other travels in our own calls. It is fragile by design of the libraries: an operation that times out, or is left
behind, breaks it for good, and its owner makes another.

    made ─open─▶ waiting ─connect─▶ connected ─sever─▶ broken        any ─close─▶ gone
"""

from __future__ import annotations

import asyncio
import hmac
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import numpy as np
import torch

from contracts.errors import Unauthorized

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

P = ParamSpec("P")
T = TypeVar("T")

#: Ranks within every group.
READER, HOLDER = 0, 1

#: Messages posted at a time, each with its own piece of staging memory: enough that neither side waits for the
#: other's answer.
DEPTH = 16

PROOF_BYTES = 32

#: Tags of our messages; those of blocks count up from `FIRST_TAG`, and over again after `LAST_TAG`.
PROOF_TAG = 1
SEVER_TAG = 2
FIRST_TAG = 16
LAST_TAG = 2**31 - 1


def advance_tag(tag: int, count: int = 1) -> int:
    """The tag `count` messages after `tag`."""
    return FIRST_TAG + (tag - FIRST_TAG + count) % (LAST_TAG - FIRST_TAG + 1)


@dataclass(frozen=True, slots=True)
class Meeting:
    """What one side tells the other before they connect, in the library's form."""

    #: As the other should call it.
    address: bytes
    #: As it is in this process; the same unless a proxy stands between.
    bound: bytes


class Slots:
    """`DEPTH` pieces of staging memory. Pages exist once touched."""

    def __init__(self, piece_bytes: int) -> None:
        self._bytes: npt.NDArray[np.uint8] = np.empty(DEPTH * piece_bytes, np.uint8)
        self._tensor = torch.frombuffer(self._bytes, dtype=torch.uint8)
        self._piece_bytes = piece_bytes

    def array(self, index: int, num_bytes: int) -> npt.NDArray[np.uint8]:
        start = index % DEPTH * self._piece_bytes
        return self._bytes[start : start + num_bytes]

    def tensor(self, index: int, num_bytes: int) -> torch.Tensor:
        start = index % DEPTH * self._piece_bytes
        return self._tensor[start : start + num_bytes]


class Group(ABC):
    """One side of a pair, whichever library carries it. Memory on both ends is the host's.

    Methods are for the group's own thread (see `call`) unless they say otherwise. At most `DEPTH` messages may be
    posted at a time, of `piece_bytes` at most.
    """

    def __init__(self, rank: int, *, piece_bytes: int, timeout_s: float, reaper: ThreadPoolExecutor) -> None:
        """`timeout_s` bounds opening and connecting, each."""
        self._rank = rank
        self._piece_bytes = piece_bytes
        self._timeout_s = timeout_s
        self._reaper = reaper
        self._slots: Slots | None = None
        self._thread = ThreadPoolExecutor(1, "kv-collective")

    # --- for the event loop -----------------------------------------------------------------------------

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs `function` on the group's thread, after what runs there. Cancelling does not interrupt it."""
        return await asyncio.wrap_future(self._thread.submit(function, *args, **kwargs))

    async def close(self) -> None:
        """Severs, and waits until threads, descriptors and memory are gone. Cancelling takes effect only then."""
        closing = asyncio.wrap_future(self._reaper.submit(self._close))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:
            await asyncio.wait({closing})
            raise

    def _close(self) -> None:
        try:
            self._sever()
        finally:
            self._thread.submit(self._destroy).result()
            self._thread.shutdown()

    # --- for the group's thread -------------------------------------------------------------------------

    @property
    def slots(self) -> Slots:
        if self._slots is None:
            self._slots = Slots(self._piece_bytes)
        return self._slots

    def connect(self, own: Meeting, peer: Meeting, *, proof: bytes, expected: bytes) -> None:
        """Connects to the peer, and makes sure that it is the one that was met: each side sends what it was
        told in the meeting. Raises WorkerUnavailable, DeadlineExceeded, Unauthorized or BadRequest."""
        self._join(own, peer)
        given = np.frombuffer(proof, np.uint8).copy()
        heard = np.zeros(PROOF_BYTES, np.uint8)
        # In opposite orders: a library that ignores tags pairs sends with receives as they come.
        sends, receives = (self.post_send, given), (self.post_receive, heard)
        for post, array in (sends, receives) if self._rank == READER else (receives, sends):
            post(torch.frombuffer(array, dtype=torch.uint8), PROOF_TAG)
        while self.num_posted:
            self.wait(self._timeout_s)
        if not hmac.compare_digest(heard.tobytes(), expected):
            raise Unauthorized("a stranger connected in place of the peer that was met")

    @abstractmethod
    def open(self) -> Meeting:
        """Prepares to be connected to. Raises ConfigError where that cannot be."""

    @property
    @abstractmethod
    def num_posted(self) -> int:
        """Messages posted and not waited for."""

    @abstractmethod
    def post_send(self, tensor: torch.Tensor, tag: int) -> None:
        """Begins to send; `tensor` stays as it is until waited for. Raises WorkerUnavailable."""

    @abstractmethod
    def post_receive(self, tensor: torch.Tensor, tag: int) -> None:
        """Lets a message of exactly this length and tag come into `tensor`. Raises WorkerUnavailable."""

    @abstractmethod
    def wait(self, timeout_s: float) -> None:
        """Until what was posted first is done. Raises DeadlineExceeded or WorkerUnavailable; either way the
        group is then broken."""

    @abstractmethod
    def _join(self, own: Meeting, peer: Meeting) -> None:
        """Tells the library where the peer is."""

    @abstractmethod
    def _sever(self) -> None:
        """Breaks the connection, from another thread: what waits in the group fails, and what comes later."""

    @abstractmethod
    def _destroy(self) -> None:
        """Lets go all that the library and the staging memory hold."""


class MakeGroup(Protocol):
    """Makes this process's side of a group, for the library and interface that were configured."""

    def __call__(self, rank: int, *, timeout_s: float) -> Group: ...
