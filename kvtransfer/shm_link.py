"""A reader's hold on another process's shared pool: its mapping, and the connection that tells of its end."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import socket
from typing import TYPE_CHECKING

from contracts.errors import (
    IncompatiblePeer,
    StaleIncarnation,
    Unauthorized,
    WorkerUnavailable,
)
from kvtransfer.host_pool import address_of
from kvtransfer.shm_door import HELLO, WELCOME, WRONG_LIFE, peer_uid

if TYPE_CHECKING:
    from kvtransfer.shm_door import Endpoint


class Link:
    """A holder's pool, mapped read-only; `connection` does not block. Belongs to one thread."""

    def __init__(self, endpoint: Endpoint, connection: socket.socket, mapping: mmap.mmap) -> None:
        self.endpoint = endpoint
        self.connection = connection
        self._mapping = mapping
        self.address = address_of(mapping)

    def __repr__(self) -> str:
        return f"<Link to {self.endpoint!r}>"

    @property
    def alive(self) -> bool:
        """The holder's process has not closed its end. Its memory stays readable either way."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._mapping.close()
        self.connection.close()


def attach(endpoint: Endpoint, timeout_s: float) -> Link:
    """Asks the door of `endpoint` for its pool and maps it. Blocks for a few times `timeout_s` at most.

    Raises WorkerUnavailable (nobody answers), Unauthorized (another user's process, or a wrong secret),
    StaleIncarnation, IncompatiblePeer (the memory is not what the endpoint says).
    """
    with contextlib.ExitStack() as undo:
        connection = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        try:
            mapping = _attach(endpoint, connection, timeout_s)
        except OSError as error:
            raise WorkerUnavailable(f"cannot attach to {endpoint!r}: {error}") from error
        undo.pop_all()
    # With a timeout set, `alive` would wait for it before it looks.
    connection.setblocking(False)
    return Link(endpoint, connection, mapping)


def _attach(endpoint: Endpoint, connection: socket.socket, timeout_s: float) -> mmap.mmap:
    connection.settimeout(timeout_s)
    connection.connect("\0" + endpoint.socket_name)
    if peer_uid(connection) != os.getuid():
        raise Unauthorized(f"{endpoint!r} belongs to another user")
    descriptor = _say_hello(endpoint, connection)
    try:
        return _map(endpoint, descriptor)
    finally:
        os.close(descriptor)


def _say_hello(endpoint: Endpoint, connection: socket.socket) -> int:
    """Returns the pool's descriptor, which the caller closes."""
    connection.sendall(HELLO.pack(endpoint.secret, endpoint.incarnation))
    answer, descriptors, _flags, _sender = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if answer == WELCOME and len(descriptors) == 1:
        return descriptors[0]
    for each in descriptors:
        os.close(each)
    if answer == b"":
        raise WorkerUnavailable(f"{endpoint!r} turned the reader away")
    if answer == WRONG_LIFE:
        raise StaleIncarnation(f"{endpoint!r} is not of life {endpoint.incarnation}")
    raise Unauthorized(f"{endpoint!r} does not accept the secret")


def _map(endpoint: Endpoint, descriptor: int) -> mmap.mmap:
    """Maps the pool after making sure that no page of it is missing, nor ever will be."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise IncompatiblePeer(f"{endpoint!r} is not sealed memory: {error}") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise IncompatiblePeer(f"{endpoint!r} may shrink: its memory is not sealed")
    num_bytes = os.fstat(descriptor).st_size
    if num_bytes < endpoint.num_bytes:
        raise IncompatiblePeer(f"{endpoint!r} has {num_bytes} bytes, {endpoint.num_bytes} were announced")
    return mmap.mmap(descriptor, endpoint.num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
