"""How every benchmark ends: a table for people, the machine, and one line of JSON for programs."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Distributions whose versions can change a figure.
_DISTRIBUTIONS = (
    "torch",
    "transformers",
    "numpy",
    "msgspec",
    "grpcio",
    "uvloop",
    "fastapi",
    "nixl-cu12",
    "xxhash",
    "zstandard",
)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Left-aligned first column, right-aligned others; floats with three significant digits."""
    cells = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[index]) for row in cells) for index in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        first, *others = (f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join((f"{first.strip():<{widths[0]}}", *others)))


def finish(benchmark: str, figures: Mapping[str, float]) -> None:
    """Prints machine and versions, then, as the last line, everything as one JSON object."""
    machine, versions = machine_info(), version_info()
    print(f"\nmachine: {', '.join(f'{key} {value}' for key, value in machine.items())}")
    print(f"versions: {', '.join(f'{key} {value}' for key, value in versions.items())}")
    report = {
        "benchmark": benchmark,
        "figures": {name: float(f"{value:.4g}") for name, value in figures.items()},
        "machine": machine,
        "versions": versions,
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *sys.argv[1:]]),
    }
    print(json.dumps(report), flush=True)


def machine_info() -> dict[str, str | int | float]:
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0,
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "load_1min": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.release()}",
    }


def version_info() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def spread(values: Sequence[float]) -> str:
    """`median (lowest-highest)`, for tables."""
    return f"{_cell(median(values))} ({_cell(min(values))}-{_cell(max(values))})"


def quantile_ms(values_s: Sequence[float], quantile: float, *, digits: int = 1) -> str:
    """The smallest value with at least that share of all at or below it, in milliseconds."""
    ordered = sorted(values_s)
    rank = math.ceil(quantile * len(ordered))
    return f"{1e3 * ordered[max(0, rank - 1)]:.{digits}f}"


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
