"""Memory that weights lie in. Without torch: loaders need none."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, cast

import numpy as np

from contracts.errors import LoadError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

#: Of madvise(2), since Linux 5.14; this Python has no names for them.
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class WeightMemory:
    """Memory for one partition: a memfd that neither shrinks nor grows, mapped writable. Pages exist once touched.

    `read_only` is the descriptor for other processes: it cannot be mapped writable. Closed by `close`.
    """

    def __init__(self, num_bytes: int) -> None:
        """Raises LoadError when the memory cannot be had."""
        self.num_bytes = num_bytes
        writable = os.memfd_create("tandem-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(writable, num_bytes)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, _SEALS)
            self.mapping = mmap.mmap(writable, num_bytes)
            self.read_only = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError, OverflowError) as error:
            raise LoadError(f"cannot map {num_bytes} bytes of memory for weights: {error}") from error
        finally:
            os.close(writable)

    def __repr__(self) -> str:
        return f"<WeightMemory {self.num_bytes} bytes>"

    def close_descriptor(self) -> None:
        """No other process can map it any more that has not yet. Idempotent."""
        if self.read_only >= 0:
            os.close(self.read_only)
            self.read_only = -1

    def close(self) -> None:
        """Lets go of the descriptor, and of the memory once no view of it is left. Idempotent."""
        self.close_descriptor()
        with contextlib.suppress(BufferError):
            self.mapping.close()


def address_of(memory: Buffer) -> int:
    """Where it begins; valid while somebody holds it. Works for read-only memory too."""
    return int(as_array(memory).ctypes.data)


def as_array(memory: Buffer) -> NDArray[np.uint8]:
    """Its bytes, which it keeps mapped; read-only as the memory is."""
    return np.frombuffer(cast("memoryview", memory), np.uint8)


def ask_for_huge_pages(address: int, num_bytes: int) -> None:
    """Has pages that are made there from now on be large ones, where the machine's administrator lets shared memory
    have them (`shmem_enabled`): then a worker maps a model in a millisecond. Elsewhere nothing changes."""
    _advise(address, num_bytes, mmap.MADV_HUGEPAGE)


def populate_write(address: int, num_bytes: int) -> bool:
    """Makes the pages there. False where the kernel cannot (before Linux 5.14): then who writes makes them."""
    return _advise(address, num_bytes, _MADV_POPULATE_WRITE)


def populate_read(mapping: mmap.mmap) -> bool:
    """Has the pages that exist mapped here at once, so that the first forward pass over them does not meet a fault for
    every few of them. False where the kernel cannot (before Linux 5.14): then they are mapped when touched."""
    return _advise(address_of(mapping), len(mapping), _MADV_POPULATE_READ)


def _advise(address: int, num_bytes: int, advice: int) -> bool:
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(address, num_bytes, advice) == 0)
