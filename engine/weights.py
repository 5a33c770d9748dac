"""A decoder's weights in the form that the operators multiply: projections fused, packed once.

Shape legend: D hidden size, V vocabulary, E head size; packed linear layers are `[out, in]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from engine.fused import (
    FUSED_EMBEDDING,
    FUSED_FINAL_NORM,
    FUSED_LM_HEAD,
    expected_tensors,
    fused_prefix,
    fused_tensors,
    linears,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from engine.canary import Canary
    from engine.checkpoint import WeightSource
    from engine.model_config import ModelConfig
    from engine.ops.api import Ops, PackedLinear
    from engine.safetensors_files import StoredDtype


class FusedWeights(Protocol):
    """Weights that somebody else holds ready in the engine's form."""

    @property
    def fingerprint(self) -> str:
        """As `engine.safetensors_files.model_fingerprint` of the checkpoint that they were made from."""
        ...

    @property
    def dtype(self) -> StoredDtype: ...

    @property
    def canary(self) -> Canary | None:
        """What the engine must answer with them; None where nobody knows."""
        ...

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
    biased = {name for name, _, _, has_bias in linears(config) if has_bias}
    prefix = fused_prefix(index)

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
