"""Compiles the CPU kernels at first use and keeps them.

The library is compiled for the machine it runs on, and cached under a name that holds everything it depends
on: sources, compiler, flags and CPU. Workers that start together wait for the first of them; the lock is the
kernel's (`flock`), so that it goes when its holder dies.

OpenMP: objects are compiled with `-fopenmp` but the library is linked without it. Its symbols then resolve to
the runtime that torch has loaded, so that torch and these kernels share one team of threads; a second runtime
would spin against the first.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

_FOLDER = Path(__file__).parent
_SOURCES = ("attention.cpp", "elementwise.cpp", "linear.cpp")
_HEADERS = ("simd.h",)
_COMPILE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi")
NATIVE = ("-march=native",)
_TIMEOUT_S = 300.0


class BuildError(Exception):
    """The kernels cannot be had on this machine; the message says why."""


def load_kernels(
    *,
    compiler: str | None = None,
    machine_flags: Sequence[str] = NATIVE,
    cache_dir: Path | None = None,
) -> ctypes.CDLL:
    """The kernels, compiled now unless an earlier run has done so.

    compiler: a command line; default `$CXX`, else `c++`. machine_flags: what to compile for; others than the
    default are for tests. cache_dir: default `$XDG_CACHE_HOME/tandem/kernels`. Raises BuildError.
    """
    command = shlex.split(compiler or os.environ.get("CXX") or "c++")
    folder = cache_dir or _default_cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{_fingerprint(command, machine_flags)}.so"
        if not library.exists():
            with _locked(library.with_suffix(".lock")):
                if not library.exists():
                    _build(command, machine_flags, library)
        # Binds every symbol now: an OpenMP runtime that torch does not have must show here.
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{type(error).__name__}: {error}") from error


def _default_cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tandem" / "kernels"


def _fingerprint(command: list[str], machine_flags: Sequence[str]) -> str:
    if not command or shutil.which(command[0]) is None:
        raise BuildError(f"no C++ compiler: {shlex.join(command)!r} not found")
    parts = [
        *((_FOLDER / name).read_text() for name in (*_SOURCES, *_HEADERS)),
        shlex.join(command),
        _run([*command, "--version"]),
        shlex.join((*_COMPILE_FLAGS, *machine_flags)),
        _cpu(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cpu() -> str:
    """What `-march=native` looks at, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    wanted = ("model name", "cpu family", "model\t", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(wanted))])


def _build(command: list[str], machine_flags: Sequence[str], library: Path) -> None:
    """Compiles the files side by side and publishes the library under its name in one step."""
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as temporary:
        objects = [f"{temporary}/{name}.o" for name in _SOURCES]
        compilers = [
            subprocess.Popen(
                [*command, *_COMPILE_FLAGS, *machine_flags, "-c", str(_FOLDER / name), "-o", target],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for name, target in zip(_SOURCES, objects, strict=True)
        ]
        try:
            outputs = [process.communicate(timeout=_TIMEOUT_S)[0] for process in compilers]
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"compiler still running after {_TIMEOUT_S:.0f} s") from error
        finally:
            for process in compilers:
                if process.poll() is None:
                    process.kill()
                    process.communicate()
        for process, output in zip(compilers, outputs, strict=True):
            if process.returncode != 0:
                raise BuildError(f"compiler failed: {_first_error(output)}")
        linked = f"{temporary}/kernels.so"
        _run([*command, "-shared", *objects, "-o", linked])
        os.replace(linked, library)


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} still running after {_TIMEOUT_S:.0f} s") from error
    if result.returncode != 0:
        raise BuildError(f"{command[0]} failed: {_first_error(result.stderr or result.stdout)}")
    return result.stdout


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["no output"]
    return next((line for line in lines if "error" in line), lines[0])


@contextmanager
def _locked(path: Path) -> Generator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
