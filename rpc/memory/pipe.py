"""One direction of one call on the in-memory network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from rpc.memory.fate import Fate, PacketKind

if TYPE_CHECKING:
    import asyncio
    from contextvars import Context


class Packet(msgspec.Struct, frozen=True):
    kind: PacketKind
    #: An encoded body, or for "error" an encoded error.
    raw: bytes = b""


class Pipe(ABC):
    """Delivers in the order sent, each packet after its own delay.

    `context` is what deliveries run in: not the sender's, because what has left a process arrives whatever becomes
    of the process.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, context: Context) -> None:
        self._loop = loop
        self._context = context
        #: Sent and not delivered, oldest first; as many timers are running.
        self._under_way: deque[Packet] = deque()
        self._last_delivery_s = -math.inf
        #: Nothing is sent any more: the last packet was sent, or one was lost.
        self._shut = False
        #: Nothing is delivered any more.
        self._cut = False

    def send(self, packet: Packet, *, last: bool) -> None:
        if self._shut:
            return
        fate = self.fate(packet)
        if isinstance(fate, Fate):
            self._send_to(fate, packet, last=last)
        elif fate is None:
            self._lose()
        else:
            self._dispatch(packet, fate, last=last)

    def cut(self) -> None:
        """Nothing is sent any more, and what is under way arrives nowhere."""
        self._shut = self._cut = True

    def _send_to(self, fate: Fate, packet: Packet, *, last: bool) -> None:
        if fate.outcome == "reset":
            self.reset()
        elif fate.outcome == "lost":
            self._lose()
        else:
            self._dispatch(packet, fate.delay_s, last=last)
            if fate.repeat_after_s is not None:
                self.repeat(packet, self._last_delivery_s + fate.repeat_after_s)

    def _lose(self) -> None:
        self._shut = True
        self.lost()

    def _dispatch(self, packet: Packet, delay_s: float, *, last: bool) -> None:
        self._shut = last
        self._last_delivery_s = max(self._last_delivery_s, self._loop.time() + delay_s)
        self._under_way.append(packet)
        self._loop.call_at(self._last_delivery_s, self._deliver_oldest, context=self._context)

    def _deliver_oldest(self) -> None:
        # Loops do not order timers of the same instant, so no timer is tied to a packet of its own.
        packet = self._under_way.popleft()
        if not self._cut:
            self.deliver(packet)

    @abstractmethod
    def fate(self, packet: Packet) -> Fate | float | None: ...

    @abstractmethod
    def deliver(self, packet: Packet) -> None: ...

    @abstractmethod
    def lost(self) -> None:
        """A packet was lost."""

    @abstractmethod
    def reset(self) -> None:
        """The connection breaks now."""

    @abstractmethod
    def repeat(self, packet: Packet, at_s: float) -> None:
        """Delivers a packet once more, where that can be."""
