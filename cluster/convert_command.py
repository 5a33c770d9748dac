"""`tandem convert`: a model folder in Hugging Face layout becomes one that loads at the disk's speed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cyclopts import App

    from coldstart.convert import ConvertProgress

ModelFolder = Annotated[Path, Parameter(help="Folder with config.json and *.safetensors.")]
Output = Annotated[Path, Parameter(help="Folder to make; it is there in one step, when all of it is.")]

#: Between two lines of progress where they cannot be written over.
LINE_INTERVAL_S = 10.0
#: Between two forms of a line that can.
IN_PLACE_INTERVAL_S = 0.1
_BAR_WIDTH = 24


def convert(
    model: ModelFolder,
    output: Output,
    /,
    *,
    tensor_parallel: Annotated[
        int, Parameter(name="--tensor-parallel", help="Ranks that share the weights: one file each.")
    ] = 1,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Parameter(name="--dtype", help="auto keeps what is stored, bit for bit. Workers map what they compute in."),
    ] = "auto",
) -> int:
    """Convert a model folder to Tandem's format, which loads at the disk's speed. Goes on where it was stopped."""
    from coldstart.convert import ConvertOptions
    from coldstart.convert import convert as convert_folder

    folder = model.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"model {model}: no such folder")
    target = output.expanduser().absolute()
    bar = ProgressBar(in_place=sys.stdout.isatty(), now_s=time.monotonic, write=_write)
    options = ConvertOptions(dtype=dtype, tensor_parallel=tensor_parallel)
    try:
        index = convert_folder(folder, target, options, progress=bar.update)
    finally:
        bar.end()
    num_bytes = sum(partition.num_bytes for partition in index.partitions)
    ranks = f" in {index.tensor_parallel} partitions" if index.tensor_parallel > 1 else ""
    _write(f"{target}: {num_bytes / 1e9:.2f} GB of {index.dtype} weights{ranks}, checked\n")
    return 0


def add_convert_command(app: App) -> None:
    app.command(convert)


class ProgressBar:
    """How far a conversion is: one line that changes, or now and then a new one."""

    def __init__(self, *, in_place: bool, now_s: Callable[[], float], write: Callable[[str], None]) -> None:
        self._in_place = in_place
        self._now_s = now_s
        self._write = write
        self._told_s = now_s()
        #: Whether the cursor stands behind a line that may be written over.
        self._is_open = False

    def update(self, progress: ConvertProgress) -> None:
        now_s = self._now_s()
        is_last = progress.done_bytes == progress.total_bytes
        if now_s - self._told_s < (IN_PLACE_INTERVAL_S if self._in_place else LINE_INTERVAL_S) and not is_last:
            return
        self._told_s = now_s
        line = progress_line(progress)
        if not self._in_place:
            self._write(f"{line}\n")
            return
        self._is_open = not is_last
        self._write(f"\r{line}" + ("\n" if is_last else ""))

    def end(self) -> None:
        """What is written next begins a line."""
        if self._is_open:
            self._is_open = False
            self._write("\n")


def progress_line(progress: ConvertProgress) -> str:
    """'written  [############------------]  50%, 1.20 of 2.40 GB'."""
    share = progress.done_bytes / progress.total_bytes if progress.total_bytes else 1.0
    filled = int(share * _BAR_WIDTH)
    bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
    counted = f"{progress.done_bytes / 1e9:.2f} of {progress.total_bytes / 1e9:.2f} GB"
    return f"{progress.what:<8} [{bar}] {share:>4.0%}, {counted}"


def _write(text: str) -> None:
    """A terminal that is gone, or a full disk behind it, must not end a conversion."""
    try:
        print(text, end="", flush=True)
    except OSError:
        return
