"""Copies the blocks of a pull between two mappings, without the GIL.

Done by a C function of a few lines where there is a compiler: one call for all of a pull. The loop in Python is
about as fast on an idle process for large blocks, but it lets the GIL go and takes it again for every run of blocks,
and next to a busy thread each taking can last 5 ms: 16 KiB blocks then move at a hundredth of the speed.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvtransfer.transport import check_pairs, runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.transport import BlockPair

#: Bytes copied between two looks at the stop flag.
PIECE_BYTES = 4 << 20

#: Pairs turned into an array in one go, which holds the GIL: 0.05 us each.
_PAIRS_AT_ONCE = 8192

_SOURCE = Path(__file__).with_name("block_copy.c")
_FLAGS = ("-O2", "-shared", "-fPIC")

#: The library appears under its name in one step, also where the process that asked for it is gone by then.
_COMPILE = """
unfinished=$1 library=$2; shift 2
"$@" -o "$unfinished" && mv -f "$unfinished" "$library" || { rm -f "$unfinished"; exit 1; }
"""


class StopFlag:
    """Set by one thread, seen by another that copies."""

    def __init__(self) -> None:
        self._word = ctypes.c_int32(0)
        self.address = ctypes.addressof(self._word)

    def set(self) -> None:
        self._word.value = 1

    def __bool__(self) -> bool:
        return self._word.value != 0


class Blocks(Protocol):
    """Blocks that lie one after the other from `address` on."""

    @property
    def address(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...


class BlockCopy(Protocol):
    """Copies blocks; returns the bytes copied, all of them unless `stop` was seen set."""

    def __call__(
        self, source: Blocks, target: Blocks, block_bytes: int, pairs: Sequence[BlockPair], stop: StopFlag
    ) -> int:
        """Raises BadRequest, before a byte is copied, for a pair of a block that is not there."""
        ...


def copy_in_python(source: Blocks, target: Blocks, block_bytes: int, pairs: Sequence[BlockPair], stop: StopFlag) -> int:
    """`BlockCopy` without a compiler."""
    check_pairs(pairs, source.num_blocks, target.num_blocks)
    copied = 0
    for first_source, first_target, num_blocks in runs(pairs):
        reading = source.address + first_source * block_bytes
        writing = target.address + first_target * block_bytes
        end = writing + num_blocks * block_bytes
        while writing < end:
            if stop:
                return copied
            size = min(PIECE_BYTES, end - writing)
            ctypes.memmove(writing, reading, size)
            copied += size
            reading += size
            writing += size
    return copied


class NativeCopy:
    """`BlockCopy` by the compiled function."""

    def __init__(self, library: Path) -> None:
        """Raises OSError where the library cannot be loaded."""
        self._copy = ctypes.CDLL(str(library)).tandem_copy_blocks
        self._copy.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 2 + (ctypes.c_void_p,)
        self._copy.restype = ctypes.c_int64

    def __call__(
        self, source: Blocks, target: Blocks, block_bytes: int, pairs: Sequence[BlockPair], stop: StopFlag
    ) -> int:
        table = _as_array(pairs)
        if not _all_below(table[0::2], source.num_blocks) or not _all_below(table[1::2], target.num_blocks):
            check_pairs(pairs, source.num_blocks, target.num_blocks)
        return int(self._copy(target.address, source.address, table.ctypes.data, len(pairs), block_bytes, stop.address))


def _as_array(pairs: Sequence[BlockPair]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    table = np.empty(2 * len(pairs), np.int64)
    numbers = itertools.chain.from_iterable(pairs)
    for start in range(0, len(table), 2 * _PAIRS_AT_ONCE):
        part = table[start : start + 2 * _PAIRS_AT_ONCE]
        part[:] = np.fromiter(numbers, np.int64, len(part))
    return table


def _all_below(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], limit: int) -> bool:
    # Negative numbers are large as unsigned ones.
    return not len(numbers) or int(numbers.view(np.uint64).max()) < limit


class CopyBuild:
    """Has the C function compiled by another process, once per machine and user; nobody waits for it."""

    def __init__(self, *, compiler: str | None = None, cache_dir: Path | None = None) -> None:
        """compiler: a command line; default `$CC`, else `cc`. cache_dir: default `$XDG_CACHE_HOME/tandem/copy`."""
        self._command = shlex.split(compiler or os.environ.get("CC") or "cc")
        self._folder = cache_dir or _default_cache_dir()
        self._library = self._folder / f"{_fingerprint(self._command)}.so"
        self._unfinished = self._library.with_suffix(f".{secrets.token_hex(4)}")
        #: The compiler, while it runs.
        self._compiler: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Has it compiled unless an earlier run did. Where that is impossible `take` will have none."""
        if self._library.exists() or not self._command or shutil.which(self._command[0]) is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            what = (str(self._unfinished), str(self._library), *self._command, *_FLAGS, str(_SOURCE))
            self._compiler = subprocess.Popen(
                ("sh", "-c", _COMPILE, "sh", *what),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Whether `take` has its last word."""
        if self._compiler is not None and self._compiler.poll() is not None:
            self._compiler = None
        return self._compiler is None

    def take(self) -> BlockCopy:
        """The compiled function, or the loop in Python where that cannot be had."""
        try:
            return NativeCopy(self._library)
        except OSError:
            return copy_in_python

    def close(self) -> None:
        """Ends a compiler that still runs."""
        if self._compiler is not None and self._compiler.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._compiler.pid, signal.SIGKILL)
            self._compiler.wait()
            self._unfinished.unlink(missing_ok=True)
        self._compiler = None


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "tandem" / "copy"
    except RuntimeError:
        # A user without a home: nothing can be made in there.
        return Path(os.devnull)


def _fingerprint(command: list[str]) -> str:
    parts = (_SOURCE.read_text(), shlex.join((*command, *_FLAGS)), platform.machine(), "".join(platform.libc_ver()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
