"""A decoder's weights in the form that the operators multiply: projections fused, packed once.

Names and shapes are those of a Hugging Face checkpoint; `expected_tensors` is the whole list.

Shape legend: D hidden size, V vocabulary, E head size; packed linear layers are `[out, in]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from engine.checkpoint import WeightSource
    from engine.model_config import ModelConfig
    from engine.ops.api import Ops, PackedLinear

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_FINAL_NORM = "model.norm.weight"
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


class FusedWeights(Protocol):
    """Weights that somebody else holds ready in the engine's form."""

    @property
    def fingerprint(self) -> str:
        """As `engine.checkpoint.model_fingerprint` of the checkpoint that they were made from."""
        ...

    @property
    def dtype(self) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor:
        """A contiguous CPU tensor that is not to be written to. Raises ConfigError when there is none of this name."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    input_norm_D: Tensor
    #: q, k and v stacked: out = (H + 2K) * E.
    qkv: PackedLinear
    q_norm_E: Tensor | None
    k_norm_E: Tensor | None
    attention_output: PackedLinear
    post_attention_norm_D: Tensor
    #: gate and up stacked: out = 2 * intermediate.
    gate_up: PackedLinear
    down: PackedLinear
    #: How many latest positions a token sees; None for all.
    window: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    embedding_VD: Tensor
    layers: tuple[LayerWeights, ...]
    final_norm_D: Tensor
    lm_head: PackedLinear

    @property
    def linear_bytes(self) -> int:
        """Bytes of weights that one forward pass with logits reads."""
        linears = [self.lm_head]
        for layer in self.layers:
            linears += [layer.qkv, layer.attention_output, layer.gate_up, layer.down]
        return sum(linear.num_bytes for linear in linears)


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this config must hold, with its shape."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), _FINAL_NORM: (hidden,)}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix = _prefix(index)
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        for name, out_features, in_features, bias in _linears(config):
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
        prefix, fused = _prefix(index), _fused_prefix(index)
        found.append(_fused(shapes, f"{fused}input_norm", (f"{prefix}input_layernorm.weight",)))
        found += _fused_linear(shapes, f"{fused}qkv", f"{prefix}self_attn.", ("q_proj", "k_proj", "v_proj"), Split.ROWS)
        if config.qk_norm:
            found.append(_fused(shapes, f"{fused}q_norm", (f"{prefix}self_attn.q_norm.weight",)))
            found.append(_fused(shapes, f"{fused}k_norm", (f"{prefix}self_attn.k_norm.weight",)))
        found += _fused_linear(shapes, f"{fused}attention_output", f"{prefix}self_attn.", ("o_proj",), Split.COLUMNS)
        found.append(_fused(shapes, f"{fused}post_attention_norm", (f"{prefix}post_attention_layernorm.weight",)))
        found += _fused_linear(shapes, f"{fused}gate_up", f"{prefix}mlp.", ("gate_proj", "up_proj"), Split.ROWS)
        found += _fused_linear(shapes, f"{fused}down", f"{prefix}mlp.", ("down_proj",), Split.COLUMNS)
    found.append(_fused(shapes, FUSED_FINAL_NORM, (_FINAL_NORM,)))
    if not config.tie_word_embeddings:
        found.append(_fused(shapes, FUSED_LM_HEAD, (LM_HEAD,), Split.ROWS))
    return tuple(found)


def load_weights(
    config: ModelConfig, source: WeightSource, ops: Ops, *, dtype: torch.dtype, device: torch.device
) -> DecoderWeights:
    """Reads, fuses and packs all weights. Errors are those of `source`."""
    shapes = expected_tensors(config)
    fused = {tensor.name: tensor for tensor in fused_tensors(config)}

    def read(name: str) -> Tensor:
        tensor = fused[name]
        stacked = torch.empty(tensor.shape, dtype=dtype)
        rows = [shapes[part][0] for part in tensor.parts]
        for part, target in zip(tensor.parts, torch.split(stacked, rows), strict=True):
            source.read_into(part, target)
        return stacked.to(device)

    return bind_weights(config, read, ops)


def bind_weights(config: ModelConfig, tensor: Callable[[str], Tensor], ops: Ops) -> DecoderWeights:
    """Weights from fused tensors; `tensor` is asked once for each name of `fused_tensors`, in no promised order.

    Nothing is copied that `ops.pack_linear` does not copy: where the tensors lie in memory that processes share, the
    weights do.
    """
    embedding_VD = tensor(FUSED_EMBEDDING)
    lm_head = embedding_VD if config.tie_word_embeddings else tensor(FUSED_LM_HEAD)
    return DecoderWeights(
        embedding_VD=embedding_VD,
        layers=tuple(_bind_layer(config, index, tensor, ops) for index in range(config.num_layers)),
        final_norm_D=tensor(FUSED_FINAL_NORM),
        lm_head=ops.pack_linear(lm_head, None),
    )


def _bind_layer(config: ModelConfig, index: int, tensor: Callable[[str], Tensor], ops: Ops) -> LayerWeights:
    biased = {name for name, _, _, has_bias in _linears(config) if has_bias}
    prefix = _fused_prefix(index)

    def linear(name: str, part: str) -> PackedLinear:
        bias_O = tensor(f"{prefix}{name}.bias") if part in biased else None
        return ops.pack_linear(tensor(f"{prefix}{name}.weight"), bias_O)

    return LayerWeights(
        input_norm_D=tensor(f"{prefix}input_norm"),
        qkv=linear("qkv", "self_attn.q_proj"),
        q_norm_E=tensor(f"{prefix}q_norm") if config.qk_norm else None,
        k_norm_E=tensor(f"{prefix}k_norm") if config.qk_norm else None,
        attention_output=linear("attention_output", "self_attn.o_proj"),
        post_attention_norm_D=tensor(f"{prefix}post_attention_norm"),
        gate_up=linear("gate_up", "mlp.gate_proj"),
        down=linear("down", "mlp.down_proj"),
        window=config.windows[index],
    )


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


def _fused_prefix(layer: int) -> str:
    return f"layers.{layer}."


def _linears(config: ModelConfig) -> list[tuple[str, int, int, bool]]:
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
