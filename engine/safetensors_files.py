"""What the safetensors files of a model folder hold, by their headers. Without torch. Pickle is never opened.

Every header is checked before a byte of weights is read.

Format: eight bytes little-endian length, a JSON header `{name: {dtype, shape, data_offsets}}`, the bytes.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

import msgspec

from contracts.errors import ConfigError
from engine.model_config import config_path

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LoadFormat = Literal["auto", "dummy"]
#: Named as torch names them.
StoredDtype = Literal["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]

ITEM_BYTES: dict[StoredDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}

_DTYPES: dict[str, StoredDtype] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
#: A header longer than this is not one; the format's own limit.
_MAX_HEADER_BYTES = 100_000_000
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
    dtype: StoredDtype
    shape: tuple[int, ...]
    start: int
    num_bytes: int


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


def stored_dtype(model_dir: Path) -> StoredDtype:
    """The dtype of most of the folder's weight bytes. Raises ConfigError."""
    sizes: dict[StoredDtype, int] = {}
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
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise ConfigError(f"{path}: tensor {name} is of dtype {entry.dtype}; supported are {', '.join(_DTYPES)}")
    start, stop = entry.data_offsets
    num_bytes = prod(entry.shape) * ITEM_BYTES[dtype]
    if start < 0 or min(entry.shape, default=0) < 0 or stop - start != num_bytes:
        raise ConfigError(
            f"{path}: damaged header: tensor {name} of shape {entry.shape} lies in bytes [{start}, {stop}), "
            f"but needs {num_bytes}"
        )
    return StoredTensor(file=path, dtype=dtype, shape=tuple(entry.shape), start=data_start + start, num_bytes=num_bytes)


def check_names(
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
