"""A synthetic checkpoint of real tensor sizes for `benchmarks.coldstart`: a Llama shape in bfloat16, in shards.

Values are small and random, so that a forward pass meets neither NaN nor denormals, and no disk can compress them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int


#: 2.1 billion parameters, 4.2 GB: Llama 3.2 1B with more layers and an output layer of its own.
FULL = Shape(hidden=2048, layers=26, heads=32, kv_heads=8, inner=8192, vocab=128256)
#: 526 MB.
QUICK = Shape(hidden=1024, layers=13, heads=16, kv_heads=4, inner=4096, vocab=32000)

_LAYERS_PER_SHARD = 8


def write_model(folder: Path, shape: Shape, *, with_torch: bool) -> int:
    """Safetensors shards with index and config; with `with_torch` each shard also as torch.save writes it. Bytes of
    weights. One shard is in memory at a time."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    weight_map: dict[str, str] = {}
    shards = _shards(shape)
    for number, shard in enumerate(shards, 1):
        tensors = {name: _tensor(rng, sizes) for name, sizes in shard.items()}
        name = f"model-{number:05}-of-{len(shards):05}"
        save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
        if with_torch:
            torch.save(tensors, folder / f"{name}.pt")
        weight_map.update(dict.fromkeys(tensors, f"{name}.safetensors"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(2 * int(np.prod(sizes)) for shard in shards for sizes in shard.values())


def _shards(shape: Shape) -> list[dict[str, tuple[int, ...]]]:
    head = shape.hidden // shape.heads
    first: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, shape.hidden)}
    last: dict[str, tuple[int, ...]] = {
        "model.norm.weight": (shape.hidden,),
        "lm_head.weight": (shape.vocab, shape.hidden),
    }
    shards = [first]
    for layer in range(shape.layers):
        if layer % _LAYERS_PER_SHARD == 0 and layer:
            shards.append({})
        prefix = f"model.layers.{layer}."
        shards[-1] |= {
            f"{prefix}self_attn.q_proj.weight": (shape.hidden, shape.hidden),
            f"{prefix}self_attn.k_proj.weight": (shape.kv_heads * head, shape.hidden),
            f"{prefix}self_attn.v_proj.weight": (shape.kv_heads * head, shape.hidden),
            f"{prefix}self_attn.o_proj.weight": (shape.hidden, shape.hidden),
            f"{prefix}mlp.gate_proj.weight": (shape.inner, shape.hidden),
            f"{prefix}mlp.up_proj.weight": (shape.inner, shape.hidden),
            f"{prefix}mlp.down_proj.weight": (shape.hidden, shape.inner),
            f"{prefix}input_layernorm.weight": (shape.hidden,),
            f"{prefix}post_attention_layernorm.weight": (shape.hidden,),
        }
    shards[-1] |= last
    return shards


def _tensor(rng: np.random.Generator, sizes: tuple[int, ...]) -> torch.Tensor:
    """Sign, lowest bit of the exponent and mantissa are random: magnitudes from 0.008 to 0.03; norms are one."""
    if len(sizes) == 1:
        return torch.ones(sizes, dtype=torch.bfloat16)
    bits = rng.integers(0, 1 << 16, sizes, dtype=np.uint16)
    bits &= 0x80FF
    bits |= 0x3C00
    return torch.frombuffer(bits.data, dtype=torch.bfloat16).view(sizes)
