"""A decoder's weights in the form that the operators multiply: projections fused, packed once.

Names and shapes are those of a Hugging Face checkpoint; `expected_tensors` is the whole list.

Shape legend: D hidden size, V vocabulary, E head size; packed linear layers are `[out, in]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from engine.checkpoint import WeightSource
    from engine.model_config import ModelConfig
    from engine.ops.api import Ops, PackedLinear

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_FINAL_NORM = "model.norm.weight"


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


def load_weights(
    config: ModelConfig, source: WeightSource, ops: Ops, *, dtype: torch.dtype, device: torch.device
) -> DecoderWeights:
    """Reads, fuses and packs all weights. Errors are those of `source`."""
    reader = _Reader(config, source, ops, dtype, device)
    embedding_VD = reader.tensor(EMBEDDING)
    lm_head = embedding_VD if config.tie_word_embeddings else reader.tensor(LM_HEAD)
    return DecoderWeights(
        embedding_VD=embedding_VD,
        layers=tuple(reader.layer(index) for index in range(config.num_layers)),
        final_norm_D=reader.tensor(_FINAL_NORM),
        lm_head=ops.pack_linear(lm_head, None),
    )


def _prefix(layer: int) -> str:
    return f"model.layers.{layer}."


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


class _Reader:
    """Fills fused tensors from a source; nothing but the loading of one model."""

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        ops: Ops,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config = config
        self._shapes = expected_tensors(config)
        self._source = source
        self._ops = ops
        self._dtype = dtype
        self._device = device

    def layer(self, index: int) -> LayerWeights:
        prefix = _prefix(index)
        attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
        qk_norm = self._config.qk_norm
        return LayerWeights(
            input_norm_D=self.tensor(f"{prefix}input_layernorm.weight"),
            qkv=self._linear(attention, "q_proj", "k_proj", "v_proj"),
            q_norm_E=self.tensor(f"{attention}q_norm.weight") if qk_norm else None,
            k_norm_E=self.tensor(f"{attention}k_norm.weight") if qk_norm else None,
            attention_output=self._linear(attention, "o_proj"),
            post_attention_norm_D=self.tensor(f"{prefix}post_attention_layernorm.weight"),
            gate_up=self._linear(mlp, "gate_proj", "up_proj"),
            down=self._linear(mlp, "down_proj"),
            window=self._config.windows[index],
        )

    def tensor(self, *names: str) -> Tensor:
        """One tensor, or several stacked along their first axis."""
        rows = [self._shapes[name][0] for name in names]
        stacked = torch.empty((sum(rows), *self._shapes[names[0]][1:]), dtype=self._dtype)
        for name, part in zip(names, torch.split(stacked, rows), strict=True):
            self._source.read_into(name, part)
        return stacked.to(self._device)

    def _linear(self, prefix: str, *names: str) -> PackedLinear:
        weight_OI = self.tensor(*(f"{prefix}{name}.weight" for name in names))
        has_bias = f"{prefix}{names[0]}.bias" in self._shapes
        bias_O = self.tensor(*(f"{prefix}{name}.bias" for name in names)) if has_bias else None
        return self._ops.pack_linear(weight_OI, bias_O)
