"""The transport seam: typed calls between processes, with one live and one in-memory network.

`GrpcNetwork` is loaded on first use, so that importing `rpc` loads nothing of gRPC: simulations never need
it, and a process may still fork before it opens a network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpc.api import CallContext, Channel, Network, Server
from rpc.clock import LiveClock
from rpc.memory import MemoryNetwork

if TYPE_CHECKING:
    from rpc.grpc_network import GrpcNetwork

__all__ = ["CallContext", "Channel", "GrpcNetwork", "LiveClock", "MemoryNetwork", "Network", "Server"]


def __getattr__(name: str) -> object:
    if name == "GrpcNetwork":
        from rpc.grpc_network import GrpcNetwork

        return GrpcNetwork
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
