"""What a Hugging Face `config.json` says, as one typed record.

The dense decoders of the Llama family differ in a few switches only (biases, QK-norm, windows, rotary
scaling); this module reads the switches, so that `engine.model` is one decoder. What is not supported is
refused here, by name, before a byte of weights is read. Absent keys have the defaults that the architecture's
own configuration class gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import msgspec

from contracts.errors import ConfigError
from contracts.layout import KvDtype

if TYPE_CHECKING:
    from pathlib import Path

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding. Which fields matter depends on `kind`; see `engine.rope`."""

    kind: RopeKind
    theta: float
    #: How many times the context is stretched (all kinds but default).
    factor: float = 1.0
    #: Context length before stretching (llama3, yarn).
    original_max_positions: int = 0
    #: llama3: bounds of the band of frequencies that is interpolated smoothly.
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    #: yarn: the factor on cosines and sines; None means derived from `factor` and the two mscales.
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    #: yarn: rotations per context that bound the ramp between interpolation and extrapolation.
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    #: yarn: whether the ramp's bounds are rounded to whole dimensions.
    truncate: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One dense decoder. Sizes are those of the whole model, before any sharding."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig
    tie_word_embeddings: bool
    #: Biases on the q, k and v projections; on the attention's output; on the feed-forward layers.
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    #: RMS norm of every query and key head before rotation (Qwen3).
    qk_norm: bool
    #: Per layer: how many latest positions a token sees; None for all.
    windows: tuple[int | None, ...]
    #: What the weights were saved in, where the file says so.
    dtype: KvDtype | None
    #: From generation_config.json, else config.json; may be empty.
    eos_token_ids: tuple[int, ...]

    @property
    def qkv_size(self) -> int:
        """Width of a fused q, k, v row: `(H + 2K) * E`."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


class _Rope(msgspec.Struct):
    """`rope_parameters` (newer) or `rope_scaling` (older files)."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0


class _Kind(msgspec.Struct):
    """Read first: the other keys of an architecture that is not supported may be missing or differ."""

    architectures: list[str] | None = None
    model_type: str | None = None


class _Config(msgspec.Struct):
    """The keys of `config.json` that are read, with their types; others are ignored."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | msgspec.UnsetType | None = msgspec.UNSET
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int | None = None
    original_max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | msgspec.UnsetType | None = msgspec.UNSET
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: list[str] | None = None
    quantization_config: dict[str, Any] | None = None
    torch_dtype: str | None = None
    dtype: str | None = None
    eos_token_id: int | list[int] | None = None


class _GenerationConfig(msgspec.Struct):
    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What an architecture fixes, and its defaults for absent keys."""

    max_positions: int
    kv_heads: int | None = None
    head_dim: int | None = None
    #: "config": the attention_bias key decides for q, k, v and output alike; "qkv": always, q, k, v only.
    attention_bias: Literal["none", "qkv", "config"] = "none"
    mlp_bias: bool = False
    qk_norm: bool = False
    #: "all": sliding_window holds for every layer; "per_layer": layer_types and use_sliding_window decide.
    window: Literal["none", "all", "per_layer"] = "none"


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(max_positions=2048, attention_bias="config", mlp_bias=True),
    "MistralForCausalLM": _Family(max_positions=131072, kv_heads=8, window="all"),
    "Qwen2ForCausalLM": _Family(max_positions=32768, kv_heads=32, attention_bias="qkv", window="per_layer"),
    "Qwen3ForCausalLM": _Family(
        max_positions=32768,
        kv_heads=32,
        head_dim=128,
        attention_bias="config",
        qk_norm=True,
        window="per_layer",
    ),
}

SUPPORTED_ARCHITECTURES = tuple(_FAMILIES)
SUPPORTED_ROPE: tuple[str, ...] = get_args(RopeKind)
_SUPPORTED_DTYPES: tuple[str, ...] = get_args(KvDtype)
_DEFAULT_WINDOW = 4096
_StructT = TypeVar("_StructT", bound=msgspec.Struct)


def load_model_config(model_dir: Path) -> ModelConfig:
    """Reads `config.json`, and `generation_config.json` where there is one.

    Raises ConfigError that names the file and the key: no such folder or file, not JSON, wrong types, or a
    feature that is not supported (with the list of what is).
    """
    path = config_path(model_dir)
    config = parse_model_config(path.read_bytes(), where=str(path))
    generation = model_dir / "generation_config.json"
    if not generation.is_file():
        return config
    eos = _eos_ids(_decode(generation.read_bytes(), _GenerationConfig, str(generation)).eos_token_id)
    return replace(config, eos_token_ids=eos) if eos else config


def config_path(model_dir: Path) -> Path:
    """`config.json` of a model folder. Raises ConfigError when folder or file is missing."""
    if not model_dir.is_dir():
        problem = "is a file, not a folder" if model_dir.exists() else "does not exist"
        raise ConfigError(f"model folder {model_dir} {problem}")
    path = model_dir / "config.json"
    if path.is_file():
        return path
    if (model_dir / "adapter_config.json").is_file():
        raise ConfigError(f"{model_dir} holds an adapter, not a model: it has no config.json")
    raise ConfigError(f"{model_dir} has no config.json: not a model in Hugging Face layout")


def parse_model_config(text: bytes, *, where: str) -> ModelConfig:
    """`config.json` as a `ModelConfig`. `where` names the file in errors. Raises ConfigError."""
    architecture, family = _family_of(_decode(text, _Kind, where), where)
    raw = _decode(text, _Config, where)
    _refuse_unsupported(raw, where)
    max_positions = raw.max_position_embeddings or family.max_positions
    head_dim = raw.head_dim or family.head_dim or raw.hidden_size // max(1, raw.num_attention_heads)
    kv_heads = family.kv_heads if raw.num_key_value_heads is msgspec.UNSET else raw.num_key_value_heads
    config = ModelConfig(
        architecture=architecture,
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        intermediate_size=raw.intermediate_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        num_kv_heads=kv_heads or raw.num_attention_heads,
        head_dim=head_dim,
        rms_norm_eps=raw.rms_norm_eps,
        max_position_embeddings=max_positions,
        rope=_rope(raw, max_positions, where),
        tie_word_embeddings=raw.tie_word_embeddings,
        qkv_bias=family.attention_bias == "qkv" or _config_bias(raw, family),
        output_bias=_config_bias(raw, family),
        mlp_bias=family.mlp_bias and raw.mlp_bias,
        qk_norm=family.qk_norm,
        windows=_windows(raw, family, where),
        dtype=_dtype(raw, where),
        eos_token_ids=_eos_ids(raw.eos_token_id),
    )
    _check_sizes(config, where)
    return config


def _decode(text: bytes, kind: type[_StructT], where: str) -> _StructT:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def _family_of(raw: _Kind, where: str) -> tuple[str, _Family]:
    for architecture in raw.architectures or ():
        if architecture in _FAMILIES:
            return architecture, _FAMILIES[architecture]
    named = ", ".join(raw.architectures or ()) or f"none named (model_type {raw.model_type!r})"
    raise ConfigError(
        f"{where}: architecture {named} is not supported; supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_unsupported(raw: _Config, where: str) -> None:
    if raw.quantization_config is not None:
        method = raw.quantization_config.get("quant_method", "unknown method")
        raise ConfigError(
            f"{where}: quantized weights ({method}) are not supported; supported are {', '.join(_SUPPORTED_DTYPES)}"
        )
    if raw.hidden_act != "silu":
        raise ConfigError(f"{where}: hidden_act {raw.hidden_act!r} is not supported; supported is 'silu'")
    if raw.partial_rotary_factor != 1.0:
        raise ConfigError(
            f"{where}: partial_rotary_factor {raw.partial_rotary_factor} is not supported; supported is 1.0"
        )


def _config_bias(raw: _Config, family: _Family) -> bool:
    return family.attention_bias == "config" and raw.attention_bias


def _rope(raw: _Config, max_positions: int, where: str) -> RopeConfig:
    given = raw.rope_scaling or raw.rope_parameters or {}
    try:
        rope = msgspec.convert(given, _Rope)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: rope parameters: {error}") from error
    kind = rope.rope_type or rope.type or "default"
    per_layer_type = [key for key, value in given.items() if isinstance(value, dict)]
    if kind not in SUPPORTED_ROPE or per_layer_type or rope.partial_rotary_factor != 1.0:
        what = f"one per layer type ({', '.join(per_layer_type)})" if per_layer_type else repr(kind)
        raise ConfigError(
            f"{where}: rotary scaling {what} (partial factor {rope.partial_rotary_factor}) is not supported; "
            f"supported are {', '.join(SUPPORTED_ROPE)} over the whole head"
        )
    if rope.factor is None and kind in ("linear", "llama3"):
        raise ConfigError(f"{where}: rotary scaling {kind!r} without 'factor'")
    original = raw.original_max_position_embeddings or rope.original_max_position_embeddings or max_positions
    return RopeConfig(
        kind=cast("RopeKind", kind),
        theta=rope.rope_theta or raw.rope_theta or 10000.0,
        factor=rope.factor or max_positions / original,
        original_max_positions=original,
        low_freq_factor=rope.low_freq_factor or 1.0,
        high_freq_factor=rope.high_freq_factor or 4.0,
        attention_factor=rope.attention_factor,
        mscale=rope.mscale,
        mscale_all_dim=rope.mscale_all_dim,
        beta_fast=rope.beta_fast or 32.0,
        beta_slow=rope.beta_slow or 1.0,
        truncate=rope.truncate,
    )


def _windows(raw: _Config, family: _Family, where: str) -> tuple[int | None, ...]:
    layers = raw.num_hidden_layers
    window = _DEFAULT_WINDOW if raw.sliding_window is msgspec.UNSET else raw.sliding_window
    if family.window == "none" or (family.window == "per_layer" and not raw.use_sliding_window):
        return (None,) * layers
    if family.window == "all":
        return (window,) * layers
    if raw.layer_types is None:
        return tuple(window if layer >= raw.max_window_layers else None for layer in range(layers))
    unknown = sorted(set(raw.layer_types) - {"full_attention", "sliding_attention"})
    if unknown or len(raw.layer_types) != layers:
        raise ConfigError(
            f"{where}: layer_types has {len(raw.layer_types)} entries for {layers} layers, with unknown "
            f"{unknown}; supported are full_attention, sliding_attention"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in raw.layer_types)


def _dtype(raw: _Config, where: str) -> KvDtype | None:
    name = raw.dtype or raw.torch_dtype
    if name is None or name == "auto":
        return None
    if name not in _SUPPORTED_DTYPES:
        raise ConfigError(f"{where}: dtype {name!r} is not supported; supported are {', '.join(_SUPPORTED_DTYPES)}")
    return cast("KvDtype", name)


def _eos_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _check_sizes(config: ModelConfig, where: str) -> None:
    """Relations without which no checkpoint can be read. Raises ConfigError naming the first that fails."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{where}: {name} is {getattr(config, name)}, must be at least 1")
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(f"{where}: {config.num_heads} heads do not divide into {config.num_kv_heads} key/value heads")
    if config.head_dim < 2 or config.head_dim % 2:
        raise ConfigError(f"{where}: head size {config.head_dim} is not an even number of at least 2")
    for window in config.windows:
        if window is not None and window < 1:
            raise ConfigError(f"{where}: sliding_window is {window}, must be at least 1")
