"""Process groups of gloo, over TCP between host memories."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import distributed

from contracts.errors import ConfigError, DeadlineExceeded, InvariantBroken, TandemError, WorkerUnavailable
from kvtransfer.collective_address import bar_listener, blob_to_dial, device_arguments, read_address
from kvtransfer.collective_group import SEVER_TAG, Group, Meeting

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

    from torch.distributed import Work

    class Gloo(Protocol):
        """What of `ProcessGroupGloo` is used here. torch declares none of it."""

        def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work: ...

        def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> Work: ...

    class Store(Protocol):
        """The same of `HashStore`."""

        def get(self, key: str) -> bytes: ...

        def set(self, key: str, value: bytes) -> None: ...


#: torch types this module incompletely; `Gloo` and `Store` say what is meant.
_torch: Any = distributed


def _key(rank: int) -> str:
    """Under what gloo sets the address of a rank."""
    return f"0/{rank}"


class GlooGroup(Group):
    """`Group` of gloo. Each has a listening port and a thread of the library's own, which go with it."""

    def __init__(
        self, rank: int, *, interface: str | None, piece_bytes: int, timeout_s: float, reaper: ThreadPoolExecutor
    ) -> None:
        super().__init__(rank, piece_bytes=piece_bytes, timeout_s=timeout_s, reaper=reaper)
        self._interface = interface
        self._store: Store = _torch.HashStore()
        self._gloo: Gloo | None = None
        self._connected = False
        #: Operations begun and not waited for. They keep the library's half of the group alive.
        self._posted: deque[Work] = deque()

    def open(self) -> Meeting:
        arguments = device_arguments(self._interface)
        library = _torch.ProcessGroupGloo
        failure = ""
        try:
            # Lazy: nothing connects in the constructor, and the library's end is orderly whatever happened.
            device = library.create_device(**arguments, lazy_init=True)
            options = library._Options()
            options._devices = [device]
            options._timeout = timedelta(seconds=self._timeout_s)
            options._threads = 1
            self._gloo = library(self._store, self._rank, 2, options)
        except RuntimeError as error:
            failure = str(error)
        if failure:
            raise ConfigError(f"gloo cannot listen on {arguments}: {failure}")
        address = self._store.get(_key(self._rank))
        return Meeting(address, address)

    def connect(self, own: Meeting, peer: Meeting, *, proof: bytes, expected: bytes) -> None:
        super().connect(own, peer, proof=proof, expected=expected)
        # Whoever else calls from now on is a stranger, and the library trusts every byte it gets.
        bar_listener(read_address(own.bound))

    @property
    def num_posted(self) -> int:
        return len(self._posted)

    def post_send(self, tensor: torch.Tensor, tag: int) -> None:
        self._post(lambda gloo: gloo.send([tensor], 1 - self._rank, tag))

    def post_receive(self, tensor: torch.Tensor, tag: int) -> None:
        self._post(lambda gloo: gloo.recv([tensor], 1 - self._rank, tag))

    def wait(self, timeout_s: float) -> None:
        failure = ""
        try:
            # What fails stays posted: the library must not lose a buffer that a message may still come for.
            self._posted[0].wait(timedelta(seconds=timeout_s))
        except RuntimeError as error:
            failure = str(error)
        if failure:
            raise _typed(failure)
        self._posted.popleft()

    def _post(self, begin: Callable[[Gloo], Work]) -> None:
        if self._gloo is None:
            raise WorkerUnavailable("the process group is not open")
        failure = ""
        try:
            self._posted.append(begin(self._gloo))
            # The first operation waits for it.
            self._connected = True
        except RuntimeError as error:
            failure = str(error)
        if failure:
            raise _typed(failure)

    def _join(self, own: Meeting, peer: Meeting) -> None:
        dial = blob_to_dial(read_address(own.bound), read_address(peer.bound), peer.address)
        self._store.set(_key(1 - self._rank), dial)

    def _sever(self) -> None:
        gloo = self._gloo
        if gloo is None or not self._connected:
            # It ends by its own timeout.
            return
        try:
            # The library's one way to close a connection: a wait that runs out.
            scrap = torch.empty(1, dtype=torch.uint8)
            gloo.recv([scrap], 1 - self._rank, SEVER_TAG).wait(timedelta(milliseconds=1))
        except RuntimeError:
            return
        raise InvariantBroken("a message came under the tag that nobody sends")

    def _destroy(self) -> None:
        self._posted.clear()
        self._gloo = None
        self._slots = None


def _typed(failure: str) -> TandemError:
    """Of the text of an error of gloo's. Not chained to it: that would keep the group's memory alive."""
    text = failure.split(". This is typically")[0].rpartition("] ")[2].strip() or failure
    if "imed out" in failure or "imeout" in failure:
        return DeadlineExceeded(f"gloo: {text}")
    return WorkerUnavailable(f"gloo: {text}")
