"""The transports of one worker, as the configuration names them, with what each should reach on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from contracts.errors import ConfigError
from kvtransfer import LinkClass, LinkPolicy, ShmTransport, TransportSet
from kvtransfer.links import LOOPBACK, RDMA, SAME_MACHINE, SHARED_MEMORY, TCP
from kvtransfer.ucx_agent import PACKAGES

if TYPE_CHECKING:
    from cluster.launch import TransferOptions
    from contracts.clock import Clock
    from contracts.ids import Incarnation, WorkerId
    from kvtransfer import Transport
    from rpc import Network, Server

TransportName = Literal["shm", "ucx", "collective"]

#: Most preferred first: what `auto` tries, and what wins a tie.
TRANSPORT_NAMES: tuple[TransportName, ...] = ("shm", "ucx", "collective")

NETWORK_INTERFACES = Path("/sys/class/net")
RDMA_DEVICES = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportSite:
    """What a transport needs of the process it is in."""

    worker_id: WorkerId
    incarnation: Incarnation
    clock: Clock
    network: Network
    #: Where the rpc server that answers for this worker listens.
    server: Server
    address: str
    options: TransferOptions


def build_transports(wanted: Literal["auto"] | TransportName, site: TransportSite) -> TransportSet:
    """The one transport that was asked for, or all that this machine has.

    Raises ConfigError for one that was asked for and cannot work here.
    """
    check_interface(site.options.interface)
    names = available_names() if wanted == "auto" else (wanted,)
    policy = LinkPolicy(
        classes={name: link_class(name, site.options) for name in names}, allow_slow=site.options.allow_slow
    )
    return TransportSet([_build(name, site) for name in names], policy)


def available_names() -> tuple[TransportName, ...]:
    """The transports whose libraries are here."""
    return TRANSPORT_NAMES if has_nixl() else ("shm", "collective")


def has_nixl() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in PACKAGES)


def warm_up() -> None:
    """Imports what the transports of this machine need, and starts nothing. What is missing is told by who needs it."""
    for module in ("kvtransfer.collective", "kvtransfer.ucx"):
        importlib.import_module(module)
    from kvtransfer.ucx_agent import preload

    with contextlib.suppress(ConfigError):
        preload()


def check_interface(interface: str | None) -> None:
    """Raises ConfigError for an interface that this machine does not have."""
    if interface is None or not NETWORK_INTERFACES.is_dir():
        return
    present = sorted(each.name for each in NETWORK_INTERFACES.iterdir())
    if interface not in present:
        raise ConfigError(f"transfer.interface: no interface {interface!r} here; there are {', '.join(present)}")


def _build(name: TransportName, site: TransportSite) -> Transport:
    # Their libraries take seconds to import: only who uses them pays.
    match name:
        case "shm":
            return ShmTransport(clock=site.clock, incarnation=site.incarnation)
        case "ucx":
            from kvtransfer.ucx import UcxTransport

            return UcxTransport(
                clock=site.clock,
                incarnation=site.incarnation,
                worker_name=site.worker_id,
                interface=site.options.interface,
            )
        case "collective":
            from kvtransfer.collective import CollectiveTransport

            transport = CollectiveTransport(
                clock=site.clock,
                network=site.network,
                address=site.address,
                incarnation=site.incarnation,
                interface=site.options.interface,
            )
            transport.register_on(site.server)
            return transport


# --- what to expect -----------------------------------------------------------------------------------


def link_class(name: TransportName, options: TransferOptions) -> LinkClass:
    """What the transport should reach here: what the operator expects, or what its class ordinarily does."""
    ordinary = _ordinary_class(name, options.interface)
    if options.expect_bytes_per_s is None:
        return ordinary
    return LinkClass(
        name=f"{ordinary.name} as configured",
        bandwidth_bytes_per_s=float(options.expect_bytes_per_s),
        latency_s=ordinary.latency_s,
    )


def _ordinary_class(name: TransportName, interface: str | None) -> LinkClass:
    if name == "shm":
        return SHARED_MEMORY
    if interface is None:
        return SAME_MACHINE if name == "ucx" else LOOPBACK
    if name == "ucx" and has_rdma(interface):
        return RDMA
    return tcp_class(interface)


def has_rdma(interface: str) -> bool:
    """Whether an RDMA device stands behind a network interface."""
    if not RDMA_DEVICES.is_dir():
        return False
    return any((device / "device" / "net" / interface).exists() for device in RDMA_DEVICES.iterdir())


def tcp_class(interface: str) -> LinkClass:
    """TCP at half the speed that the interface says it has; virtual ones often say nothing."""
    try:
        megabits = int((NETWORK_INTERFACES / interface / "speed").read_text())
    except (OSError, ValueError):
        megabits = -1
    if megabits <= 0:
        return LinkClass(
            name=f"TCP on {interface}", bandwidth_bytes_per_s=TCP.bandwidth_bytes_per_s, latency_s=TCP.latency_s
        )
    # One stream of TCP fills no 100 Gbit/s: a class is what is ordinary, not what is possible.
    bandwidth = min(megabits * 1e6 / 8 / 2, 1.5e9)
    return LinkClass(name=f"TCP on {interface}", bandwidth_bytes_per_s=bandwidth, latency_s=TCP.latency_s)
