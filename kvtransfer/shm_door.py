"""The door at which readers of the same machine get a worker's KV pool.

It is an abstract unix socket, which leaves nothing behind however the process ends. It hands the
pool's descriptor to a caller of the same user that knows the secret of the endpoint and this life's incarnation, and
keeps the connection: its end tells either side that the other is gone.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import selectors
import socket
import struct
import threading
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import BadRequest
from contracts.ids import Incarnation
from kvtransfer.endpoint import decode

if TYPE_CHECKING:
    from contracts.clock import Clock
    from kvtransfer.host_pool import HostPool

SECRET_BYTES = 32

#: What a reader says first: the secret and the incarnation it means.
HELLO = struct.Struct(f"<{SECRET_BYTES}sq")

#: The door's one-byte answers. The descriptor comes with WELCOME.
WELCOME, WRONG_SECRET, WRONG_LIFE = b"\x01", b"\x02", b"\x03"

#: Readers at one door at a time; one more is turned away.
MAX_READERS = 256

#: How long a caller may take to say hello.
HELLO_TIMEOUT_S = 1.0

_PEER_CREDENTIALS = struct.Struct("3i")


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """What `LeaseTerms.endpoint` holds for this transport. Whoever has it may read the pool."""

    #: Name in the abstract namespace, without its leading NUL.
    socket_name: str
    secret: bytes
    incarnation: Incarnation
    num_blocks: int
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    def __repr__(self) -> str:
        return f"<Endpoint {self.socket_name} [{self.num_blocks} x {self.block_bytes} bytes]>"


def encode_endpoint(endpoint: Endpoint) -> bytes:
    return msgspec.msgpack.encode(endpoint)


def decode_endpoint(raw: bytes) -> Endpoint:
    """Raises BadRequest for bytes that describe no pool."""
    endpoint = decode(raw, Endpoint, "a shared-memory pool")
    if len(endpoint.secret) != SECRET_BYTES:
        raise BadRequest(f"endpoint of a shared-memory pool: {endpoint!r}")
    return endpoint


def peer_uid(connection: socket.socket) -> int:
    """The user id of the process at the other end of a unix socket, as the kernel knows it."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _pid, uid, _gid = _PEER_CREDENTIALS.unpack(raw)
    return int(uid)


class _Caller:
    """One connection at the door."""

    def __init__(self, connection: socket.socket, hello_by_s: float) -> None:
        self.connection = connection
        self.hello = b""
        #: None once it was welcomed.
        self.hello_by_s: float | None = hello_by_s


class Door:
    """Hands out a pool's descriptor, on a thread of its own: a busy event loop keeps no reader waiting."""

    def __init__(self, pool: HostPool, incarnation: Incarnation, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        self.endpoint = Endpoint(
            socket_name=f"tandem-kv-{os.getpid()}-{secrets.token_hex(8)}",
            secret=secrets.token_bytes(SECRET_BYTES),
            incarnation=incarnation,
            num_blocks=pool.num_blocks,
            block_bytes=pool.block_bytes,
        )
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.endpoint.socket_name)
        self._listener.listen(MAX_READERS)
        self._listener.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        #: Open connections by descriptor; touched by the thread alone.
        self._callers: dict[int, _Caller] = {}
        self._thread = threading.Thread(target=self._serve, name="kv-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Turns everybody away. Returns when the thread has ended, which is at once."""
        self._wake.send(b"x")
        self._thread.join()
        self._wake.close()

    def _serve(self) -> None:
        while True:
            ready = [key.fileobj for key, _ in self._selector.select(self._patience_s())]
            if self._woken in ready:
                break
            for each in ready:
                if each is self._listener:
                    self._accept()
                elif isinstance(each, socket.socket):
                    self._hear(self._callers[each.fileno()])
            self._drop_silent()
        for caller in list(self._callers.values()):
            self._dismiss(caller)
        self._selector.close()
        self._listener.close()
        self._woken.close()

    def _patience_s(self) -> float | None:
        """Until the next caller has been silent for too long."""
        due = [each.hello_by_s for each in self._callers.values() if each.hello_by_s is not None]
        return max(0.0, min(due) - self._clock.now_s()) if due else None

    def _drop_silent(self) -> None:
        now_s = self._clock.now_s()
        for caller in list(self._callers.values()):
            if caller.hello_by_s is not None and now_s >= caller.hello_by_s:
                self._dismiss(caller)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # The caller left again, or no descriptor is free: then wait for one rather than spin.
            select.select([self._woken], [], [], 0.05)
            return
        if len(self._callers) >= MAX_READERS or peer_uid(connection) != os.getuid():
            connection.close()
            return
        connection.setblocking(False)
        self._callers[connection.fileno()] = _Caller(connection, self._clock.now_s() + HELLO_TIMEOUT_S)
        self._selector.register(connection, selectors.EVENT_READ)

    def _hear(self, caller: _Caller) -> None:
        try:
            heard = caller.connection.recv(HELLO.size)
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        if not heard or caller.hello_by_s is None:
            # The end of the connection; after the welcome a reader has nothing to say.
            self._dismiss(caller)
            return
        caller.hello += heard
        if len(caller.hello) >= HELLO.size:
            self._answer(caller)

    def _answer(self, caller: _Caller) -> None:
        secret, incarnation = HELLO.unpack(caller.hello[: HELLO.size])
        known = hmac.compare_digest(secret, self.endpoint.secret)
        current = incarnation == self.endpoint.incarnation
        try:
            if known and current:
                caller.hello_by_s = None
                socket.send_fds(caller.connection, [WELCOME], [self._pool.read_only])
                return
            caller.connection.send(WRONG_LIFE if known else WRONG_SECRET)
        except OSError:
            pass  # the caller is gone: dismissed below, as after a refusal
        self._dismiss(caller)

    def _dismiss(self, caller: _Caller) -> None:
        self._selector.unregister(caller.connection)
        del self._callers[caller.connection.fileno()]
        caller.connection.close()
