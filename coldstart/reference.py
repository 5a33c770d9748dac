"""A decoder's logits straight from a model folder's files: the engine's arithmetic once more, in numpy, with a few rows
of one tensor in memory at a time.

It shares no operator, no fused tensor and no rotary table with the engine, so that what both say is right. It is for a
handful of short prompts: there is no cache of keys and values.

Formulas: the Llama family as Touvron et al. 2023, section 2, has it; rotary embedding and its stretching as named at
each. Shape legend: B prompts, T tokens of each, D hidden size, H heads, K key-value heads, E head size, V vocabulary,
O and I a linear layer's outputs and inputs.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from coldstart.dtypes import widened
from coldstart.file_source import FileSource
from engine.fused import EMBEDDING, FINAL_NORM, LM_HEAD, expected_tensors, linears, optional_tensors
from engine.model_config import load_model_config
from engine.safetensors_files import ITEM_BYTES, check_names, read_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from engine.model_config import ModelConfig, RopeConfig
    from engine.safetensors_files import StoredTensor

#: Of a tensor, read and multiplied at a time (one row, where rows are longer): products of less cost as much as more.
_PIECE_BYTES = 8 << 20

Floats: TypeAlias = NDArray[np.float32]
Waves: TypeAlias = NDArray[np.float64]


def reference_logits(
    model_dir: Path,
    prompts: Sequence[Sequence[int]],
    *,
    num_last: int,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Floats:
    """fp32 `[B, num_last, V]`: what follows each of the last tokens of prompts that are all of one length.

    Computed in float32 from the values that are stored. `progress(bytes read, bytes in all)`. Blocks. Raises
    ConfigError, LoadError, CorruptCheckpoint.
    """
    config = load_model_config(model_dir)
    with _Tensors(model_dir, config, progress) as tensors, np.errstate(all="ignore"):
        logits_BTV = _Reference(config, tensors).logits(np.array(prompts, np.int64), num_last)
        progress(tensors.num_bytes, tensors.num_bytes)
        return logits_BTV


class _Tensors:
    """The folder's tensors, a few rows at a time, widened."""

    def __init__(self, model_dir: Path, config: ModelConfig, progress: Callable[[int, int], None]) -> None:
        expected = expected_tensors(config)
        stored = read_headers(model_dir)
        check_names(model_dir, stored, expected, optional_tensors(config))
        self._stored = {name: stored[name] for name in expected}
        self._progress = progress
        self._read_bytes = 0
        self.num_bytes = sum(tensor.num_bytes for tensor in self._stored.values())
        self._files = dict[str, FileSource]()
        self._stack = ExitStack()

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def vector(self, name: str) -> Floats:
        tensor = self._stored[name]
        return self._items(tensor, 0, tensor.shape[0])

    def row(self, name: str, index: int) -> Floats:
        tensor = self._stored[name]
        return self._items(tensor, index * tensor.shape[1], tensor.shape[1])

    def pieces(self, name: str) -> Iterator[tuple[int, Floats]]:
        """(first row, rows `[n, I]`) of a matrix, in order."""
        tensor = self._stored[name]
        rows, columns = tensor.shape
        step = max(1, _PIECE_BYTES // (columns * ITEM_BYTES[tensor.dtype]))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            yield first, self._items(tensor, first * columns, count * columns).reshape(count, columns)

    def _items(self, tensor: StoredTensor, first: int, count: int) -> Floats:
        size = ITEM_BYTES[tensor.dtype]
        raw = bytearray(count * size)
        self._file(tensor.file).read_into(tensor.start + first * size, raw)
        self._read_bytes += len(raw)
        # A few rows are read twice: the end is told at the end.
        self._progress(min(self._read_bytes, self.num_bytes - 1), self.num_bytes)
        return widened(memoryview(raw), tensor.dtype)

    def _file(self, path: Path) -> FileSource:
        name = str(path)
        if name not in self._files:
            # Whoever asks has just read it, or is about to.
            self._files[name] = FileSource(path, direct=False, keep_cached=True)
            self._stack.callback(self._files[name].close)
        return self._files[name]


class _Reference:
    def __init__(self, config: ModelConfig, tensors: _Tensors) -> None:
        self._config = config
        self._tensors = tensors
        self._biased = {name for name, _, _, has_bias in linears(config) if has_bias}

    def logits(self, token_ids_BT: NDArray[np.int64], num_last: int) -> Floats:
        config = self._config
        num_prompts, num_tokens = token_ids_BT.shape
        rows = [self._tensors.row(EMBEDDING, int(token)) for token in token_ids_BT.reshape(-1)]
        hidden_BTD = np.stack(rows).reshape(num_prompts, num_tokens, config.hidden_size)
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            normed_BTD = self._norm(hidden_BTD, f"{prefix}input_layernorm.weight")
            hidden_BTD = hidden_BTD + self._attention(normed_BTD, prefix, config.windows[layer])
            normed_BTD = self._norm(hidden_BTD, f"{prefix}post_attention_layernorm.weight")
            hidden_BTD = hidden_BTD + self._feed_forward(normed_BTD, prefix)
        normed_BTD = self._norm(hidden_BTD[:, num_tokens - num_last :], FINAL_NORM)
        return self._product(normed_BTD, EMBEDDING if config.tie_word_embeddings else LM_HEAD, config.vocab_size)

    def _attention(self, normed_BTD: Floats, prefix: str, window: int | None) -> Floats:
        config = self._config
        num_prompts, num_tokens, _ = normed_BTD.shape

        def heads(name: str, number: int) -> Floats:
            """`[B, number, T, E]`"""
            flat = self._linear(normed_BTD, prefix, f"self_attn.{name}", number * config.head_dim)
            return flat.reshape(num_prompts, num_tokens, number, config.head_dim).swapaxes(1, 2)

        q_BHTE = heads("q_proj", config.num_heads)
        k_BKTE = heads("k_proj", config.num_kv_heads)
        v_BKTE = heads("v_proj", config.num_kv_heads)
        if config.qk_norm:
            q_BHTE = self._norm(q_BHTE, f"{prefix}self_attn.q_norm.weight")
            k_BKTE = self._norm(k_BKTE, f"{prefix}self_attn.k_norm.weight")
        q_BHTE, k_BKTE = self._rotated(q_BHTE), self._rotated(k_BKTE)
        sharing = config.num_heads // config.num_kv_heads
        k_BHTE, v_BHTE = k_BKTE.repeat(sharing, axis=1), v_BKTE.repeat(sharing, axis=1)
        scores_BHTT = q_BHTE @ k_BHTE.swapaxes(2, 3) / np.float32(math.sqrt(config.head_dim))
        positions_T = np.arange(num_tokens, dtype=np.int64)
        back_TT: NDArray[np.int64] = np.subtract.outer(positions_T, positions_T)
        seen_TT = (back_TT >= 0) & (back_TT < (window or num_tokens))
        scores_BHTT = np.where(seen_TT, scores_BHTT, np.float32(-np.inf))
        weights_BHTT = np.exp(scores_BHTT - scores_BHTT.max(axis=-1, keepdims=True))
        weights_BHTT /= weights_BHTT.sum(axis=-1, keepdims=True)
        attended_BTX = (weights_BHTT @ v_BHTE).swapaxes(1, 2).reshape(num_prompts, num_tokens, -1)
        return self._linear(attended_BTX, prefix, "self_attn.o_proj", config.hidden_size)

    def _feed_forward(self, normed_BTD: Floats, prefix: str) -> Floats:
        """SwiGLU (Shazeer 2020, equation 6)."""
        inner = self._config.intermediate_size
        gate = self._linear(normed_BTD, prefix, "mlp.gate_proj", inner)
        up = self._linear(normed_BTD, prefix, "mlp.up_proj", inner)
        activated = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
        return self._linear(activated, prefix, "mlp.down_proj", self._config.hidden_size)

    def _rotated(self, heads_BHTE: Floats) -> Floats:
        """RoFormer (Su et al. 2021, section 3.4.2), with the halves of a head as its pairs."""
        config = self._config
        waves, factor = _waves(config.rope, config.head_dim)
        positions_T = np.arange(heads_BHTE.shape[2], dtype=np.float64)
        angles_TE: Waves = np.outer(positions_T, np.concatenate((waves, waves)))
        first, second = np.split(heads_BHTE, 2, axis=-1)
        turned = np.concatenate((-second, first), axis=-1)
        return ((heads_BHTE * np.cos(angles_TE) + turned * np.sin(angles_TE)) * factor).astype(np.float32)

    def _norm(self, x_XD: Floats, name: str) -> Floats:
        mean_square = np.mean(np.square(x_XD), axis=-1, keepdims=True, dtype=np.float32)
        spread: Floats = np.sqrt(mean_square + np.float32(self._config.rms_norm_eps), dtype=np.float32)
        return x_XD / spread * self._tensors.vector(name)

    def _linear(self, x_BTI: Floats, prefix: str, name: str, num_out: int) -> Floats:
        product = self._product(x_BTI, f"{prefix}{name}.weight", num_out)
        return product + self._tensors.vector(f"{prefix}{name}.bias") if name in self._biased else product

    def _product(self, x_BTI: Floats, name: str, num_out: int) -> Floats:
        flat_XI = np.ascontiguousarray(x_BTI.reshape(-1, x_BTI.shape[-1]))
        out_XO = np.empty((len(flat_XI), num_out), np.float32)
        for first, rows in self._tensors.pieces(name):
            out_XO[:, first : first + len(rows)] = flat_XI @ rows.T
        return out_XO.reshape(*x_BTI.shape[:-1], num_out)


def _waves(rope: RopeConfig, head_dim: int) -> tuple[Waves, float]:
    """(`[E / 2]` radians per position, factor on cosines and sines)."""
    plain: Waves = np.power(rope.theta, -np.arange(0, head_dim, 2) / head_dim)
    match rope.kind:
        case "default":
            return plain, 1.0
        case "linear":
            # Chen et al. 2023, equation 3.
            return plain / rope.factor, 1.0
        case "llama3":
            # Llama 3.1: what turns seldom within the original context is stretched, what turns often kept.
            turns = rope.original_max_positions * plain / (2 * math.pi)
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            return _blended(plain, plain / rope.factor, kept), 1.0
        case "yarn":
            return _blended(plain, plain / rope.factor, 1 - _yarn_ramp(rope, head_dim)), _yarn_factor(rope)


def _blended(kept: Waves, stretched: Waves, share: Waves) -> Waves:
    share = np.clip(share, 0.0, 1.0)
    return kept * share + stretched * (1 - share)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> Waves:
    """Peng et al. 2023, section 3.2: 0 for dimensions that turn `beta_fast` times or more, 1 from `beta_slow` down."""
    low, high = (
        head_dim * math.log(rope.original_max_positions / (beta * 2 * math.pi)) / (2 * math.log(rope.theta))
        for beta in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    dimensions = np.arange(head_dim // 2, dtype=np.float64)
    return (dimensions - low) / max(high - low, 0.001)


def _yarn_factor(rope: RopeConfig) -> float:
    """Peng et al. 2023, section 3.4."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
