"""Checkpoints in Hugging Face layout: safetensors, single or sharded. Read only; pickle is never opened.

Every header is checked against what the config promises before a byte of weights is read; then each tensor
is read straight into its place (fused with its neighbours where the decoder multiplies them together), in the
target dtype, so that the weights are in memory once.

Format: eight bytes little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}`, the bytes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, Protocol

import msgspec
import torch

from contracts.errors import ConfigError
from engine.model_config import config_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from io import BufferedReader
    from pathlib import Path

    from torch import Tensor

LoadFormat = Literal["auto", "dummy"]

_FLOAT_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
#: A header longer than this is not one; the format's own limit.
_MAX_HEADER_BYTES = 100_000_000
#: Staging for tensors whose dtype changes on the way in: bounds the extra memory.
_STAGING_BYTES = 32 << 20
_SAMPLES_PER_FILE = 16
_SAMPLE_BYTES = 4096
_LFS_MARK = b"version https://git-lfs"


class _HeaderEntry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies: bytes `[start, start + num_bytes)` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class WeightSource(Protocol):
    """Where a model's tensors come from."""

    def read_into(self, name: str, target: Tensor) -> None:
        """Fills `target`, a contiguous CPU tensor of the stored shape, converting to its dtype."""
        ...


class Checkpoint:
    """The weights of a model folder; open files are closed by `close` or the context manager."""

    def __init__(
        self,
        model_dir: Path,
        expected: dict[str, tuple[int, ...]],
        *,
        optional: frozenset[str] = frozenset(),
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Reads the headers.

        `expected` maps every tensor that the model needs to its shape; `optional` ones may be present and are
        ignored; `progress(bytes read, bytes in all)` is called now and then. Raises ConfigError naming file
        and tensor.
        """
        stored = read_headers(model_dir)
        _check_names(model_dir, stored, expected, optional)
        self._stored = {name: stored[name] for name in expected}
        self._progress = progress
        self._total_bytes = sum(tensor.num_bytes for tensor in self._stored.values())
        self._read_bytes = 0
        self._files: dict[Path, BufferedReader] = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read_into(self, name: str, target: Tensor) -> None:
        """As `WeightSource`. Raises ConfigError when the file cannot be read to the tensor's end."""
        tensor = self._stored[name]
        assert tuple(target.shape) == tensor.shape, (name, tuple(target.shape), tensor.shape)
        flat = target.view(-1)
        step = max(1, _STAGING_BYTES // tensor.dtype.itemsize)
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            staging = part if part.dtype == tensor.dtype else torch.empty(part.shape, dtype=tensor.dtype)
            self._read_exactly(name, tensor, start * tensor.dtype.itemsize, staging)
            if staging is not part:
                part.copy_(staging)

    def _read_exactly(self, name: str, tensor: StoredTensor, offset: int, into: Tensor) -> None:
        view = into.view(torch.uint8).numpy().data
        try:
            file = self._open(tensor.file)
            file.seek(tensor.start + offset)
            done = file.readinto(view)
        except OSError as error:
            raise ConfigError(f"{tensor.file}: cannot read tensor {name}: {error}") from error
        if done != len(view):
            raise ConfigError(f"{tensor.file}: truncated: tensor {name} needs {len(view)} bytes, {done} are left")
        self._read_bytes += done
        if self._progress is not None:
            self._progress(self._read_bytes, self._total_bytes)

    def _open(self, path: Path) -> BufferedReader:
        if path not in self._files:
            self._files[path] = path.open("rb")
        return self._files[path]


class DummyWeights:
    """Random weights for benchmarks: normal with the given deviation, norms one, biases zero.

    A function of name and shape alone, so that every worker of a cluster has the same model.
    """

    def __init__(self, std: float = 0.02) -> None:
        self._std = std

    def read_into(self, name: str, target: Tensor) -> None:
        if name.endswith("norm.weight"):
            target.fill_(1.0)
        elif name.endswith(".bias"):
            target.zero_()
        else:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
            target.normal_(0.0, self._std, generator=torch.Generator().manual_seed(seed))


def read_headers(model_dir: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's safetensors files, by name. Raises ConfigError."""
    single = model_dir / "model.safetensors"
    if single.is_file():
        return dict(_read_header(single))
    index = model_dir / "model.safetensors.index.json"
    if index.is_file():
        return _read_sharded(index)
    raise ConfigError(_no_weights(model_dir))


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that `read_headers` reads, sorted. Raises ConfigError."""
    return sorted({tensor.file for tensor in read_headers(model_dir).values()})


def model_fingerprint(model_dir: Path, load_format: LoadFormat = "auto") -> str:
    """Hex SHA-256 that tells models apart whose KV must not be mixed.

    Over config.json and, per weight file, its name, size, header, and a few pages spread evenly over the
    weights: two fine-tunings of one model have equal headers, but not equal weights.
    Raises ConfigError.
    """
    digest = hashlib.sha256(config_path(model_dir).read_bytes())
    if load_format == "dummy":
        digest.update(b"dummy")
        return digest.hexdigest()
    for path in weight_files(model_dir):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            digest.update(file.read(header_bytes))
            for sample in range(_SAMPLES_PER_FILE):
                file.seek(8 + header_bytes + (size - 8 - header_bytes) * sample // _SAMPLES_PER_FILE)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def stored_dtype(model_dir: Path) -> torch.dtype:
    """The dtype of most of the folder's weight bytes. Raises ConfigError."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in read_headers(model_dir).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def _read_sharded(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{index}: {error}") from error
    stored: dict[str, StoredTensor] = {}
    for file_name in sorted(set(weight_map.values())):
        path = index.parent / file_name
        if not path.is_file() or path.parent != index.parent:
            raise ConfigError(f"{index}: names the file {file_name}, which is not there")
        stored.update(_read_header(path))
    lost = [name for name in weight_map if name not in stored]
    if lost:
        raise ConfigError(f"{index}: {weight_map[lost[0]]} should hold {_some(lost)}, but does not")
    return stored


def _read_header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            _check_header_length(path, prefix + file.read(64 - 8), header_bytes, size)
            file.seek(8)
            text = file.read(header_bytes)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    entries = _parse_header(path, text)
    data_start = 8 + header_bytes
    end = max((entry.data_offsets[1] for entry in entries.values()), default=0)
    if data_start + end != size:
        state = "truncated" if data_start + end > size else "damaged"
        raise ConfigError(f"{path}: {state}: {size} bytes long, its header promises {data_start + end}")
    for name, entry in entries.items():
        yield name, _stored(path, name, entry, data_start)


def _check_header_length(path: Path, start: bytes, header_bytes: int, size: int) -> None:
    if start.startswith(_LFS_MARK):
        raise ConfigError(f"{path}: a Git LFS pointer, not the weights; fetch them with `git lfs pull`")
    if size < 8 or header_bytes > min(_MAX_HEADER_BYTES, size - 8):
        raise ConfigError(
            f"{path}: truncated or not a safetensors file: {size} bytes long, header of {header_bytes} bytes"
        )


def _parse_header(path: Path, text: bytes) -> dict[str, _HeaderEntry]:
    try:
        raw = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        return {
            name: msgspec.json.decode(value, type=_HeaderEntry) for name, value in raw.items() if name != "__metadata__"
        }
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: damaged header: {error}") from error


def _stored(path: Path, name: str, entry: _HeaderEntry, data_start: int) -> StoredTensor:
    dtype = _FLOAT_DTYPES.get(entry.dtype)
    if dtype is None:
        raise ConfigError(f"{path}: tensor {name} is of dtype {entry.dtype}; supported are {', '.join(_FLOAT_DTYPES)}")
    start, stop = entry.data_offsets
    num_bytes = prod(entry.shape) * dtype.itemsize
    if start < 0 or min(entry.shape, default=0) < 0 or stop - start != num_bytes:
        raise ConfigError(
            f"{path}: damaged header: tensor {name} of shape {entry.shape} lies in bytes [{start}, {stop}), "
            f"but needs {num_bytes}"
        )
    return StoredTensor(file=path, dtype=dtype, shape=tuple(entry.shape), start=data_start + start, num_bytes=num_bytes)


def _check_names(
    model_dir: Path,
    stored: dict[str, StoredTensor],
    expected: dict[str, tuple[int, ...]],
    optional: frozenset[str],
) -> None:
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ConfigError(f"{model_dir}: the weight files lack {_some(missing)}")
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise ConfigError(
                f"{stored[name].file}: tensor {name} has shape {list(stored[name].shape)}, "
                f"the config asks for {list(shape)}"
            )
    # Frequencies that older checkpoints saved are derived from the config instead.
    surplus = [name for name in stored if name not in expected and name not in optional]
    surplus = [name for name in surplus if not name.endswith("rotary_emb.inv_freq")]
    if surplus:
        raise ConfigError(f"{stored[surplus[0]].file}: holds {_some(surplus)}, which the config does not have")


def _no_weights(model_dir: Path) -> str:
    names = sorted(os.listdir(model_dir))
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return (
            f"{model_dir}: weights only as pickle ({pickled[0]}), which can run code and is never opened; "
            "convert them to safetensors"
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return f"{model_dir}: weights only as GGUF ({gguf[0]}); supported is safetensors"
    return f"{model_dir} has neither model.safetensors nor model.safetensors.index.json"


def _some(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
