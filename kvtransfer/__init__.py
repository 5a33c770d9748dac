"""Moves KV blocks between workers under leases: the ledger, the two lease services, and the transports.

A holder offers blocks; a reader pulls them, confirms that the lease still stood after the last byte, and
adopts them. This room knows blocks and leases; what the bytes mean, and whom they serve, is its callers'.
"""

from kvtransfer.holder_events import LeaseOutcome
from kvtransfer.holder_service import HolderService
from kvtransfer.host_pool import HostPool
from kvtransfer.ledger import BlockClass, BlockCounts, Ledger
from kvtransfer.links import LinkChoice, LinkClass, LinkPolicy
from kvtransfer.memory import MemoryFabric, MemoryTransport
from kvtransfer.probe import Prober
from kvtransfer.reader_service import ReaderService
from kvtransfer.shm import ShmTransport
from kvtransfer.transport import BlockPair, Pool, Pull, PullResult, Transport
from kvtransfer.transport_set import TransportSet
from kvtransfer.ucx import UcxTransport

__all__ = [
    "BlockClass",
    "BlockCounts",
    "BlockPair",
    "HolderService",
    "HostPool",
    "LeaseOutcome",
    "Ledger",
    "LinkChoice",
    "LinkClass",
    "LinkPolicy",
    "MemoryFabric",
    "MemoryTransport",
    "Pool",
    "Prober",
    "Pull",
    "PullResult",
    "ReaderService",
    "ShmTransport",
    "Transport",
    "TransportSet",
    "UcxTransport",
]
