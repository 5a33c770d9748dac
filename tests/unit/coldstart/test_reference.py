"""The second way to a model's logits says what the reference implementation says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from coldstart import reference
from coldstart.canary_run import canary_of
from coldstart.reference import reference_logits
from contracts.errors import ConfigError, TandemError
from engine.canary import CLEAR_MARGIN
from tests.support.checkpoints import STORED, stored_as
from tests.support.tiny_models import TINY_MODELS, VOCAB_SIZE, load_reference, make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

_TOKENS = 60


def _prompts() -> list[list[int]]:
    drawn = torch.randint(0, VOCAB_SIZE, (2, _TOKENS), generator=torch.Generator().manual_seed(5))
    return [[int(token) for token in prompt] for prompt in drawn]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_logits_are_those_of_the_reference_implementation(name: str, models: Path) -> None:
    folder = make_tiny_model(name, models)
    with torch.inference_mode():
        expected = load_reference(folder)(torch.tensor(_prompts())).logits[:, -3:].numpy()
    found = reference_logits(folder, _prompts(), num_last=3)
    assert found.shape == (2, 3, VOCAB_SIZE)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("dtype", STORED)
def test_every_stored_dtype_is_read(dtype: str, models: Path, tmp_path: Path) -> None:
    folder = stored_as(make_tiny_model("qwen2", models), dtype, tmp_path / dtype)
    same = stored_as(folder, "float32", tmp_path / "wide")
    np.testing.assert_array_equal(
        reference_logits(folder, _prompts(), num_last=1), reference_logits(same, _prompts(), num_last=1)
    )


def test_few_rows_at_a_time_give_the_same(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_tiny_model("llama-sharded-biased", models)
    at_once = reference_logits(folder, _prompts(), num_last=1)
    monkeypatch.setattr(reference, "_PIECE_BYTES", 1000)
    told = list[tuple[int, int]]()
    piecewise = reference_logits(
        folder, _prompts(), num_last=1, progress=lambda done, total: told.append((done, total))
    )
    np.testing.assert_allclose(piecewise, at_once, atol=1e-4)
    assert told == sorted(told)
    assert [done for done, total in told if done == total] == [told[-1][0]]


def test_a_canary_is_a_beginning_of_a_prompt_with_a_clear_answer(models: Path) -> None:
    canary = canary_of(make_tiny_model("qwen3", models))
    assert canary is not None
    assert canary == canary_of(make_tiny_model("qwen3", models))
    assert 5 <= len(canary.prompt) <= 8
    assert canary.margin > CLEAR_MARGIN
    logits = reference_logits(make_tiny_model("qwen3", models), [canary.prompt], num_last=1)[0, 0]
    assert int(logits.argmax()) == canary.token


def test_what_cannot_be_read_is_told(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        canary_of(tmp_path / "nowhere")
    folder = stored_as(make_tiny_model("llama", models), "float32", tmp_path / "cut")
    (weights,) = folder.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(TandemError, match="truncated"):
        canary_of(folder)
