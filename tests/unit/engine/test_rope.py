"""Tables equal the reference implementation's, to the bit for the frequencies."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from engine.model_config import parse_model_config
from engine.rope import cos_sin_table, inverse_frequencies
from tests.support.tiny_models import transformers

_BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 10,
    "max_position_embeddings": 4096,
}

_ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1000000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "yarn-attention-factor": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn-mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 512,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "truncate": False,
    },
}


def _both(config: dict[str, Any]) -> tuple[Any, Any]:
    ours = parse_model_config(json.dumps(config).encode(), where="test").rope
    keys = {key: value for key, value in config.items() if key != "architectures"}
    theirs = transformers.LlamaConfig(**keys)
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    return ours, rotary


@pytest.mark.parametrize("name", _ROPES)
def test_newer_form_equals_the_reference(name: str) -> None:
    ours, rotary = _both({**_BASE, "rope_parameters": _ROPES[name]})
    frequencies, attention_factor = inverse_frequencies(ours, 128)
    assert torch.equal(frequencies, rotary.inv_freq)
    assert attention_factor == rotary.attention_scaling


@pytest.mark.parametrize("name", _ROPES)
def test_older_form_is_the_same(name: str) -> None:
    """`rope_scaling` beside `rope_theta`, with `type` for `rope_type`."""
    rope = dict(_ROPES[name])
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    scaling = None if name == "default" else rope
    old = parse_model_config(json.dumps({**_BASE, "rope_scaling": scaling, "rope_theta": theta}).encode(), where="test")
    new = parse_model_config(json.dumps({**_BASE, "rope_parameters": _ROPES[name]}).encode(), where="test")
    assert old.rope == new.rope


@pytest.mark.parametrize("name", _ROPES)
def test_the_table_equals_the_reference(name: str) -> None:
    ours, rotary = _both({**_BASE, "rope_parameters": _ROPES[name]})
    cos, sin = rotary(torch.zeros(1), torch.arange(700)[None])
    table = cos_sin_table(ours, 128, 700)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table[:, :64], cos[0, :, :64], atol=1e-6, rtol=0)
    torch.testing.assert_close(table[:, 64:], sin[0, :, :64], atol=1e-6, rtol=0)
