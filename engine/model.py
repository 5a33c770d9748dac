"""The decoder: one forward pass over the new tokens of a step, written against the operator seam.

One model for Llama, Mistral, Qwen2 and Qwen3: what differs lies in the weights (biases, head norms, windows)
and in the rotary table. Batch and context are described by `AttentionBatch` alone; KV is read and written in
the pool.

Shape legend: T new tokens of the step, D hidden size, S rows whose next token is asked for, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from engine.kv_pool import KvPool
    from engine.model_config import ModelConfig
    from engine.ops.api import AttentionBatch, Ops
    from engine.weights import DecoderWeights, LayerWeights


class Decoder:
    """Immutable but for the pool's contents. Not safe for two threads at once."""

    def __init__(
        self, config: ModelConfig, weights: DecoderWeights, ops: Ops, pool: KvPool, cos_sin_PE: Tensor
    ) -> None:
        self._weights = weights
        self._ops = ops
        self._pool_NKL2BE = pool.tensor_NKL2BE
        self._cos_sin_PE = cos_sin_PE
        self._num_heads = config.num_heads
        self._eps = config.rms_norm_eps
        self._scale = config.head_dim**-0.5

    def forward(self, token_ids_T: Tensor, batch: AttentionBatch, sample_rows_S: Tensor | None) -> Tensor | None:
        """Writes the KV of the new tokens into their slots; returns fp32 logits `[S, V]` of the rows asked.

        sample_rows_S: int64 indices into the step's rows; None when nothing is to be sampled (the pass then
        ends with the last layer's KV). Mutates the pool at `batch.slots_T` only.
        """
        layers = self._weights.layers
        residual_TD = functional.embedding(token_ids_T, self._weights.embedding_VD)
        hidden_TD = self._ops.rms_norm(residual_TD, layers[0].input_norm_D, self._eps)
        for index, layer in enumerate(layers[:-1]):
            hidden_TD = self._attention(hidden_TD, index, layer, batch)
            hidden_TD = self._feed_forward(hidden_TD, residual_TD, layer)
            following = layers[index + 1].input_norm_D
            hidden_TD = self._ops.add_rms_norm(hidden_TD, residual_TD, following, self._eps)
        return self._last_layer(hidden_TD, residual_TD, batch, sample_rows_S)

    def _last_layer(
        self, hidden_TD: Tensor, residual_TD: Tensor, batch: AttentionBatch, sample_rows_S: Tensor | None
    ) -> Tensor | None:
        """After the last KV is written only the rows to sample matter: the others are dropped there."""
        weights, index = self._weights, len(self._weights.layers) - 1
        layer = weights.layers[index]
        q_THE = self._write_kv(hidden_TD, index, layer, batch)
        if sample_rows_S is None:
            return None
        attended_TX = self._attend(q_THE, index, layer, batch)
        if sample_rows_S.shape[0] != attended_TX.shape[0]:
            attended_TX = attended_TX.index_select(0, sample_rows_S)
            residual_TD = residual_TD.index_select(0, sample_rows_S)
        hidden_SD = self._ops.linear(attended_TX, layer.attention_output)
        hidden_SD = self._feed_forward(hidden_SD, residual_TD, layer)
        hidden_SD = self._ops.add_rms_norm(hidden_SD, residual_TD, weights.final_norm_D, self._eps)
        return self._ops.linear(hidden_SD, weights.lm_head, out_fp32=True)

    def _attention(self, hidden_TD: Tensor, index: int, layer: LayerWeights, batch: AttentionBatch) -> Tensor:
        q_THE = self._write_kv(hidden_TD, index, layer, batch)
        return self._ops.linear(self._attend(q_THE, index, layer, batch), layer.attention_output)

    def _write_kv(self, hidden_TD: Tensor, index: int, layer: LayerWeights, batch: AttentionBatch) -> Tensor:
        return self._ops.rope_and_write_kv(
            self._ops.linear(hidden_TD, layer.qkv),
            self._cos_sin_PE,
            self._pool_NKL2BE,
            index,
            batch,
            num_heads=self._num_heads,
            q_norm_E=layer.q_norm_E,
            k_norm_E=layer.k_norm_E,
            eps=self._eps,
        )

    def _attend(self, q_THE: Tensor, index: int, layer: LayerWeights, batch: AttentionBatch) -> Tensor:
        """Rows of all heads side by side: `[T, H * E]`."""
        attended_THE = self._ops.paged_attention(
            q_THE, self._pool_NKL2BE, index, batch, scale=self._scale, window=layer.window
        )
        return attended_THE.flatten(1)

    def _feed_forward(self, hidden_TD: Tensor, residual_TD: Tensor, layer: LayerWeights) -> Tensor:
        """Takes the attention's output; adds it to the residual in place."""
        hidden_TD = self._ops.add_rms_norm(hidden_TD, residual_TD, layer.post_attention_norm_D, self._eps)
        return self._ops.linear(self._ops.silu_mul(self._ops.linear(hidden_TD, layer.gate_up)), layer.down)
