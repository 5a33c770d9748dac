"""The in-memory network: the same promises as gRPC, on any event loop, with seeded delays, faults and crashes.

Every body is really encoded, measured and decoded. A call is two one-way pipes; each delivers in order, every
packet after the delay that `Fabric.fate` gave it. Timers and time are the running loop's, so on a virtual-time
loop a whole cluster's traffic is deterministic. Nothing here reads a clock or global randomness.
"""

from __future__ import annotations

from rpc.memory.call import STREAM_WINDOW
from rpc.memory.fate import BROKEN_AFTER_S, Fate, Latency, Message, PacketKind, loopback_latency
from rpc.memory.network import MemoryChannel, MemoryNetwork, MemoryProcess
from rpc.memory.server import MemoryServer

__all__ = [
    "BROKEN_AFTER_S",
    "STREAM_WINDOW",
    "Fate",
    "Latency",
    "MemoryChannel",
    "MemoryNetwork",
    "MemoryProcess",
    "MemoryServer",
    "Message",
    "PacketKind",
    "loopback_latency",
]
