"""Has one C file compiled by another process and keeps the library, once per machine and user."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import secrets
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

#: The library appears under its name in one step, also where the process that asked for it is gone by then.
_COMPILE = """
unfinished=$1 library=$2; shift 2
"$@" -o "$unfinished" && mv -f "$unfinished" "$library" || { rm -f "$unfinished"; exit 1; }
"""


class NativeBuild:
    """Nobody waits for it who does not want to."""

    def __init__(
        self,
        source: Path,
        *,
        name: str,
        flags: tuple[str, ...],
        libraries: tuple[str, ...] = (),
        compiler: str | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """compiler: a command line; default `$CC`, else `cc`. cache_dir: default `$XDG_CACHE_HOME/tandem/NAME`."""
        self._command = shlex.split(compiler or os.environ.get("CC") or "cc")
        self._arguments = (*self._command, *flags, str(source), *libraries)
        self._folder = cache_dir or _default_cache_dir(name)
        #: Where the library is, once it is.
        self.library = self._folder / f"{_fingerprint(source, (*self._command, *flags, *libraries))}.so"
        self._unfinished = self.library.with_suffix(f".{secrets.token_hex(4)}")
        #: The compiler, while it runs.
        self._compiler: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Has it compiled unless an earlier run did. Where that is impossible there will be no library."""
        if self.library.exists() or not self._command or shutil.which(self._command[0]) is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._compiler = subprocess.Popen(
                ("sh", "-c", _COMPILE, "sh", str(self._unfinished), str(self.library), *self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )

    def poll(self) -> bool:
        """Whether the library is there now or will not be."""
        if self._compiler is not None and self._compiler.poll() is not None:
            self._compiler = None
        return self._compiler is None

    def wait(self, timeout_s: float) -> None:
        """Returns when `poll` is true, or `timeout_s` later with the compiler ended."""
        if self._compiler is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._compiler.wait(timeout_s)
        self.close()

    def close(self) -> None:
        """Ends a compiler that still runs."""
        if self._compiler is not None and self._compiler.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._compiler.pid, signal.SIGKILL)
            self._compiler.wait()
            self._unfinished.unlink(missing_ok=True)
        self._compiler = None


def _default_cache_dir(name: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "tandem" / name
    except RuntimeError:
        # A user without a home: nothing can be made in there.
        return Path(os.devnull)


def _fingerprint(source: Path, arguments: tuple[str, ...]) -> str:
    parts = (source.read_text(), shlex.join(arguments), platform.machine(), "".join(platform.libc_ver()))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
