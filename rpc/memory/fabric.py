"""What all programs on one in-memory network share."""

from __future__ import annotations

import contextvars
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import ConfigError

if TYPE_CHECKING:
    import random

    from rpc.codec import Codec
    from rpc.memory.call import Call
    from rpc.memory.fate import Fate, Latency, Message
    from rpc.memory.server import MemoryServer
    from rpc.routes import Log

_FIRST_PORT = 40_000


def host_of(address: str) -> str:
    return address.rpartition(":")[0]


@dataclass(eq=False, slots=True)
class Life:
    """One life of a program that sends."""

    host: str
    #: Each of its handlers runs in a copy. Empty as a rule: nothing but the body crosses from a caller, as between
    #: real processes.
    context: contextvars.Context = field(default_factory=contextvars.Context)
    #: Nothing leaves it any more.
    dead: bool = False
    #: Its calls whose caller still listens, in the order made.
    calls: dict[Call, None] = field(default_factory=lambda: {})
    #: Its servers that listen, in the order started.
    servers: dict[MemoryServer, None] = field(default_factory=lambda: {})


@dataclass(eq=False, slots=True, kw_only=True)
class Fabric:
    rng: random.Random
    latency_s: Latency
    codec: Codec
    max_open_calls: int
    log: Log
    #: What the network's own timers run in: nobody's.
    context: contextvars.Context = field(default_factory=contextvars.Context)
    #: Listening servers by address.
    servers: dict[str, MemoryServer] = field(default_factory=lambda: {})
    ports: itertools.count[int] = field(default_factory=lambda: itertools.count(_FIRST_PORT))

    def fate(self, sender: Life, message: Message) -> Fate | float | None:
        """The one place that decides what becomes of a message."""
        if sender.dead:
            return None
        return self.latency_s(message, self.rng)

    def bind(self, address: str, server: MemoryServer) -> str:
        host, _, port = address.rpartition(":")
        bound = f"{host}:{next(self.ports)}" if port == "0" else address
        if bound in self.servers:
            raise ConfigError(f"cannot listen on {bound}: the address is in use")
        self.servers[bound] = server
        return bound
