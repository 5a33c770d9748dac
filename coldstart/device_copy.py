"""The last tier: chunks go on to a device while others are still being read.

Two ways. Where the host copy is kept (`DeviceFromMemory`), its memory is registered as pinned and each verified chunk
is copied from its place. Where it is not (`DeviceThroughRing`), readers fill a bounded ring of pinned buffers, and a
buffer is free again when the device has its chunk. Copies are asynchronous, on a stream of their own; an event behind
each says when it is over (ServerlessLLM, OSDI'24, section 4.2).

`Copier` is the seam to the device. `CudaCopier`, the real one, has not been run on a device yet.
"""

from __future__ import annotations

import mmap
import threading
from collections import deque
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, Protocol

import torch

from coldstart.loaded import LoadedWeights, read_checkpoint
from coldstart.memory import address_of
from coldstart.reading import load_partition, partition_of
from contracts.errors import Cancelled, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from coldstart.pipeline import Destination, LoadProgress

#: Without its types, which say little: what is used of it is six calls.
_CUDA: Any = torch.cuda

#: Buffers of a ring: as many as threads read into at once, and some on their way to the device.
RING_CHUNKS = 24


class Ticket(Protocol):
    def wait(self) -> None:
        """Returns when the copy is over. Raises LoadError when it failed."""
        ...


class Copier(Protocol):
    """Asynchronous copies to one device tensor."""

    def pin(self, memory: memoryview) -> None:
        """Registers page-aligned memory, until `close`. Raises LoadError."""
        ...

    def start(self, source: memoryview, offset: int) -> Ticket:
        """Begins to copy pinned bytes to the device tensor from byte `offset` on; copies end in the order in which
        they began. Called by one thread at a time. Raises LoadError."""
        ...

    def close(self) -> None:
        """No copy is under way."""
        ...


class DeviceFromMemory:
    """`coldstart.pipeline.Destination` that keeps `memory`'s copy too: `inner` reads into it."""

    def __init__(self, inner: Destination, memory: memoryview, chunk_bytes: int, copier: Copier) -> None:
        """Takes `copier` over."""
        self._inner = inner
        self._chunk_bytes = chunk_bytes
        self._copier = copier
        self._guard = threading.Lock()
        self._last: Ticket | None = None
        self._is_stopped = False
        copier.pin(memory)

    def buffer(self, chunk: int, num_bytes: int) -> memoryview:
        return self._inner.buffer(chunk, num_bytes)

    def arrived(self, chunk: int, num_bytes: int) -> None:
        self._inner.arrived(chunk, num_bytes)
        view = self._inner.buffer(chunk, num_bytes)
        with self._guard:
            if not self._is_stopped:
                self._last = self._copier.start(view, chunk * self._chunk_bytes)

    def stop(self) -> None:
        self._inner.stop()
        with self._guard:
            self._is_stopped = True

    def finish(self) -> None:
        self._inner.finish()
        self._drain()

    def close(self) -> None:
        """After the load's end, of any kind: no copy is under way, and the memory is pinned no more."""
        # Who loaded has heard of a copy that failed.
        with suppress(LoadError):
            self._drain()
        self._copier.close()

    def _drain(self) -> None:
        with self._guard:
            if self._last is not None:
                self._last.wait()
            self._last = None


class DeviceThroughRing:
    """`coldstart.pipeline.Destination` that leaves nothing on the host but a ring of `num_buffers` chunks."""

    def __init__(self, chunk_bytes: int, copier: Copier, *, num_buffers: int = RING_CHUNKS) -> None:
        """Takes `copier` over. `num_buffers` must be more than the threads that read."""
        self._chunk_bytes = chunk_bytes
        self._copier = copier
        self._ring = memoryview(mmap.mmap(-1, num_buffers * chunk_bytes))
        copier.pin(self._ring)
        self._changed = threading.Condition()
        self._free = deque(range(num_buffers))
        #: Buffers of chunks that are being read.
        self._filling: dict[int, int] = {}
        #: In the order in which their copies began, and will end.
        self._copying: deque[tuple[int, Ticket]] = deque()
        self._is_stopped = False

    def buffer(self, chunk: int, num_bytes: int) -> memoryview:
        with self._changed:
            slot = self._take()
            self._filling[chunk] = slot
        return self._slot(slot, num_bytes)

    def arrived(self, chunk: int, num_bytes: int) -> None:
        with self._changed:
            slot = self._filling.pop(chunk)
            if self._is_stopped:
                return
            ticket = self._copier.start(self._slot(slot, num_bytes), chunk * self._chunk_bytes)
            self._copying.append((slot, ticket))
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def finish(self) -> None:
        self._drain()

    def close(self) -> None:
        """After the load's end, of any kind: no copy is under way, and nothing is pinned any more."""
        # Who loaded has heard of a copy that failed.
        with suppress(LoadError):
            self._drain()
        self._copier.close()

    def _take(self) -> int:
        """A free buffer. The condition is held, but while a copy is waited for."""
        while True:
            if self._is_stopped:
                raise Cancelled("the load was stopped")
            if self._free:
                return self._free.popleft()
            if not self._copying:
                self._changed.wait()
                continue
            slot, ticket = self._copying.popleft()
            self._changed.release()
            try:
                ticket.wait()
            finally:
                self._changed.acquire()
            self._free.append(slot)
            self._changed.notify_all()

    def _drain(self) -> None:
        with self._changed:
            while self._copying:
                slot, ticket = self._copying.popleft()
                ticket.wait()
                self._free.append(slot)

    def _slot(self, slot: int, num_bytes: int) -> memoryview:
        return self._ring[slot * self._chunk_bytes : slot * self._chunk_bytes + num_bytes]


class _CudaTicket:
    def __init__(self, event: Any) -> None:
        self._event = event

    def wait(self) -> None:
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise LoadError(f"a copy to the device failed: {error}") from error


class CudaCopier:
    """`Copier` to a flat uint8 tensor of a CUDA device, on a stream of its own."""

    def __init__(self, into: Tensor) -> None:
        assert into.dtype == torch.uint8, into.dtype
        assert into.dim() == 1, into.shape
        self._into = into
        self._stream: Any = _CUDA.Stream(into.device)
        # Whoever used the memory before has finished when the first copy begins.
        self._stream.wait_stream(_CUDA.current_stream(into.device))
        self._unpinning = ExitStack()

    def pin(self, memory: memoryview) -> None:
        if not len(memory):
            return
        address = address_of(memory)
        runtime: Any = _CUDA.cudart()
        with _CUDA.device(self._into.device):
            try:
                _CUDA.check_error(int(runtime.cudaHostRegister(address, len(memory), 0)))
            except RuntimeError as error:
                raise LoadError(f"cannot pin {len(memory)} bytes of memory: {error}") from error
        self._unpinning.callback(runtime.cudaHostUnregister, address)

    def start(self, source: memoryview, offset: int) -> Ticket:
        host = torch.frombuffer(source, dtype=torch.uint8)
        try:
            with _CUDA.stream(self._stream):
                self._into[offset : offset + len(source)].copy_(host, non_blocking=True)
                event: Any = _CUDA.Event()
                event.record(self._stream)
        except RuntimeError as error:
            raise LoadError(f"cannot copy to the device: {error}") from error
        return _CudaTicket(event)

    def close(self) -> None:
        self._stream.synchronize()
        self._unpinning.close()


def load_to_device(
    folder: Path,
    device: torch.device,
    rank: int = 0,
    *,
    progress: Callable[[LoadProgress], None] | None = None,
) -> LoadedWeights:
    """One partition of a converted checkpoint on a CUDA device; nothing of it stays on the host. Blocks.

    Raises CorruptCheckpoint, LoadError, ConfigError.
    """
    index = read_checkpoint(folder)
    partition = partition_of(index, rank)
    try:
        memory = torch.empty(partition.num_bytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:
        raise LoadError(f"{device}: cannot take {partition.num_bytes} bytes: {error}") from error
    ring = DeviceThroughRing(index.chunk_bytes, CudaCopier(memory))
    try:
        load_partition(folder, index, rank, ring, progress=progress)
    finally:
        ring.close()
    return LoadedWeights(memory, index, rank)
