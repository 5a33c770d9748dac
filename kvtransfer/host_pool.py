"""A worker's KV pool in host memory that other processes of the machine can map.

It is a memfd, sealed so that it can neither shrink nor grow: who mapped it never meets a missing page. Every
transport of a worker serves this one pool; which of them a reader uses is settled per reader.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import threading

import numpy as np

from contracts.errors import ConfigError

#: Of madvise(2), since Linux 5.14; this Python has no name for it.
_MADV_POPULATE_WRITE = 23

#: Bytes given pages in one call, which keeps the process's other threads from mapping memory: some 3 ms.
_POPULATED_AT_ONCE = 4 << 20

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def address_of(mapping: mmap.mmap) -> int:
    """Where the mapping begins; valid until it is closed. Works for read-only ones too."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


class HostPool:
    """`num_blocks * block_bytes` zeroed bytes of memfd, mapped writable and page-aligned. Pages exist once touched,
    or from `populate` on.

    Linux only. `read_only` is the descriptor for other processes: it cannot be mapped writable.
    """

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        """Raises ConfigError when the memory cannot be had."""
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        num_bytes = num_blocks * block_bytes
        writable = os.memfd_create("tandem-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(writable, num_bytes)
            fcntl.fcntl(writable, fcntl.F_ADD_SEALS, SEALS)
            self._mapping = mmap.mmap(writable, num_bytes)
            self.read_only = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"cannot map a KV pool of {num_bytes} bytes: {error}") from error
        finally:
            os.close(writable)
        self.address = address_of(self._mapping)
        self._closing = threading.Event()
        #: The thread that gives all of it pages; None where nobody asked for that.
        self._populating: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<HostPool [{self.num_blocks} x {self.block_bytes} bytes]>"

    def view(self) -> memoryview:
        """All of it, writable; `torch.frombuffer` and numpy may wrap it. Valid until `close`."""
        return memoryview(self._mapping)

    def populate(self) -> None:
        """Has all pages made in the background, so that no pull waits for them: it would run at a tenth of its speed.

        The memory is then taken from the machine, as it will be once every block has been used. Where the
        kernel cannot do that (before Linux 5.14, or no memory left) pages are made when touched.
        """
        if self._populating is None:
            self._populating = threading.Thread(target=self._populate, name="kv-populate", daemon=True)
            self._populating.start()

    def _populate(self) -> None:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        num_bytes = self.num_blocks * self.block_bytes
        for start in range(0, num_bytes, _POPULATED_AT_ONCE):
            size = min(_POPULATED_AT_ONCE, num_bytes - start)
            if self._closing.is_set() or madvise(self.address + start, size, _MADV_POPULATE_WRITE) != 0:
                return

    def close(self) -> None:
        """Lets the descriptor go, and the memory with the last view of it."""
        self._closing.set()
        if self._populating is not None:
            self._populating.join()
        os.close(self.read_only)
        # Tensors over the pool may outlive it; the mapping then ends with them.
        with contextlib.suppress(BufferError):
            self._mapping.close()
