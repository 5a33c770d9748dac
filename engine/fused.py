"""What a decoder's weights are: the tensors of a Hugging Face checkpoint, and those that the engine multiplies.

Without torch, so that whoever moves weights about need not import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from engine.model_config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
FUSED_EMBEDDING, FUSED_FINAL_NORM, FUSED_LM_HEAD = "embedding", "final_norm", "lm_head"


class Split(Enum):
    """How tensor-parallel ranks share a tensor (Megatron-LM, section 3)."""

    #: Each has all of it.
    NONE = "none"
    #: Output features: of each part its own share of the rows.
    ROWS = "rows"
    #: Input features.
    COLUMNS = "columns"


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedTensor:
    """One tensor as the engine multiplies it: `parts` of a checkpoint stacked along their first axis."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    split: Split


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold, with its shape."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix = _prefix(index)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for name, out_features, in_features, bias in linears(config):
            shapes[f"{prefix}{name}.weight"] = (out_features, in_features)
            if bias:
                shapes[f"{prefix}{name}.bias"] = (out_features,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def optional_tensors(config: ModelConfig) -> frozenset[str]:
    """Tensors that a checkpoint may hold and that are not read: a tied output layer is the embedding."""
    return frozenset({LM_HEAD}) if config.tie_word_embeddings else frozenset()


def fused_tensors(config: ModelConfig) -> tuple[FusedTensor, ...]:
    """All weights in the form that the engine multiplies, in the order in which a forward pass meets them.

    Together their parts are exactly `expected_tensors`.
    """
    shapes = expected_tensors(config)
    found = [_fused(shapes, FUSED_EMBEDDING, (EMBEDDING,), Split.ROWS)]
    for index in range(config.num_layers):
        prefix, fused = _prefix(index), fused_prefix(index)
        found.append(_fused(shapes, f"{fused}input_norm", (f"{prefix}input_layernorm.weight",)))
        found += _fused_linear(shapes, f"{fused}qkv", f"{prefix}self_attn.", ("q_proj", "k_proj", "v_proj"), Split.ROWS)
        if config.qk_norm:
            found.append(_fused(shapes, f"{fused}q_norm", (f"{prefix}self_attn.q_norm.weight",)))
            found.append(_fused(shapes, f"{fused}k_norm", (f"{prefix}self_attn.k_norm.weight",)))
        found += _fused_linear(shapes, f"{fused}attention_output", f"{prefix}self_attn.", ("o_proj",), Split.COLUMNS)
        found.append(_fused(shapes, f"{fused}post_attention_norm", (f"{prefix}post_attention_layernorm.weight",)))
        found += _fused_linear(shapes, f"{fused}gate_up", f"{prefix}mlp.", ("gate_proj", "up_proj"), Split.ROWS)
        found += _fused_linear(shapes, f"{fused}down", f"{prefix}mlp.", ("down_proj",), Split.COLUMNS)
    found.append(_fused(shapes, FUSED_FINAL_NORM, (FINAL_NORM,)))
    if not config.tie_word_embeddings:
        found.append(_fused(shapes, FUSED_LM_HEAD, (LM_HEAD,), Split.ROWS))
    return tuple(found)


def _fused(
    shapes: dict[str, tuple[int, ...]], name: str, parts: tuple[str, ...], split: Split = Split.NONE
) -> FusedTensor:
    rows = sum(shapes[part][0] for part in parts)
    return FusedTensor(name=name, parts=parts, shape=(rows, *shapes[parts[0]][1:]), split=split)


def _fused_linear(
    shapes: dict[str, tuple[int, ...]], name: str, prefix: str, parts: tuple[str, ...], split: Split
) -> Iterator[FusedTensor]:
    yield _fused(shapes, f"{name}.weight", tuple(f"{prefix}{part}.weight" for part in parts), split)
    biases = tuple(f"{prefix}{part}.bias" for part in parts)
    if biases[0] in shapes:
        # What all ranks add up gets its bias once: who splits columns keeps it whole, and one rank adds it.
        yield _fused(shapes, f"{name}.bias", biases, split if split is Split.ROWS else Split.NONE)


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def fused_prefix(layer: int) -> str:
    return f"layers.{layer}."


def linears(config: ModelConfig) -> list[tuple[str, int, int, bool]]:
    """(name, out, in, has bias) of one layer's projections."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_out, kv_out = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return [
        ("self_attn.q_proj", q_out, hidden, config.qkv_bias),
        ("self_attn.k_proj", kv_out, hidden, config.qkv_bias),
        ("self_attn.v_proj", kv_out, hidden, config.qkv_bias),
        ("self_attn.o_proj", hidden, q_out, config.output_bias),
        ("mlp.gate_proj", inner, hidden, config.mlp_bias),
        ("mlp.up_proj", inner, hidden, config.mlp_bias),
        ("mlp.down_proj", hidden, inner, config.mlp_bias),
    ]
