"""Reading safetensors: what is read, and how each kind of damage is named."""

from __future__ import annotations

import importlib
import json
import shutil
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from contracts.errors import ConfigError
from engine.checkpoint import Checkpoint, DummyWeights
from engine.fused import expected_tensors, fused_tensors, optional_tensors
from engine.model_config import load_model_config
from engine.ops.torch_ops import PlainLinear, TorchOps
from engine.safetensors_files import model_fingerprint, stored_dtype
from engine.weights import bind_weights
from tests.support.tiny_models import TINY_MODELS, make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

_safetensors: Any = importlib.import_module("safetensors.torch")

_NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pristine")


@pytest.fixture
def single(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(make_tiny_model("llama", pristine), tmp_path / "llama")


@pytest.fixture
def sharded(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(make_tiny_model("llama-sharded-biased", pristine), tmp_path / "sharded")


def _open(model_dir: Path) -> Checkpoint:
    config = load_model_config(model_dir)
    return Checkpoint(model_dir, expected_tensors(config), optional=optional_tensors(config))


def _rewrite(model_dir: Path, **changes: torch.Tensor | None) -> None:
    """Saves the single file again with tensors (dots as double underscores) replaced, added or dropped."""
    path = model_dir / "model.safetensors"
    tensors = _safetensors.load_file(path)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    _safetensors.save_file(tensors, path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tensor_is_read_in_the_target_dtype(sharded: Path, dtype: torch.dtype) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 1
    stored = {name: tensor for shard in shards for name, tensor in _safetensors.load_file(shard).items()}
    config = load_model_config(sharded)
    shapes = expected_tensors(config)
    assert set(shapes) == set(stored)
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    with Checkpoint(sharded, shapes, progress=tell) as checkpoint:
        for name, shape in shapes.items():
            target = torch.empty(shape, dtype=dtype)
            checkpoint.read_into(name, target)
            assert torch.equal(target, stored[name].to(dtype)), name
    total = sum(tensor.nbytes for tensor in stored.values())
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_a_truncated_file(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    for length in (0, 5, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(ConfigError, match=r"model\.safetensors: truncated"):
            _open(single)


def test_a_file_that_shrinks_while_it_is_read(single: Path) -> None:
    path = single / "model.safetensors"
    with _open(single) as checkpoint:
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(ConfigError, match=r"truncated: tensor model\.norm\.weight"):
            checkpoint.read_into("model.norm.weight", torch.empty(64))


def test_damaged_headers(single: Path) -> None:
    path = single / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"#" + data[9:])
    with pytest.raises(ConfigError, match=r"model\.safetensors: damaged header"):
        _open(single)
    path.write_bytes(data + b"more")
    with pytest.raises(ConfigError, match=r"model\.safetensors: damaged"):
        _open(single)
    header = data[8 : 8 + int.from_bytes(data[:8], "little")]
    path.write_bytes(data.replace(header, header.replace(b"[199,64]", b"[198,64]", 1), 1))
    with pytest.raises(ConfigError, match=r"damaged header: tensor .* of shape \[198, 64\]"):
        _open(single)


def test_tensors_that_do_not_fit_the_config(single: Path) -> None:
    _rewrite(single, **{_NORM.replace(".", "__"): torch.ones(63)})
    with pytest.raises(ConfigError, match=rf"model\.safetensors: tensor {_NORM} has shape \[63\].*\[64\]"):
        _open(single)
    _rewrite(single, **{_NORM.replace(".", "__"): None})
    with pytest.raises(ConfigError, match=rf"lack {_NORM}"):
        _open(single)


def test_a_tensor_nobody_reads_is_refused(single: Path) -> None:
    _rewrite(single, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    _open(single)
    _rewrite(single, model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    with pytest.raises(ConfigError, match=r"q_proj\.bias, which the config does not have"):
        _open(single)


def test_a_dtype_that_is_no_weight(single: Path) -> None:
    _rewrite(single, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(ConfigError, match=r"tensor model\.norm\.weight is of dtype I8"):
        _open(single)


def test_shards_that_are_not_there(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    shard = sorted(sharded.glob("*.safetensors"))[0]
    names = list(_safetensors.load_file(shard))
    _safetensors.save_file(
        {name: tensor for name, tensor in _safetensors.load_file(shard).items() if name != names[0]}, shard
    )
    with pytest.raises(ConfigError, match=rf"{shard.name} should hold {names[0]}"):
        _open(sharded)
    shard.unlink()
    with pytest.raises(ConfigError, match=rf"index\.json: names the file {shard.name}"):
        _open(sharded)
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, "../x.safetensors")}))
    with pytest.raises(ConfigError, match=r"names the file \.\./x\.safetensors"):
        _open(sharded)
    index.write_text("[]")
    with pytest.raises(ConfigError, match=r"index\.json"):
        _open(sharded)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("pytorch_model.bin", b"\x80\x02", r"pickle \(pytorch_model\.bin\).*never opened"),
        ("model.gguf", b"GGUF", r"GGUF"),
        (
            "model.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00",
            r"Git LFS pointer",
        ),
        ("README.md", b"", r"neither model\.safetensors nor"),
    ],
)
def test_other_formats_are_named(single: Path, file: str, content: bytes, message: str) -> None:
    (single / "model.safetensors").unlink()
    (single / file).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        _open(single)


def test_a_tied_output_layer_may_be_stored_too(pristine: Path, tmp_path: Path) -> None:
    model_dir = shutil.copytree(make_tiny_model("llama-tied", pristine), tmp_path / "tied")
    _open(model_dir)
    _rewrite(model_dir, lm_head__weight=torch.ones(199, 64))
    _open(model_dir)


def test_fingerprints_tell_models_apart(single: Path, sharded: Path, tmp_path: Path) -> None:
    first = model_fingerprint(single)
    assert first == model_fingerprint(shutil.copytree(single, tmp_path / "elsewhere"))
    assert len({first, model_fingerprint(sharded), model_fingerprint(single, "dummy")}) == 3
    stored = _safetensors.load_file(single / "model.safetensors")
    _rewrite(single, **{name.replace(".", "__"): tensor + 1 for name, tensor in stored.items()})
    fine_tuned = model_fingerprint(single)
    config = single / "config.json"
    config.write_text(config.read_text().replace("silu", "silu "))
    assert len({first, fine_tuned, model_fingerprint(single)}) == 3


def test_stored_dtype_is_that_of_most_bytes(single: Path) -> None:
    assert stored_dtype(single) == "float32"
    stored = _safetensors.load_file(single / "model.safetensors")
    halves = {name.replace(".", "__"): tensor.bfloat16() for name, tensor in stored.items() if "norm" not in name}
    _rewrite(single, **halves)
    assert stored_dtype(single) == "bfloat16"


def test_dummy_weights_are_a_function_of_name_and_shape() -> None:
    first, second, other = torch.empty(30, 20), torch.empty(30, 20), torch.empty(30, 20)
    DummyWeights().read_into("a.weight", first)
    DummyWeights().read_into("a.weight", second)
    DummyWeights().read_into("b.weight", other)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0.015 < float(first.std()) < 0.025


@pytest.mark.parametrize("name", TINY_MODELS)
def test_fused_tensors_are_the_whole_checkpoint_once(name: str, pristine: Path) -> None:
    config = load_model_config(make_tiny_model(name, pristine))
    shapes = expected_tensors(config)
    fused = fused_tensors(config)
    assert sorted(part for tensor in fused for part in tensor.parts) == sorted(shapes)
    assert len({tensor.name for tensor in fused}) == len(fused)
    for tensor in fused:
        assert tensor.shape == (sum(shapes[part][0] for part in tensor.parts), *shapes[tensor.parts[0]][1:])


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_decoder_is_bound_to_fused_tensors_without_a_copy(name: str, pristine: Path) -> None:
    config = load_model_config(make_tiny_model(name, pristine))
    given = {tensor.name: torch.randn(tensor.shape) for tensor in fused_tensors(config)}
    asked = list[str]()

    def tensor(name: str) -> torch.Tensor:
        asked.append(name)
        return given[name]

    weights = bind_weights(config, tensor, TorchOps())
    assert sorted(asked) == sorted(given)
    bound = cast("PlainLinear", weights.layers[0].qkv)
    assert bound.weight_OI.data_ptr() == given["layers.0.qkv.weight"].data_ptr()
    assert weights.embedding_VD.data_ptr() == given["embedding"].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read_into_wider_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.randn(4, 8).to(dtype)
    _safetensors.save_file({"w": stored}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, {"w": (4, 8)}) as checkpoint:
        target = torch.empty(4, 8, dtype=torch.bfloat16)
        checkpoint.read_into("w", target)
    assert torch.equal(target, stored.to(torch.bfloat16))
