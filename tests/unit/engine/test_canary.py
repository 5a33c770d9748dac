"""A worker with wrong weights does not begin to serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

import engine
from coldstart.canary_run import canary_of
from coldstart.convert import ConvertOptions, convert
from coldstart.loaded import load_checkpoint
from contracts.errors import CorruptCheckpoint
from engine.canary import CLEAR_MARGIN, Canary, check_canary
from engine.ops import select_ops
from engine.ops.torch_ops import TorchOps
from engine.runner import EngineOptions, Runner, load_runner
from tests.support.tiny_models import TINY_MODELS, make_tiny_model

if TYPE_CHECKING:
    from coldstart.loaded import LoadedWeights
    from engine.safetensors_files import StoredDtype

DEMO = Path(engine.__file__).parent / "demo"
OPTIONS = EngineOptions(num_blocks=4)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "demo"
    convert(DEMO, folder)
    return folder


class Swapped:
    """Two tensors of the same shape in each other's place: what no checksum finds."""

    def __init__(self, weights: LoadedWeights) -> None:
        self._weights = weights
        self.fingerprint = weights.fingerprint
        self.dtype: StoredDtype = weights.dtype
        self.canary = weights.canary

    def tensor(self, name: str) -> torch.Tensor:
        other = {"layers.0.qkv.weight": "layers.1.qkv.weight", "layers.1.qkv.weight": "layers.0.qkv.weight"}
        return self._weights.tensor(other.get(name, name))


def runner(weights: LoadedWeights | Swapped | None = None) -> Runner:
    return load_runner(DEMO, OPTIONS, TorchOps(), weights=weights)


def test_every_back_end_and_dtype_answers_the_canary_of_the_conversion(converted: Path) -> None:
    weights = load_checkpoint(converted)
    assert weights.canary is not None
    assert weights.canary.margin > CLEAR_MARGIN
    assert runner(weights).identity == runner().identity
    load_runner(DEMO, OPTIONS, select_ops("cpu", log=lambda _: None), weights=weights)
    load_runner(DEMO, EngineOptions(num_blocks=4, dtype="bfloat16"), TorchOps(), weights=weights)
    check_canary(runner(), weights.canary)


def test_weights_in_each_others_place_are_found(converted: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"canary: after \[.*\] comes token"):
        runner(Swapped(load_checkpoint(converted)))


def test_weights_that_are_no_numbers_are_found(converted: Path) -> None:
    weights = load_checkpoint(converted)
    assert weights.canary is not None
    broken = runner()
    with torch.inference_mode():
        broken._decoder._weights.final_norm_D.fill_(torch.nan)  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(CorruptCheckpoint, match="numbers that are none"):
        check_canary(broken, weights.canary)


def test_an_answer_that_was_not_clear_says_nothing(converted: Path) -> None:
    weights = load_checkpoint(converted)
    assert weights.canary is not None
    other = replace(weights.canary, token=(weights.canary.token + 1) % 100)
    with pytest.raises(CorruptCheckpoint):
        check_canary(runner(), other)
    check_canary(runner(), replace(other, margin=CLEAR_MARGIN / 2))


def test_a_pool_too_small_for_the_prompt_is_let_pass() -> None:
    small = load_runner(DEMO, EngineOptions(num_blocks=1, block_tokens=4), TorchOps())
    check_canary(small, Canary(prompt=tuple(range(8)), token=-1, margin=9.0))


def test_a_conversion_for_several_ranks_has_it_too(tmp_path: Path) -> None:
    original = make_tiny_model("llama", tmp_path / "original")
    whole = convert(original, tmp_path / "whole").canary
    assert whole is not None
    assert convert(original, tmp_path / "shared", ConvertOptions(tensor_parallel=2)).canary == whole
    assert convert(original, tmp_path / "plain", ConvertOptions(canary=False)).canary is None


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_kind_of_model_answers_its_canary_from_the_original_and_converted(name: str, tmp_path: Path) -> None:
    original = make_tiny_model(name, tmp_path)
    canary = canary_of(original)
    assert canary is not None
    load_runner(original, OPTIONS, TorchOps(), canary=canary)
    convert(original, tmp_path / "converted")
    assert load_checkpoint(tmp_path / "converted").canary == canary
    load_runner(original, OPTIONS, TorchOps(), weights=load_checkpoint(tmp_path / "converted"))


def test_a_model_read_from_its_original_is_asked_too(tmp_path: Path) -> None:
    canary = canary_of(DEMO)
    assert canary is not None
    with pytest.raises(CorruptCheckpoint, match=r"canary: after \[.*\] comes token"):
        load_runner(DEMO, OPTIONS, TorchOps(), canary=replace(canary, token=(canary.token + 1) % 100))


def test_a_model_that_computes_no_numbers_has_none(tmp_path: Path) -> None:
    original = make_tiny_model("llama", tmp_path)
    (path,) = original.glob("*.safetensors")
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    assert canary_of(original) is None
