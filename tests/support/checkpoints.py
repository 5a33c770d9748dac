"""Model folders in other dtypes, what their fused tensors are, and partitions put together again.

Nothing here is the converter's code: `fused_original` reads as the engine does without it.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from engine.checkpoint import Checkpoint, torch_dtype
from engine.fused import Split, expected_tensors, fused_tensors, optional_tensors
from engine.model_config import load_model_config
from engine.safetensors_files import stored_dtype

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from coldstart.loaded import LoadedWeights
    from engine.model_config import ModelConfig

STORED = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def stored_as(model_dir: Path, dtype: str, folder: Path) -> Path:
    """A copy of a model folder whose tensors are stored in `dtype`; its config names none."""
    folder.mkdir(parents=True)
    for path in model_dir.iterdir():
        if path.suffix == ".safetensors":
            tensors = {name: each.to(getattr(torch, dtype)) for name, each in load_file(path).items()}
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
        elif path.name == "config.json":
            config = json.loads(path.read_text())
            config.pop("dtype", None)
            config.pop("torch_dtype", None)
            (folder / path.name).write_text(json.dumps(config))
        else:
            shutil.copy(path, folder / path.name)
    return folder


def fused_original(model_dir: Path) -> dict[str, Tensor]:
    """Every fused tensor, whole, in the dtype that is stored."""
    config, dtype = load_model_config(model_dir), torch_dtype(stored_dtype(model_dir))
    shapes = expected_tensors(config)
    fused: dict[str, Tensor] = {}
    with Checkpoint(model_dir, shapes, optional=optional_tensors(config)) as checkpoint:
        for tensor in fused_tensors(config):
            parts: list[Tensor] = []
            for part in tensor.parts:
                parts.append(torch.empty(shapes[part], dtype=dtype))
                checkpoint.read_into(part, parts[-1])
            fused[tensor.name] = torch.cat([bits(part) for part in parts]).view(dtype)
    return fused


def put_together(ranks: Sequence[LoadedWeights], config: ModelConfig) -> dict[str, Tensor]:
    """The whole fused tensors of a model from all of its partitions; what all ranks have must be the same."""
    whole: dict[str, Tensor] = {}
    for tensor in fused_tensors(config):
        shares = [bits(rank.tensor(tensor.name)) for rank in ranks]
        if tensor.split is Split.NONE:
            assert all(torch.equal(share, shares[0]) for share in shares), tensor.name
            joined = shares[0]
        elif tensor.split is Split.COLUMNS:
            joined = torch.cat(shares, dim=1)
        else:
            joined = torch.cat(_parts(tensor.name, shares, config))
        whole[tensor.name] = joined.view(torch_dtype(ranks[0].dtype))
    return whole


def bits(tensor: Tensor) -> Tensor:
    """As integers: equal where every bit is, though values are NaN."""
    return tensor.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])


def same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Asserts the same tensors in the same order, bit for bit."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(bits(found[name]), bits(tensor)), name


def _parts(name: str, shares: list[Tensor], config: ModelConfig) -> list[Tensor]:
    """Of a tensor split by rows: each part's rows of all ranks, part by part."""
    if ".qkv." in name:
        num_ranks = len(shares)
        queries = config.num_heads // num_ranks * config.head_dim
        keys = max(1, config.num_kv_heads // num_ranks) * config.head_dim
        cut = [torch.split(share, [queries, keys, keys]) for share in shares]
        # Of ranks with the same heads one speaks.
        speaking = cut[:: max(1, num_ranks // config.num_kv_heads)]
        return [*(each[0] for each in cut), *(each[1] for each in speaking), *(each[2] for each in speaking)]
    if ".gate_up." in name:
        halves = [share.chunk(2) for share in shares]
        return [*(each[0] for each in halves), *(each[1] for each in halves)]
    return shares
