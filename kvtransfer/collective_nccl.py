"""Process groups of NCCL, between the memories of two CUDA devices.

Pools are host memory (`kvtransfer.host_pool`), so each message is copied to a device on one side and from it on
the other. NCCL ignores tags: messages pair up in the order posted, which is the same on both sides.

Written against the interfaces of torch 2.11 and 2.13; it needs two devices and has run on none yet.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import distributed

from contracts.errors import BadRequest, ConfigError, DeadlineExceeded, WorkerUnavailable
from kvtransfer.collective_group import DEPTH, READER, Group, Meeting

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from contracts.clock import Clock

#: torch types these modules incompletely.
_torch: Any = distributed
_cuda: Any = torch.cuda

#: How often an operation, or the other side's coming, is looked at.
LOOK_S = 0.0001

#: What NCCL's own watchdog would end the process after. Our deadlines are shorter, and end the group.
NEVER = timedelta(hours=24)

_Keys = dict[str, bytes]


def check_device(device: str) -> None:
    """Raises ConfigError for a device that NCCL cannot use here."""
    if not (distributed.is_nccl_available() and torch.cuda.is_available()):
        raise ConfigError(f"the collective transport cannot use {device}: no NCCL, or no CUDA device")
    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count():
        raise ConfigError(f"the collective transport cannot use {device}: there are {torch.cuda.device_count()}")


def prepare_environment(interface: str | None) -> None:
    """Settings that NCCL and torch read from the environment alone; what the operator set stays."""
    # A group that breaks is ours to end, not a reason to end the process.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", interface or "lo")


@dataclass(slots=True)
class _Posted:
    work: Any
    #: Of the message, on the device.
    staged: torch.Tensor
    #: Where a received message goes; None for a sent one.
    target: torch.Tensor | None


class NcclGroup(Group):
    """`Group` of NCCL, for one device."""

    def __init__(
        self,
        rank: int,
        *,
        device: str,
        clock: Clock,
        piece_bytes: int,
        timeout_s: float,
        reaper: ThreadPoolExecutor,
    ) -> None:
        super().__init__(rank, piece_bytes=piece_bytes, timeout_s=timeout_s, reaper=reaper)
        self._device = torch.device(device)
        self._clock = clock
        self._store: Any = _torch.HashStore()
        self._nccl: Any = None
        self._stream: Any = None
        #: `DEPTH` pieces on the device.
        self._staging: torch.Tensor | None = None
        self._num_posts = 0
        self._posted: deque[_Posted] = deque()
        self._joining: threading.Thread | None = None
        #: Never set: a wait for it is a pause.
        self._pause = threading.Event()
        self._join_failure = ""

    def open(self) -> Meeting:
        failure = ""
        try:
            _cuda.set_device(self._device)
            options = _torch.ProcessGroupNCCL.Options()
            options._timeout = NEVER
            self._nccl = _torch.ProcessGroupNCCL(self._store, self._rank, 2, options)
            self._stream = _cuda.Stream(self._device)
            self._staging = torch.empty(DEPTH * self._piece_bytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            failure = str(error)
        if failure:
            raise ConfigError(f"NCCL cannot use {self._device}: {failure}")
        if self._rank != READER:
            return Meeting(b"", b"")
        # The first rank makes up the group's id, and then waits for the other inside the library.
        self._start_joining()
        self._poll(lambda: bool(self._store.list_keys()) or not self._is_joining(), self._timeout_s, "an id")
        keys: _Keys = {key: self._store.get(key) for key in self._store.list_keys()}
        return Meeting(msgspec.msgpack.encode(keys), b"")

    @property
    def num_posted(self) -> int:
        return len(self._posted)

    def post_send(self, tensor: torch.Tensor, tag: int) -> None:
        self._post(tensor, sends=True)

    def post_receive(self, tensor: torch.Tensor, tag: int) -> None:
        self._post(tensor, sends=False)

    def _post(self, tensor: torch.Tensor, *, sends: bool) -> None:
        if self._nccl is None or self._staging is None:
            raise WorkerUnavailable("the process group is not open")
        start = self._num_posts % DEPTH * self._piece_bytes
        staged = self._staging[start : start + tensor.numel()]
        failure = ""
        try:
            # NCCL's own stream follows the one that is current here.
            with _cuda.stream(self._stream):
                if sends:
                    staged.copy_(tensor, non_blocking=True)
                    work = self._nccl.send([staged], 1 - self._rank, 0)
                else:
                    work = self._nccl.recv([staged], 1 - self._rank, 0)
            self._posted.append(_Posted(work, staged, None if sends else tensor))
            self._num_posts += 1
        except RuntimeError as error:
            failure = str(error)
        if failure:
            raise WorkerUnavailable(f"NCCL: {failure}")

    def wait(self, timeout_s: float) -> None:
        first = self._posted[0]
        failure = ""
        try:
            self._poll(first.work.is_completed, timeout_s, "a message")
            if first.work.exception() is not None:
                failure = "the operation was aborted"
            elif first.target is not None:
                with _cuda.stream(self._stream):
                    first.target.copy_(first.staged)
                    self._stream.synchronize()
        except RuntimeError as error:
            failure = str(error)
        if failure:
            raise WorkerUnavailable(f"NCCL: {failure}")
        self._posted.popleft()

    def _poll(self, done: Any, timeout_s: float, what: str) -> None:
        """Raises DeadlineExceeded; the group is broken then."""
        until_s = self._clock.now_s() + timeout_s
        while not done():
            if self._clock.now_s() >= until_s:
                self._sever()
                raise DeadlineExceeded(f"NCCL: no {what} within {timeout_s:g} s")
            self._pause.wait(LOOK_S)

    # --- joining and parting ------------------------------------------------------------------------------

    def _join(self, own: Meeting, peer: Meeting) -> None:
        if self._rank != READER:
            try:
                keys = msgspec.msgpack.decode(peer.address, type=_Keys)
            except msgspec.MsgspecError as error:
                raise BadRequest(f"not the id of a group of NCCL's: {error}") from error
            for key, value in keys.items():
                self._store.set(key, value)
            self._start_joining()
        self._poll(lambda: not self._is_joining(), self._timeout_s, "peer")
        if self._join_failure:
            raise WorkerUnavailable(f"NCCL: {self._join_failure}")

    def _start_joining(self) -> None:
        self._joining = threading.Thread(target=self._join_library, name="kv-nccl-join", daemon=True)
        self._joining.start()

    def _is_joining(self) -> bool:
        return self._joining is not None and self._joining.is_alive()

    def _join_library(self) -> None:
        """Blocks until the peer does the same."""
        try:
            _cuda.set_device(self._device)
            self._nccl.eager_connect_single_device(self._device)
        except RuntimeError as error:
            self._join_failure = str(error)

    def _sever(self) -> None:
        if self._nccl is not None:
            with contextlib.suppress(RuntimeError):
                self._nccl.abort()

    def _destroy(self) -> None:
        self._posted.clear()
        if self._joining is not None:
            # Ended by the abort.
            self._joining.join(self._timeout_s)
        self._nccl = None
        self._stream = None
        self._staging = None
        self._slots = None
