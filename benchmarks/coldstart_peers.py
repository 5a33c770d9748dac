"""Other loaders of checkpoints, for `benchmarks.coldstart`: run by an interpreter that has them.

    PATH/bin/python benchmarks/coldstart_peers.py LOADER FOLDER

Prints "ready" once everything is imported (or why not), then for each line on its input loads all weights into memory,
prints a line of JSON with the seconds that took, and lets them go. Imports nothing of this repository.

    pip install fastsafetensors runai-model-streamer tensorizer

Every loader gets what its documentation says is fastest on a CPU, and counts as done when every byte is in memory: a
mapped file when its pages were touched, whether or not the memory could be kept without another copy.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

LOADERS = ("torch", "safetensors", "fastsafetensors", "runai", "tensorizer", "runai-s3")
NUM_READERS = 4
PAGE = 4096


def _touch(tensors: Any) -> None:
    """One byte of every page; no page is left to come later."""
    for tensor in tensors:
        tensor.reshape(-1).view(_torch().uint8)[::PAGE].sum(dtype=_torch().int64)


def _torch() -> Any:
    import torch

    return torch


def _torch_load(folder: Path) -> Callable[[], object]:
    torch = _torch()

    def load() -> object:
        return [torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))]

    return load


def _safetensors(folder: Path) -> Callable[[], object]:
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    def load() -> object:
        shards = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
        for shard in shards:
            _touch(shard.values())
        return shards

    return load


def _fastsafetensors(folder: Path) -> Callable[[], object]:
    import importlib

    fast: Any = importlib.import_module("fastsafetensors")
    torch = _torch()

    def load() -> object:
        loader = fast.SafeTensorsFileLoader(fast.SingleGroup(), torch.device("cpu"), nogds=True)
        loader.add_filenames({0: [str(path) for path in sorted(folder.glob("*.safetensors"))]})
        buffers = loader.copy_files_to_device()
        tensors = [buffers.get_tensor(name) for name in buffers.key_to_rank_lidx]
        _touch(tensors)
        return tensors, buffers, loader

    return load


def _runai(folder: Path) -> Callable[[], object]:
    import importlib

    streamer_class: Any = importlib.import_module("runai_model_streamer").SafetensorsStreamer

    def load() -> object:
        with streamer_class() as streamer:
            streamer.stream_files([str(path) for path in sorted(folder.glob("*.safetensors"))])
            return [tensor for _, tensor in streamer.get_tensors()]

    return load


def _runai_s3(folder: Path) -> Callable[[], object]:
    """`folder`: s3://bucket, whose index names the shards. Where the store is, the environment says."""
    import importlib
    import os
    import urllib.request

    streamer_class: Any = importlib.import_module("runai_model_streamer").SafetensorsStreamer
    bucket = str(folder).removeprefix("s3:").strip("/")
    address = f"{os.environ['AWS_ENDPOINT_URL']}/{bucket}/model.safetensors.index.json"
    with urllib.request.urlopen(address, timeout=10) as answer:
        shards = sorted(set(json.load(answer)["weight_map"].values()))

    def load() -> object:
        with streamer_class() as streamer:
            streamer.stream_files([f"s3://{bucket}/{shard}" for shard in shards])
            return [tensor for _, tensor in streamer.get_tensors()]

    return load


def _tensorizer(folder: Path) -> Callable[[], object]:
    import importlib

    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    module: Any = importlib.import_module("tensorizer")
    path = folder / "model.tensors"
    if not path.exists():
        serializer = module.TensorSerializer(str(path))
        for shard in sorted(folder.glob("*.safetensors")):
            serializer.write_state_dict(load_file(shard))
        serializer.close()

    def load() -> object:
        with module.TensorDeserializer(str(path), device="cpu", num_readers=NUM_READERS) as deserializer:
            tensors = list(deserializer.values())
            _touch(tensor.data for tensor in tensors)
            return tensors

    return load


def main() -> None:
    loader, folder = sys.argv[1], Path(sys.argv[2])
    makers = (_torch_load, _safetensors, _fastsafetensors, _runai, _tensorizer, _runai_s3)
    try:
        load = makers[LOADERS.index(loader)](folder)
        _torch().set_num_threads(2)
    except Exception as error:  # Whatever it is, the benchmark goes on without it.
        print(f"{type(error).__name__}: {error}".splitlines()[0], flush=True)
        return
    print("ready", flush=True)
    for _ in sys.stdin:
        start_s = time.perf_counter()
        held = load()
        took_s = time.perf_counter() - start_s
        del held
        print(json.dumps({"s": took_s}), flush=True)


if __name__ == "__main__":
    main()
