"""The side that a conversion reads: a model folder in Hugging Face layout, a few rows at a time."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from coldstart.dtypes import converted, first_lost
from coldstart.file_source import FileSource
from coldstart.format import INDEX_NAME, checksum
from contracts.errors import ConfigError, LoadError
from engine.fused import expected_tensors, optional_tensors
from engine.model_config import load_model_config
from engine.safetensors_files import ITEM_BYTES, StoredDtype, check_names, model_fingerprint, read_headers

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.partition import PartitionPlan, Span
    from engine.compute_dtype import DtypeChoice
    from engine.safetensors_files import StoredTensor

#: Rows that are cut or converted on their way are staged in pieces of this size (of one row, where rows are longer).
_STAGING_BYTES = 4 << 20

#: What belongs to a served model besides its weights.
_COPIED = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
_NOT_COPIED = ("*.safetensors.index.json", INDEX_NAME)


class Original:
    """A model folder whose headers were read and checked against its config. Not safe for two threads."""

    def __init__(self, model_dir: Path) -> None:
        """Raises ConfigError naming file and tensor."""
        self.folder = model_dir
        self.config = load_model_config(model_dir)
        expected = expected_tensors(self.config)
        stored = read_headers(model_dir)
        check_names(model_dir, stored, expected, optional_tensors(self.config))
        self._stored: dict[str, StoredTensor] = {name: stored[name] for name in expected}
        self.fingerprint = model_fingerprint(model_dir)
        self._state = self._files_state()
        self._open: dict[Path, FileSource] = {}
        self._staging = bytearray(_STAGING_BYTES)

    def close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open.clear()

    def dtype(self, choice: DtypeChoice) -> StoredDtype:
        """What to convert to. Raises ConfigError for "auto" of tensors of several dtypes."""
        if choice != "auto":
            return choice
        names: dict[StoredDtype, str] = {}
        for name, tensor in self._stored.items():
            names.setdefault(tensor.dtype, name)
        if len(names) > 1:
            some = ", ".join(f"{tensor} is {dtype}" for dtype, tensor in names.items())
            raise ConfigError(f"{self.folder}: its tensors are of several dtypes ({some}); name the one to convert to")
        return next(iter(names))

    def identity(self) -> str:
        """Hex digest that changes with the folder's weights, and when a file of them was written again."""
        return hashlib.sha256(f"{self.fingerprint} {self._state}".encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Raises LoadError when a weight file was written to since the headers were read."""
        if self._files_state() != self._state:
            raise LoadError(f"{self.folder}: its weight files changed while they were converted")

    def files_to_copy(self) -> list[Path]:
        found = {path for pattern in _COPIED for path in self.folder.glob(pattern) if path.is_file()}
        return sorted(path for path in found if not any(path.match(pattern) for pattern in _NOT_COPIED))

    def read_chunk(self, plan: PartitionPlan, start: int, dtype: StoredDtype, into: memoryview) -> int:
        """Fills `into`, which is zeroed, with the bytes of a partition from `start` on; returns their checksum. Raises
        as `read`."""
        for span in plan.spans(start, start + len(into)):
            self.read(span, dtype, into[span.start : span.start + span.num_items * plan.item_bytes])
        return checksum(into)

    def read(self, span: Span, dtype: StoredDtype, into: memoryview) -> None:
        """Fills `into` with the items of the span. Raises LoadError, and ConfigError for values that do not fit."""
        tensor, piece = self._stored[span.piece.source], span.piece
        if piece.num_columns == piece.row_length:
            first = piece.row * piece.row_length + span.first_item
            self._read_items(span.piece.source, tensor, first, span.num_items, dtype, into)
        else:
            self._read_columns(span, tensor, dtype, into)

    def _read_items(
        self, name: str, tensor: StoredTensor, first: int, num_items: int, dtype: StoredDtype, into: memoryview
    ) -> None:
        stored, size, target_size = tensor.dtype, ITEM_BYTES[tensor.dtype], ITEM_BYTES[dtype]
        if stored == dtype:
            self._file(tensor).read_into(tensor.start + first * size, into)
            return
        step = _STAGING_BYTES // size
        for done in range(0, num_items, step):
            count = min(step, num_items - done)
            raw = memoryview(self._staging)[: count * size]
            self._file(tensor).read_into(tensor.start + (first + done) * size, raw)
            into[done * target_size : (done + count) * target_size] = _converted(name, raw, stored, dtype)

    def _read_columns(self, span: Span, tensor: StoredTensor, dtype: StoredDtype, into: memoryview) -> None:
        """Whole rows are read and cut; the first and the last of the span may be needed in part."""
        piece, size, target_size = span.piece, ITEM_BYTES[tensor.dtype], ITEM_BYTES[dtype]
        row_bytes = piece.row_length * size
        step = max(1, _STAGING_BYTES // row_bytes)
        stop_item = span.first_item + span.num_items
        filled = 0
        for row in range(span.first_item // piece.num_columns, -(-stop_item // piece.num_columns), step):
            num_rows = min(step, -(-stop_item // piece.num_columns) - row)
            raw = self._stage(num_rows * row_bytes)
            self._file(tensor).read_into(tensor.start + (piece.row + row) * row_bytes, raw)
            rows = np.frombuffer(raw, np.uint8).reshape(num_rows, row_bytes)
            cut = np.ascontiguousarray(rows[:, piece.column * size : (piece.column + piece.num_columns) * size])
            low = max(span.first_item - row * piece.num_columns, 0)
            high = min(stop_item - row * piece.num_columns, num_rows * piece.num_columns)
            items = memoryview(cut.reshape(-1).data)[low * size : high * size]
            if tensor.dtype != dtype:
                items = _converted(piece.source, items, tensor.dtype, dtype)
            into[filled : filled + (high - low) * target_size] = items
            filled += (high - low) * target_size

    def _stage(self, num_bytes: int) -> memoryview:
        if num_bytes > len(self._staging):
            self._staging = bytearray(num_bytes)
        return memoryview(self._staging)[:num_bytes]

    def _file(self, tensor: StoredTensor) -> FileSource:
        if tensor.file not in self._open:
            # Ranks want the same rows one after the other.
            self._open[tensor.file] = FileSource(tensor.file, direct=False, keep_cached=True)
        return self._open[tensor.file]

    def _files_state(self) -> list[tuple[str, int, int]]:
        paths = sorted({tensor.file for tensor in self._stored.values()})
        try:
            return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        except OSError as error:
            raise LoadError(f"{self.folder}: {error}") from error


def _converted(name: str, raw: memoryview, stored: StoredDtype, dtype: StoredDtype) -> memoryview:
    after = converted(raw, stored, dtype)
    lost = first_lost(raw, stored, after, dtype)
    if lost is not None:
        raise ConfigError(f"tensor {name}: {lost:g} is too large for {dtype}")
    return after.data
