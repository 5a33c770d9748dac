"""Options of a model folder, and the pool it gets."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from contracts.errors import ConfigError, InvariantBroken
from contracts.ids import BlockId
from engine.kv_pool import make_pool
from engine.ops import TorchOps
from engine.plan import SequenceStep, StepPlan
from engine.runner import EngineOptions, Runner, load_runner
from tests.support.tiny_models import MAX_POSITIONS, make_tiny_model
from tests.unit.engine.driver import greedy_sample

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models"))


def _load(model_dir: Path, options: EngineOptions) -> Runner:
    return load_runner(model_dir, options, TorchOps())


def _token_bytes(bytes_per_value: int) -> int:
    """Layers 3, key and value, 2 heads of 16."""
    return 3 * 2 * 2 * 16 * bytes_per_value


def test_the_pool_is_sized_in_bytes(model_dir: Path) -> None:
    runner = _load(model_dir, EngineOptions(kv_memory_bytes=10 * 8 * _token_bytes(4) + 5, block_tokens=8))
    assert runner.pool.num_blocks == 10
    assert runner.pool.tensor_NKL2BE.shape == (10, 2, 3, 2, 8, 16)
    assert runner.pool.tensor_NKL2BE.nbytes == 10 * runner.pool.layout.block_bytes
    assert runner.max_context_tokens == 80


def test_dtype_is_the_checkpoints_or_the_asked_one(model_dir: Path) -> None:
    assert _load(model_dir, EngineOptions(num_blocks=2)).identity.layout.dtype == "float32"
    asked = _load(model_dir, EngineOptions(num_blocks=2, dtype="bfloat16"))
    assert asked.identity.layout.dtype == "bfloat16"
    assert asked.pool.tensor_NKL2BE.dtype == torch.bfloat16


def test_float16_weights_are_computed_in_float32_on_a_cpu(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    (tmp_path / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    assert _load(tmp_path, EngineOptions(num_blocks=2)).identity.layout.dtype == "float32"


def test_dtype_of_a_silent_config_is_that_of_the_weights(model_dir: Path, tmp_path: Path) -> None:
    config = json.loads((model_dir / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(model_dir / "model.safetensors")
    assert _load(tmp_path, EngineOptions(num_blocks=2)).identity.layout.dtype == "float32"


def test_the_context_is_the_least_of_three(model_dir: Path) -> None:
    assert _load(model_dir, EngineOptions(num_blocks=1000)).max_context_tokens == MAX_POSITIONS
    assert _load(model_dir, EngineOptions(num_blocks=1000, max_model_len=100)).max_context_tokens == 100
    assert _load(model_dir, EngineOptions(num_blocks=3, max_model_len=100)).max_context_tokens == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (EngineOptions(), "num_blocks or as kv_memory_bytes"),
        (EngineOptions(num_blocks=1, kv_memory_bytes=1), "num_blocks or as kv_memory_bytes"),
        (EngineOptions(num_blocks=0), "num_blocks is 0"),
        (EngineOptions(num_blocks=1, block_tokens=0), "block_tokens is 0"),
        (EngineOptions(kv_memory_bytes=100), "holds no block of 16 tokens"),
        (EngineOptions(num_blocks=1, max_model_len=MAX_POSITIONS + 1), "max_model_len 1025"),
        (EngineOptions(num_blocks=1, max_model_len=0), "max_model_len 0"),
        (EngineOptions(num_blocks=1, dtype="float16"), "float16"),
        (EngineOptions(num_blocks=2**55), "cannot be allocated"),
    ],
)
def test_options_that_cannot_work(model_dir: Path, options: EngineOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _load(model_dir, options)


def test_a_buffer_that_is_too_small(model_dir: Path) -> None:
    layout = _load(model_dir, EngineOptions(num_blocks=1)).pool.layout
    with pytest.raises(ConfigError, match="is less than the"):
        make_pool(layout, 3, device=torch.device("cpu"), buffer_factory=lambda _, size: bytearray(2 * size))


def test_dummy_weights_need_no_weight_file(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    options = EngineOptions(num_blocks=4, load_format="dummy")
    plan = StepPlan((_prompt_step(),))
    first, second = _load(tmp_path, options), _load(tmp_path, options)
    assert first.run(plan) == second.run(plan)
    assert first.identity == second.identity
    assert first.identity.model_fingerprint != _load(model_dir, EngineOptions(num_blocks=4)).identity.model_fingerprint


def test_a_step_writes_nothing_but_its_positions(model_dir: Path) -> None:
    runner = _load(model_dir, EngineOptions(num_blocks=5, block_tokens=16))
    pool = runner.pool.tensor_NKL2BE
    with torch.inference_mode():
        pool.fill_(7.0)
    step = SequenceStep(sequence_id=1, token_ids=[1, 2, 3], start=15, block_ids=[BlockId(4), BlockId(2)], sample=None)
    assert runner.run(StepPlan((step,))).sampled == {}
    untouched = pool == 7.0
    assert untouched[[0, 1, 3]].all()
    assert untouched[4, :, :, :, :15].all()
    assert untouched[2, :, :, :, 2:].all()
    assert not untouched[4, :, :, :, 15].any()
    assert not untouched[2, :, :, :, :2].any()


def test_a_refused_plan_writes_nothing(model_dir: Path) -> None:
    runner = _load(model_dir, EngineOptions(num_blocks=5))
    with pytest.raises(InvariantBroken):
        runner.run(StepPlan((_prompt_step(), _prompt_step(block=9))))
    assert not runner.pool.tensor_NKL2BE.any()


def test_an_empty_plan(model_dir: Path) -> None:
    assert _load(model_dir, EngineOptions(num_blocks=1)).run(StepPlan(())).sampled == {}


def _prompt_step(block: int = 0) -> SequenceStep:
    tokens = [3, 1, 4, 1, 5]
    return SequenceStep(
        sequence_id=block,
        token_ids=tokens,
        start=0,
        block_ids=[BlockId(block)],
        sample=greedy_sample(tokens, 5),
    )
