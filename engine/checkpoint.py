"""Checkpoints in Hugging Face layout: safetensors, single or sharded, read into tensors.

Each tensor is read straight into its place (fused with its neighbours where the decoder multiplies them together), in
the target dtype, so that the weights are in memory once.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Protocol, cast

import torch

from contracts.errors import ConfigError
from engine.safetensors_files import ITEM_BYTES, StoredDtype, StoredTensor, check_names, read_headers

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import BufferedReader
    from pathlib import Path

    from torch import Tensor

#: Staging for tensors whose dtype changes on the way in: bounds the extra memory.
_STAGING_BYTES = 32 << 20


def torch_dtype(name: StoredDtype) -> torch.dtype:
    return cast("torch.dtype", getattr(torch, name))


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
        check_names(model_dir, stored, expected, optional)
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
        flat, dtype = target.view(-1), torch_dtype(tensor.dtype)
        step = max(1, _STAGING_BYTES // ITEM_BYTES[tensor.dtype])
        for start in range(0, flat.numel(), step):
            part = flat[start : start + step]
            staging = part if part.dtype == dtype else torch.empty(part.shape, dtype=dtype)
            self._read_exactly(name, tensor, start * ITEM_BYTES[tensor.dtype], staging)
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
