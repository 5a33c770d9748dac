"""What two gloo processes tell each other before they connect, and how it may be read and changed.

The blob is gloo's own (`Rank::bytes`): the host's name and the address, each after its length, and the address
is a `sockaddr_storage` with a sequence number behind it. Gloo gives no choice of who connects to whom: the side
with the greater address does.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import socket
import stat
import struct
import sys
from dataclasses import dataclass

from contracts.errors import BadRequest, ConfigError

_LENGTH = struct.Struct("=Q")
_FAMILY = struct.Struct("=H")
_PORT = struct.Struct("!H")

#: Bytes of a sockaddr_storage.
_SOCKADDR_BYTES = 128

#: Where the host's bytes begin in a sockaddr_in and a sockaddr_in6, and how many they are.
_HOSTS = {int(socket.AF_INET): (4, 4), int(socket.AF_INET6): (8, 16)}

#: linux/filter.h: one instruction that drops every packet.
_DROP_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0)

#: asm-generic/socket.h; the socket module lacks it.
_SO_ATTACH_FILTER = 26


@dataclass(frozen=True, slots=True)
class Address:
    """Where one side of a pair listens."""

    family: int
    host: bytes
    port: int

    def __str__(self) -> str:
        return f"{ipaddress.ip_address(self.host)}:{self.port}"

    def connects_to(self, other: Address) -> bool:
        """Whether gloo at this address connects to `other`, or waits for it. Gloo compares ports as they
        lie in memory. Raises BadRequest where it could do neither."""
        if self.family != other.family or self == other:
            raise BadRequest(f"no connection from {self} to {other}")
        return self._order() > other._order()

    def _order(self) -> tuple[bytes, int]:
        return self.host, int.from_bytes(_PORT.pack(self.port), sys.byteorder)


def _sockaddr_at(blob: bytes) -> int:
    """Where the sockaddr_storage begins. Raises BadRequest for other bytes than gloo's."""
    try:
        start = _LENGTH.size + int(_LENGTH.unpack_from(blob)[0])
        address_bytes = int(_LENGTH.unpack_from(blob, start)[0])
    except (struct.error, OverflowError) as error:
        raise BadRequest(f"not an address of gloo's: {len(blob)} bytes: {error}") from error
    start += _LENGTH.size
    if address_bytes < _SOCKADDR_BYTES or start + address_bytes > len(blob):
        raise BadRequest(f"not an address of gloo's: {len(blob)} bytes, {address_bytes} of them the address")
    return start


def read_address(blob: bytes) -> Address:
    """The address in gloo's `blob`. Raises BadRequest."""
    start = _sockaddr_at(blob)
    family = int(_FAMILY.unpack_from(blob, start)[0])
    if family not in _HOSTS:
        raise BadRequest(f"not an address of gloo's: family {family}")
    offset, size = _HOSTS[family]
    host = blob[start + offset : start + offset + size]
    return Address(family, host, int(_PORT.unpack_from(blob, start + 2)[0]))


def rewrite_address(blob: bytes, host: str, port: int) -> bytes:
    """`blob` with another numeric host of the same family, and port: that of a proxy or a translated address.
    Raises BadRequest."""
    start = _sockaddr_at(blob)
    family = read_address(blob).family
    offset, size = _HOSTS[family]
    packed = ipaddress.ip_address(host).packed
    if len(packed) != size:
        raise BadRequest(f"{host} does not replace {read_address(blob)}: another address family")
    changed = bytearray(blob)
    _PORT.pack_into(changed, start + 2, port)
    changed[start + offset : start + offset + size] = packed
    return bytes(changed)


def blob_to_dial(own: Address, bound: Address, blob: bytes) -> bytes:
    """What to give gloo at `own` as the peer's address.

    The peer listens at `bound` and wants to be called at the address in `blob`, which may be another. Who calls
    was settled between the bound ones; gloo sees only one of a peer, so who waits gets one that is greater than
    its own. Raises BadRequest where gloo cannot do it: it never calls an address greater than its own.
    """
    if not own.connects_to(bound):
        highest = b"\xff" * len(bound.host)
        return rewrite_address(blob, str(ipaddress.ip_address(highest)), 0xFFFF)
    announced = read_address(blob)
    if not own.connects_to(announced):
        raise BadRequest(f"gloo at {own} cannot connect to {announced} (for {bound}): it calls lesser addresses only")
    return blob


def bar_listener(address: Address) -> bool:
    """Makes this process's listening socket at `address` drop whatever arrives: its one peer is connected, and
    gloo offers no way to close it. False where no such socket is found. Existing connections are unharmed."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.stat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as found:
                if _listens_at(found, address):
                    program = ctypes.create_string_buffer(_DROP_ALL)
                    # A struct sock_fprog: how many instructions, and where.
                    packed = struct.pack("@HP", 1, ctypes.addressof(program))
                    found.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, packed)
                    return True
    return False


def _listens_at(found: socket.socket, address: Address) -> bool:
    if found.family != address.family or not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return False
    host, port = found.getsockname()[:2]
    return bool(port == address.port and ipaddress.ip_address(host).packed == address.host)


def device_arguments(interface: str | None) -> dict[str, str]:
    """How gloo's `create_device` is told to listen on `interface`: its name or a numeric address of this
    machine; None: 127.0.0.1. Raises ConfigError for an interface that is not there."""
    if interface is None:
        return {"hostname": "127.0.0.1"}
    with contextlib.suppress(ValueError):
        return {"hostname": str(ipaddress.ip_address(interface))}
    if interface not in (name for _, name in socket.if_nameindex()):
        raise ConfigError(f"transfer.interface: this machine has no network interface {interface!r}")
    return {"interface": interface}
