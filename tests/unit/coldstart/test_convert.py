"""Converted and loaded: every family's tensors bit for bit, and the same tokens from an engine."""

from __future__ import annotations

import json
import os
import random
import shutil
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from coldstart.convert import ConvertOptions, ConvertProgress, convert, partial_folder
from coldstart.format import INDEX_NAME, CopiedFile, checksum, encode_index
from coldstart.loaded import load_checkpoint, read_checkpoint
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError
from engine.compose import StepBudget
from engine.model_config import load_model_config
from engine.ops import TorchOps
from engine.runner import EngineOptions, load_runner
from engine.safetensors_files import model_fingerprint
from tests.support.checkpoints import STORED, bits, fused_original, put_together, same_bits, stored_as
from tests.support.tiny_models import TINY_MODELS, VOCAB_SIZE, make_tiny_model
from tests.unit.engine.driver import Driver

if TYPE_CHECKING:
    from pathlib import Path

#: Many chunks even of tiny models, and tensors that begin and end within one.
SMALL = 3 * 4096


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("family", TINY_MODELS)
def test_every_family_is_the_same_bit_for_bit(models: Path, tmp_path: Path, family: str, ranks: int) -> None:
    for stored in STORED:
        original = stored_as(make_tiny_model(family, models), stored, tmp_path / stored)
        target = tmp_path / f"{stored}-converted"
        index = convert(original, target, ConvertOptions(tensor_parallel=ranks, chunk_bytes=SMALL))
        loaded = [load_checkpoint(target, rank) for rank in range(ranks)]
        assert index.dtype == stored
        assert {each.fingerprint for each in loaded} == {model_fingerprint(original)}
        same_bits(put_together(loaded, load_model_config(original)), fused_original(original))
        assert not partial_folder(target).exists()


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("family", TINY_MODELS)
def test_an_engine_over_loaded_weights_gives_the_same_tokens(
    models: Path, tmp_path: Path, family: str, stored: str
) -> None:
    original = stored_as(make_tiny_model(family, models), stored, tmp_path / "original")
    # What this CPU computes in: the engine's own rule.
    computed = {"float32": "float32", "float16": "float32"}.get(stored, "bfloat16")
    convert(original, tmp_path / "converted", ConvertOptions(dtype=computed, chunk_bytes=SMALL))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    weights = load_checkpoint(tmp_path / "converted")
    options = EngineOptions(num_blocks=40)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    plain = load_runner(original, options, TorchOps())
    mapped = load_runner(tmp_path / "converted", options, TorchOps(), weights=weights)
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (1, 17, 60)]
    tokens = [
        Driver(runner, StepBudget(max_tokens=64, max_sequences=8), 12, random.Random(6)).run(prompts)
        for runner in (plain, mapped)
    ]
    torch.set_num_threads(before)
    assert tokens[0] == tokens[1]
    assert plain.identity == mapped.identity


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_another_dtype_converts_as_the_engine_does(
    models: Path, tmp_path: Path, stored: str, dtype: Any, ranks: int
) -> None:
    original = stored_as(make_tiny_model("qwen2", models), stored, tmp_path / "original")
    target = tmp_path / "converted"
    convert(original, target, ConvertOptions(dtype=dtype, tensor_parallel=ranks, chunk_bytes=SMALL))
    loaded = [load_checkpoint(target, rank) for rank in range(ranks)]
    wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in fused_original(original).items()}
    same_bits(put_together(loaded, load_model_config(original)), wanted)


def _changed(model_dir: Path, folder: Path, name: str, change: Any) -> Path:
    shutil.copytree(model_dir, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_values_that_another_dtype_cannot_hold_are_refused(models: Path, tmp_path: Path) -> None:
    def large(tensor: torch.Tensor) -> torch.Tensor:
        tensor[3, 4] = 70000.0
        return tensor

    name = "model.layers.1.mlp.down_proj.weight"
    original = _changed(make_tiny_model("llama", models), tmp_path / "original", name, large)
    for ranks in (1, 2):
        with pytest.raises(ConfigError, match=rf"tensor {name}: 70000 is too large for float16"):
            convert(original, tmp_path / "out", ConvertOptions(dtype="float16", tensor_parallel=ranks))
    assert not (tmp_path / "out").exists()


def test_infinities_and_nans_that_are_stored_stay(models: Path, tmp_path: Path) -> None:
    def odd(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[:3] = torch.tensor([float("inf"), float("-inf"), float("nan")])
        return tensor

    original = _changed(make_tiny_model("llama", models), tmp_path / "original", "model.norm.weight", odd)
    for dtype in ("auto", "float16"):
        convert(original, tmp_path / dtype, ConvertOptions(dtype=dtype))  # pyright: ignore[reportArgumentType]
        found = load_checkpoint(tmp_path / dtype).tensor("final_norm")
        wanted = fused_original(original)["final_norm"].to(found.dtype)
        assert torch.equal(bits(found), bits(wanted))


def test_tensors_of_several_dtypes_need_one_named(models: Path, tmp_path: Path) -> None:
    original = _changed(
        make_tiny_model("llama", models), tmp_path / "original", "model.norm.weight", torch.Tensor.bfloat16
    )
    with pytest.raises(ConfigError, match=r"of several dtypes .*model\.norm.weight is bfloat16.*; name the one"):
        convert(original, tmp_path / "out")
    convert(original, tmp_path / "out", ConvertOptions(dtype="float32"))


def test_the_folder_is_a_whole_model_folder(models: Path, tmp_path: Path) -> None:
    original = tmp_path / "original"
    shutil.copytree(make_tiny_model("llama-sharded-biased", models), original)
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "notes.md", "code.py"):
        (original / name).write_text(name)
    index = convert(original, tmp_path / "deep" / "er" / "out")
    names = {path.name for path in (tmp_path / "deep" / "er" / "out").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "merges.txt"),
        *(INDEX_NAME, "weights-00001-of-00001.tandem"),
    }
    assert {copied.name for copied in index.files} == names - {INDEX_NAME, "weights-00001-of-00001.tandem"}
    assert load_model_config(tmp_path / "deep" / "er" / "out") == load_model_config(original)


def test_progress_tells_all_bytes_twice(models: Path, tmp_path: Path) -> None:
    told: list[ConvertProgress] = []
    index = convert(
        make_tiny_model("llama", models), tmp_path / "out", ConvertOptions(chunk_bytes=SMALL), progress=told.append
    )
    total = index.partitions[0].num_bytes
    for what in ("written", "checked"):
        steps = [state.done_bytes for state in told if state.what == what]
        assert steps == sorted(steps)
        assert steps[-1] == total
        assert {state.total_bytes for state in told if state.what == what} == {total}
    assert told[-1].what == "canary"
    assert told[-1].done_bytes == told[-1].total_bytes


def test_what_is_there_already_is_left_alone(models: Path, tmp_path: Path) -> None:
    original, target = make_tiny_model("llama", models), tmp_path / "out"
    target.mkdir()
    index = convert(original, target)
    stamps = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert convert(original, target) == index
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == stamps
    for options in (ConvertOptions(dtype="bfloat16"), ConvertOptions(tensor_parallel=2)):
        with pytest.raises(ConfigError, match="of another model or with other options"):
            convert(original, target, options)
    with pytest.raises(ConfigError, match="of another model or with other options"):
        convert(make_tiny_model("qwen3", models), target)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == stamps


def test_a_foreign_folder_is_not_touched(models: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("y")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match="is there already, and is not a converted checkpoint"):
            convert(make_tiny_model("llama", models), tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_a_damaged_target_is_told_and_left(models: Path, tmp_path: Path) -> None:
    original, target = make_tiny_model("llama", models), tmp_path / "out"
    convert(original, target)
    os.truncate(target / "weights-00001-of-00001.tandem", 4096)
    with pytest.raises(ConfigError, match=r"truncated.*; remove the folder to convert again"):
        convert(original, target)


def test_an_original_that_changes_meanwhile_is_not_converted(models: Path, tmp_path: Path) -> None:
    original, target = tmp_path / "original", tmp_path / "out"
    shutil.copytree(make_tiny_model("llama", models), original)

    def touch(_: ConvertProgress) -> None:
        os.utime(original / "model.safetensors", ns=(1, 1))

    with pytest.raises(LoadError, match="its weight files changed while they were converted"):
        convert(original, target, progress=touch)
    assert not target.exists()


def test_a_model_that_is_not_supported_or_whole_is_refused_before_anything_is_written(
    models: Path, tmp_path: Path
) -> None:
    original = tmp_path / "original"
    shutil.copytree(make_tiny_model("llama", models), original)
    config = json.loads((original / "config.json").read_text())
    for change, message in (({"architectures": ["Other"]}, "Other"), ({"num_hidden_layers": 4}, "lack")):
        (original / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ConfigError, match=message):
            convert(original, tmp_path / "out")
    (original / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="4 attention heads cannot be shared out to 3 ranks"):
        convert(original, tmp_path / "out", ConvertOptions(tensor_parallel=3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["original"]


def test_the_index_must_fit_the_config(models: Path, tmp_path: Path) -> None:
    """The folder of one model with the config of another, its checksum made to agree."""
    target = tmp_path / "out"
    index = convert(make_tiny_model("llama", models), target)
    config = json.loads((target / "config.json").read_text())
    data = json.dumps({**config, "num_hidden_layers": 2}).encode()
    (target / "config.json").write_bytes(data)
    others = [copied for copied in index.files if copied.name != "config.json"]
    copied = CopiedFile(name="config.json", num_bytes=len(data), checksum=checksum(data))
    forged = msgspec.structs.replace(index, files=(*others, copied))
    (target / INDEX_NAME).write_bytes(encode_index(forged))
    with pytest.raises(CorruptCheckpoint, match=r"its index does not fit its config\.json"):
        read_checkpoint(target)
