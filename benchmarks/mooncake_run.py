"""Has Mooncake's transfer engine measured in an environment of its own; see `benchmarks.mooncake_tcp`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = "mooncake-transfer-engine-non-cuda"
INSTALL_TIMEOUT_S = 120.0
RUN_TIMEOUT_S = 90.0

#: Mooncake listens on all interfaces: it gets a network of its own, with nothing but loopback in it.
ALONE = ("unshare", "--map-root-user", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")


class NotRun(Exception):
    """Why there is nothing to compare with."""


def measure_mooncake(cells: Sequence[tuple[int, int]], cell_s: float, *, install: bool) -> list[dict[str, Any]]:
    """Seconds of reads for each (block bytes, total bytes). `install`: make the environment where it is missing,
    with pip. Raises NotRun."""
    python = _environment(install)
    arguments = [str(cell_s), *(f"{block}:{total}" for block, total in cells)]
    script = str(Path(__file__).with_name("mooncake_tcp.py"))
    output = _run([*ALONE, str(python), script, *arguments], RUN_TIMEOUT_S)
    found: list[dict[str, Any]] = json.loads(output.splitlines()[-1])["cells"]
    return found


def _environment(install: bool) -> Path:
    """The interpreter of an environment that has Mooncake."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "tandem" / "bench-mooncake"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        if not install:
            raise NotRun("it is installed by a run without --quick")
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(folder)], INSTALL_TIMEOUT_S)
        _run([str(python), "-m", "pip", "install", "--quiet", PACKAGE], INSTALL_TIMEOUT_S)
        (folder / "complete").touch()
    _run([str(python), "-c", "import mooncake.engine"], RUN_TIMEOUT_S)
    return python


def _run(command: Sequence[str], timeout_s: float) -> str:
    """Its output. Raises NotRun with its last line of complaint."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotRun(str(error)) from error
    if done.returncode != 0:
        complaint = [line for line in done.stderr.splitlines() if line.strip() and "pip" not in line] or ["no reason"]
        raise NotRun(complaint[-1])
    return done.stdout
