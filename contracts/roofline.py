"""An analytic latency model from a model's and a device's dimensions (in the manner of LLM-Viewer).

A step takes, for each operator, the longer of its arithmetic and its memory traffic, summed over the operators;
then communication between tensor-parallel ranks, and a constant. The figures are those of a device that reaches
the given shares of its data sheet: measured engines are 1.2 to 6 times slower than a plain roofline, so absolute
results mean something only with efficiencies fitted to an engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import ConfigError
from contracts.latency import DecodeTerms
from contracts.layout import DTYPE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.latency import StepWork

#: By name in a `config.json`.
_ELEMENT_BYTES: dict[str, int] = {str(name): size for name, size in DTYPE_BYTES.items()}

#: Feed-forward matrices of a layer by `model_type`: gated ones have a third.
_FFN_MATRICES = {"llama": 3, "mistral": 3, "qwen2": 3, "qwen3": 3, "opt": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A dense decoder, as far as time and memory depend on it. Biases, norms and positions are not counted."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    #: 3 with a gate (SwiGLU), else 2.
    ffn_matrices: int
    vocab_size: int
    #: Whether the LM head is the embedding table.
    tied_embeddings: bool = False
    #: Of weights, activations and KV alike.
    element_bytes: int = 2

    @property
    def layer_params(self) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + self.ffn_matrices * self.hidden_size * self.ffn_size

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        tables = 1 if self.tied_embeddings else 2
        return self.num_layers * self.layer_params + tables * self.head_params

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token over all layers: `2 L n_kv d s`."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.element_bytes


class _HfConfig(msgspec.Struct):
    """The keys of a `config.json` that matter here; OPT has a name of its own for one."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    intermediate_size: int | None = None
    ffn_dim: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool | None = None
    torch_dtype: str | None = None
    dtype: str | None = None


def shape_from_config(config: Mapping[str, object], *, where: str) -> ModelShape:
    """A decoded Hugging Face `config.json`. `where` names it in errors.

    Raises ConfigError that names the key: missing, of a wrong type, or of a model that is not a dense decoder of
    the known families. Weights of an unnamed or unknown dtype count two bytes each.
    """
    try:
        raw = msgspec.convert(config, _HfConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from error
    if raw.model_type not in _FFN_MATRICES:
        known = ", ".join(sorted(_FFN_MATRICES))
        raise ConfigError(f"{where}: model_type {raw.model_type!r} has no roofline; known are {known}")
    ffn_size = raw.intermediate_size or raw.ffn_dim
    if ffn_size is None:
        raise ConfigError(f"{where}: neither intermediate_size nor ffn_dim is given")
    shape = ModelShape(
        num_layers=raw.num_hidden_layers,
        hidden_size=raw.hidden_size,
        num_heads=raw.num_attention_heads,
        num_kv_heads=raw.num_key_value_heads or raw.num_attention_heads,
        head_dim=raw.head_dim or raw.hidden_size // max(1, raw.num_attention_heads),
        ffn_size=ffn_size,
        ffn_matrices=_FFN_MATRICES[raw.model_type],
        vocab_size=raw.vocab_size,
        # What the architecture's own configuration class says where the key is absent.
        tied_embeddings=raw.model_type == "opt" if raw.tie_word_embeddings is None else raw.tie_word_embeddings,
        element_bytes=_ELEMENT_BYTES.get(raw.dtype or raw.torch_dtype or "", 2),
    )
    for name in ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size", "vocab_size"):
        if getattr(shape, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(shape, name)}, must be at least 1")
    return shape


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_size=ffn,
        ffn_matrices=3,
        vocab_size=vocab,
    )


def _opt(layers: int, hidden: int, heads: int) -> ModelShape:
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        ffn_size=4 * hidden,
        ffn_matrices=2,
        vocab_size=50_272,
        tied_embeddings=True,
    )


MODELS: dict[str, ModelShape] = {
    "llama-3-8b": _llama(32, 4096, 32, 8, 14_336, 128_256),
    "llama-3-70b": _llama(80, 8192, 64, 8, 28_672, 128_256),
    "opt-13b": _opt(40, 5120, 40),
    "opt-66b": _opt(64, 9216, 72),
    # Small enough for one CPU core; the benchmarks' checkpoint of random weights has it.
    "llama-88m": _llama(12, 768, 12, 4, 2048, 8192),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One accelerator's data sheet."""

    #: Dense 16-bit operations.
    peak_flop_s: float
    memory_bandwidth_bytes_s: float
    memory_bytes: int
    #: To the other devices of its machine, in one direction.
    link_bytes_s: float
    #: Of one all-reduce among them.
    link_latency_s: float = 10e-6


#: NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM (tensor cores without sparsity; NVLink's figure is
#: the sum of both directions, so half of it here). A800 and H800 differ in NVLink alone (400 GB/s). AMD's data sheet of
#: Instinct MI300X (matrix bfloat16 without sparsity; seven Infinity Fabric links of 128 GB/s in both directions, half
#: of their sum here).
DEVICES: dict[str, DeviceSpec] = {
    "a100-80g": DeviceSpec(
        peak_flop_s=312e12, memory_bandwidth_bytes_s=2.039e12, memory_bytes=80 << 30, link_bytes_s=300e9
    ),
    "a800-80g": DeviceSpec(
        peak_flop_s=312e12, memory_bandwidth_bytes_s=2.039e12, memory_bytes=80 << 30, link_bytes_s=200e9
    ),
    "h100-sxm": DeviceSpec(
        peak_flop_s=989e12, memory_bandwidth_bytes_s=3.35e12, memory_bytes=80 << 30, link_bytes_s=450e9
    ),
    "h800-sxm": DeviceSpec(
        peak_flop_s=989e12, memory_bandwidth_bytes_s=3.35e12, memory_bytes=80 << 30, link_bytes_s=200e9
    ),
    "h200-sxm": DeviceSpec(
        peak_flop_s=989e12, memory_bandwidth_bytes_s=4.8e12, memory_bytes=141_000_000_000, link_bytes_s=450e9
    ),
    "mi300x": DeviceSpec(
        peak_flop_s=1307.4e12, memory_bandwidth_bytes_s=5.3e12, memory_bytes=192_000_000_000, link_bytes_s=448e9
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficiencies:
    """What an engine reaches of a device."""

    #: Share of the peak operations per second.
    compute: float = 1.0
    #: Share of the memory bandwidth.
    memory: float = 1.0
    #: Of every step: launching kernels, sampling, Python.
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.compute <= 1 and 0 < self.memory <= 1 and 0 <= self.overhead_s < math.inf):
            raise ValueError(f"efficiencies must be in (0, 1], the overhead finite and not negative: {self}")


class Roofline:
    """Follows `contracts.latency.LatencyModel`.

    Operators: the layers' matrices, the LM head (one row per sequence), attention of the chunks, attention of the
    decodes. A chunk reads each token of its context once. `StepWork` tells the chunks' new tokens and pairs but
    not what each reads; the bytes are exact where the chunks of a step are alike, and matter only for short ones.
    """

    def __init__(
        self,
        shape: ModelShape,
        device: DeviceSpec,
        efficiencies: Efficiencies | None = None,
        *,
        tensor_parallel: int = 1,
    ) -> None:
        """Raises ValueError where the heads do not divide among `tensor_parallel` devices."""
        _check_split(shape, tensor_parallel)
        reached = efficiencies or Efficiencies()
        flop_s = reached.compute * device.peak_flop_s * tensor_parallel
        bytes_s = reached.memory * device.memory_bandwidth_bytes_s * tensor_parallel
        layer_params = shape.num_layers * shape.layer_params
        self._layers_token_s = 2.0 * layer_params / flop_s
        self._layers_read_s = layer_params * shape.element_bytes / bytes_s
        self._head_row_s = 2.0 * shape.head_params / flop_s
        self._head_read_s = shape.head_params * shape.element_bytes / bytes_s
        self._pair_s = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim / flop_s
        # Where there are more devices than KV heads each head is kept, and read, more than once.
        copies = max(1.0, tensor_parallel / shape.num_kv_heads)
        self._kv_read_s = shape.kv_token_bytes * copies / bytes_s
        self._constant_s = reached.overhead_s
        self._comm_token_s = 0.0
        if tensor_parallel > 1:
            # A ring all-reduce after attention and one after the feed-forward layers (Megatron-LM).
            ring = 2.0 * (tensor_parallel - 1) / tensor_parallel
            row_bytes = shape.hidden_size * shape.element_bytes
            self._comm_token_s = 2.0 * shape.num_layers * ring * row_bytes / device.link_bytes_s
            self._constant_s += 2.0 * shape.num_layers * device.link_latency_s

    def step_s(self, work: StepWork) -> float:
        """As `LatencyModel.step_s`; 0 for a step of nothing."""
        new_tokens, pairs, num_chunks, num_decodes, context_tokens = work
        num_tokens = new_tokens + num_decodes
        if num_tokens == 0:
            return 0.0
        num_rows = num_chunks + num_decodes
        seconds = (
            max(num_tokens * self._layers_token_s, self._layers_read_s)
            + max(num_rows * self._head_row_s, self._head_read_s)
            + max(context_tokens * self._pair_s, context_tokens * self._kv_read_s)
            + num_tokens * self._comm_token_s
            + self._constant_s
        )
        if new_tokens:
            # For a chunk of n tokens behind p: pairs / n + (n - 1) / 2 = p + n.
            read_tokens = num_chunks * (pairs / new_tokens - 0.5) + new_tokens / 2.0
            seconds += max(pairs * self._pair_s, read_tokens * self._kv_read_s)
        return seconds

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        base_s = (
            max(num_decodes * self._layers_token_s, self._layers_read_s)
            + max(num_decodes * self._head_row_s, self._head_read_s)
            + num_decodes * self._comm_token_s
            + self._constant_s
        )
        return DecodeTerms(base_s, max(self._pair_s, self._kv_read_s))


def kv_blocks_that_fit(
    shape: ModelShape,
    device: DeviceSpec,
    *,
    block_tokens: int,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    memory_share: float = 0.9,
) -> int:
    """KV blocks beside the weights in `memory_share` of the devices' memory; the rest is for activations.

    The stages of a pipeline are taken to be equal. Raises ConfigError where not even one fits, ValueError as `Roofline`
    and where the layers do not divide among the stages.
    """
    _check_split(shape, tensor_parallel)
    if pipeline_parallel < 1 or shape.num_layers % pipeline_parallel:
        raise ValueError(f"{shape.num_layers} layers do not divide among {pipeline_parallel} stages")
    num_devices = tensor_parallel * pipeline_parallel
    copies = max(1.0, tensor_parallel / shape.num_kv_heads)
    free_bytes = memory_share * device.memory_bytes * num_devices - shape.num_params * shape.element_bytes
    num_blocks = int(free_bytes // (shape.kv_token_bytes * copies * block_tokens))
    if num_blocks < 1:
        raise ConfigError(
            f"weights of {shape.num_params * shape.element_bytes / 2**30:.1f} GiB leave no room for KV in "
            f"{memory_share:.0%} of {num_devices} x {device.memory_bytes / 2**30:.1f} GiB"
        )
    return num_blocks


def _check_split(shape: ModelShape, tensor_parallel: int) -> None:
    if tensor_parallel < 1 or shape.num_heads % tensor_parallel:
        raise ValueError(f"{shape.num_heads} heads do not divide among {tensor_parallel} devices")
