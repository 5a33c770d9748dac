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
    from contracts.errors import TandemError
    from kvtransfer.shm_door import Endpoint


class Link:
    """A holder's pool, mapped read-only; `connection` does not block. Belongs to one thread."""

    def __init__(self, endpoint: Endpoint, connection: socket.socket, mapping: mmap.mmap) -> None:
        self.endpoint = endpoint
        self.connection = connection
        self._mapping = mapping
        self.address = address_of(mapping)
        self.num_blocks = endpoint.num_blocks

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


class Attaching:
    """An attach under way: asks the door of `endpoint` for its pool, and maps it. Nothing here waits.

    All but `close` raises WorkerUnavailable (nobody answers), Unauthorized (another user's process, or a wrong
    secret), StaleIncarnation or IncompatiblePeer (the memory is not what the endpoint says); then all that is left to
    do is to close it.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        #: Readable once `take` may have more to say.
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(self.connection.close)
            self.connection.setblocking(False)
            try:
                # Of a unix socket connects at once, or not at all where too many callers wait already.
                self.connection.connect("\0" + endpoint.socket_name)
                if peer_uid(self.connection) != os.getuid():
                    raise Unauthorized(f"{endpoint!r} belongs to another user")
                self.connection.send(HELLO.pack(endpoint.secret, endpoint.incarnation))
            except OSError as error:
                raise WorkerUnavailable(f"cannot attach to {endpoint!r}: {error}") from error
            undo.pop_all()

    def take(self) -> Link | None:
        """The link, which owns the connection from then on; None while the door has not answered."""
        try:
            answer, descriptors, _flags, _sender = socket.recv_fds(self.connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return None
        except OSError as error:
            raise WorkerUnavailable(f"cannot attach to {self.endpoint!r}: {error}") from error
        try:
            if answer != WELCOME or len(descriptors) != 1:
                raise self._refusal(answer)
            return Link(self.endpoint, self.connection, _map(self.endpoint, descriptors[0]))
        finally:
            for each in descriptors:
                os.close(each)

    def _refusal(self, answer: bytes) -> TandemError:
        if answer == WELCOME:
            return WorkerUnavailable(f"the pool of {self.endpoint!r} did not come: too many open files?")
        if answer == b"":
            return WorkerUnavailable(f"{self.endpoint!r} turned the reader away")
        if answer == WRONG_LIFE:
            return StaleIncarnation(f"{self.endpoint!r} is not of life {self.endpoint.incarnation}")
        return Unauthorized(f"{self.endpoint!r} does not accept the secret")

    def close(self) -> None:
        self.connection.close()


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
    try:
        return mmap.mmap(descriptor, endpoint.num_bytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except OSError as error:
        raise WorkerUnavailable(f"cannot map {endpoint!r}: {error}") from error
