"""A worker's KV pool in host memory that other processes of the machine can map.

It is a memfd, sealed so that it can neither shrink nor grow: who mapped it never meets a missing page. Every
transport of a worker serves this one pool; which of them a reader uses is settled per reader.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os

import numpy as np

from contracts.errors import ConfigError

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def address_of(mapping: mmap.mmap) -> int:
    """Where the mapping begins; valid until it is closed. Works for read-only ones too."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


class HostPool:
    """`num_blocks * block_bytes` zeroed bytes of memfd, mapped writable and page-aligned. Pages exist once touched.

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

    def __repr__(self) -> str:
        return f"<HostPool [{self.num_blocks} x {self.block_bytes} bytes]>"

    def view(self) -> memoryview:
        """All of it, writable; `torch.frombuffer` and numpy may wrap it. Valid until `close`."""
        return memoryview(self._mapping)

    def close(self) -> None:
        """Lets the descriptor go, and the memory with the last view of it."""
        os.close(self.read_only)
        # Tensors over the pool may outlive it; the mapping then ends with them.
        with contextlib.suppress(BufferError):
            self._mapping.close()
