"""Tiny random checkpoints of every supported family, made by the reference implementation.

Weights are drawn wider than usual, so that logits spread and ties between tokens are rare. Each is made once
per process, in a folder that the caller gives.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pathlib import Path

#: Without its types, which say little: what is used of it is four calls.
transformers: Any = importlib.import_module("transformers")

VOCAB_SIZE = 199
MAX_POSITIONS = 1024


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A family and the switches that make it this variant."""

    config_class: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    sharded: bool = False


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("LlamaConfig"),
    "llama-sharded-biased": TinyModel("LlamaConfig", {"attention_bias": True, "mlp_bias": True}, sharded=True),
    "llama-tied": TinyModel("LlamaConfig", {"tie_word_embeddings": True, "head_dim": 32}),
    "llama-llama3-rope": TinyModel("LlamaConfig", {"rope_parameters": _LLAMA3_ROPE}),
    "llama-linear-rope": TinyModel("LlamaConfig", {"rope_parameters": _LINEAR_ROPE}),
    "llama-yarn-rope": TinyModel("LlamaConfig", {"rope_parameters": _YARN_ROPE}),
    "mistral-window": TinyModel("MistralConfig", {"sliding_window": 37}),
    "qwen2": TinyModel("Qwen2Config"),
    "qwen2-window": TinyModel(
        "Qwen2Config", {"use_sliding_window": True, "sliding_window": 29, "max_window_layers": 1}
    ),
    "qwen3": TinyModel("Qwen3Config", {"head_dim": 16}),
}


def make_tiny_model(name: str, folder: Path) -> Path:
    """Saves the variant under `folder` (fp32 safetensors), unless it is there; returns the model folder."""
    model_dir = folder / name
    if (model_dir / "config.json").is_file():
        return model_dir
    tiny = TINY_MODELS[name]
    config = getattr(transformers, tiny.config_class)(**_common_options(), **tiny.options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    _spread_weights(model, seed=sum(name.encode()))
    model.save_pretrained(model_dir, max_shard_size="150KB" if tiny.sharded else "1GB")
    return model_dir


def load_reference(model_dir: Path) -> Any:
    """The reference implementation of a checkpoint, fp32."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return reference.eval()


def _common_options() -> dict[str, Any]:
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_POSITIONS,
        "bos_token_id": 0,
        # Never reached: every test decides itself how many tokens it wants.
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _spread_weights(model: Any, seed: int) -> None:
    """Matrices wide enough for clear maxima; norms around one and biases around zero, so that both count."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.25, generator=generator)
