"""How a worker gets the weights that its node agent holds: a descriptor of shared memory over a unix socket.

The socket is abstract, so that it leaves nothing behind however the process ends. A caller of the same user that knows
the secret says what it wants (one `Wish`), and hears one `Given`, with the descriptor, or one `Refused`; before that a
`Coming` now and then, if it wants to. It keeps the connection for as long as it uses the memory: that is its pin.

The memory: the partition's bytes, then its index as JSON. It is sealed: nobody can write to it any more.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from coldstart.residence import WeightsKey
from contracts.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable

#: Before every message: its length.
LENGTH = struct.Struct("<I")
#: Of a message; one that claims more is not read.
MAX_MESSAGE_BYTES = 64 * 1024


class WeightsDoor(msgspec.Struct, frozen=True, kw_only=True):
    """Where to ask. Whoever has it may read the weights of this machine."""

    #: Name in the abstract namespace, without its leading NUL.
    socket_name: str
    secret: str

    def __repr__(self) -> str:
        return f"<WeightsDoor {self.socket_name}>"


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    secret: str
    key: WeightsKey
    #: Whether to tell it meanwhile how far the load is.
    hears_progress: bool = False


class Given(msgspec.Struct, frozen=True, kw_only=True, tag="given"):
    """The descriptor comes with this message."""

    num_bytes: int
    index_bytes: int


class Coming(msgspec.Struct, frozen=True, kw_only=True, tag="coming"):
    """The load has got on; told when that changes, once a second at most."""

    #: Loads that come before this one.
    num_ahead: int
    #: What is done ("weights", "conversion: written"), and how far, 0 to 1; None where there is no telling.
    what: str
    fraction: float | None


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    reason: str


Answer: TypeAlias = Given | Refused

_MESSAGE: msgspec.json.Decoder[Answer | Coming] = msgspec.json.Decoder(Answer | Coming)


def framed(message: Wish | Answer | Coming) -> bytes:
    body = msgspec.json.encode(message)
    return LENGTH.pack(len(body)) + body


class HandedWeights:
    """Shared memory with one partition; read-only, and mapped for as long as a view of it is left. It is pinned until
    `close`."""

    def __init__(self, connection: socket.socket, mapping: mmap.mmap, given: Given) -> None:
        self._connection = connection
        self._mapping = mapping
        self._given = given

    def __repr__(self) -> str:
        return f"<HandedWeights {self._given.num_bytes} bytes>"

    @property
    def weights(self) -> memoryview:
        return memoryview(self._mapping)[: self._given.num_bytes]

    @property
    def index(self) -> bytes:
        """As `coldstart.format` decodes it."""
        end = self._given.num_bytes + self._given.index_bytes
        return bytes(memoryview(self._mapping)[self._given.num_bytes : end])

    def close(self) -> None:
        self._connection.close()


def ask(
    door: WeightsDoor,
    key: WeightsKey,
    *,
    timeout_s: float,
    progress: Callable[[Coming], bool] | None = None,
) -> HandedWeights:
    """Blocks until the weights are there: for `timeout_s` without hearing that the load gets on, and for as long as
    `progress` (None: nothing is heard) says that they are to be waited for. Raises LoadError: refused, nobody there,
    or not within the time."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
        connection.connect("\0" + door.socket_name)
        connection.sendall(framed(Wish(secret=door.secret, key=key, hears_progress=progress is not None)))
        while True:
            answer, descriptors = _receive(connection)
            if not isinstance(answer, Coming):
                break
            for descriptor in descriptors:
                os.close(descriptor)
            if progress is None or not progress(answer):
                raise LoadError(f"{key.folder}: not waited for any longer")
        if isinstance(answer, Refused):
            raise LoadError(f"{key.folder}: {answer.reason}")
        if len(descriptors) != 1:
            raise LoadError(f"{key.folder}: the node agent gave {len(descriptors)} descriptors")
        mapping = _map(descriptors[0], answer)
        connection.settimeout(None)
        return HandedWeights(connection, mapping, answer)
    except TimeoutError as error:
        connection.close()
        raise LoadError(
            f"{key.folder}: the node agent gave no weights, nor said a word of them for {timeout_s:.0f} s"
        ) from error
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        connection.close()
        raise LoadError(f"{key.folder}: the node agent gives no weights: {error}") from error
    except BaseException:
        connection.close()
        raise


def _receive(connection: socket.socket) -> tuple[Answer | Coming, list[int]]:
    """One message and the descriptors with it; these are closed where the message is none."""
    descriptors = list[int]()
    try:
        head = _exactly(connection, LENGTH.size, descriptors)
        (length,) = LENGTH.unpack(head)
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes")
        return _MESSAGE.decode(_exactly(connection, length, descriptors)), descriptors
    except BaseException:
        for descriptor in descriptors:
            os.close(descriptor)
        raise


def _exactly(connection: socket.socket, length: int, descriptors: list[int]) -> bytes:
    room = socket.CMSG_SPACE(array.array("i").itemsize)
    data = b""
    while len(data) < length:
        piece, ancillary, _flags, _address = connection.recvmsg(length - len(data), room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, raw in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found = array.array("i")
                found.frombytes(raw[: len(raw) - len(raw) % found.itemsize])
                descriptors.extend(found)
        if not piece:
            raise ConnectionError("it hung up")
        data += piece
    return data


def _map(descriptor: int, given: Given) -> mmap.mmap:
    """All pages mapped at once: who computes on them meets no page fault."""
    try:
        length = given.num_bytes + given.index_bytes
        if min(given.num_bytes, given.index_bytes) < 0 or os.fstat(descriptor).st_size < length:
            raise ValueError(f"{os.fstat(descriptor).st_size} bytes of memory, not {length}")
        return mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    finally:
        os.close(descriptor)
