"""Reading config.json: what the families mean by the same keys, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from contracts.errors import ConfigError
from engine.model_config import ModelConfig, load_model_config, parse_model_config
from tests.support.tiny_models import TINY_MODELS, transformers

if TYPE_CHECKING:
    from pathlib import Path

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


def _parse(**changes: Any) -> ModelConfig:
    return parse_model_config(json.dumps({**_LLAMA, **changes}).encode(), where="here/config.json")


def test_absent_keys_have_the_reference_defaults() -> None:
    """For every family a config of required keys only means what the reference makes of it."""
    for family in ("Llama", "Mistral", "Qwen2", "Qwen3"):
        ours = _parse(architectures=[f"{family}ForCausalLM"], num_attention_heads=32)
        theirs = getattr(transformers, f"{family}Config")(
            **{key: _LLAMA[key] for key in ("hidden_size", "intermediate_size", "vocab_size")},
            num_hidden_layers=4,
            num_attention_heads=32,
        )
        assert ours.num_kv_heads == theirs.num_key_value_heads
        assert ours.head_dim == (getattr(theirs, "head_dim", None) or 64 // 32)
        assert ours.max_position_embeddings == theirs.max_position_embeddings
        assert ours.rms_norm_eps == theirs.rms_norm_eps
        assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
        assert ours.tie_word_embeddings == theirs.tie_word_embeddings
        assert ours.windows == (theirs.sliding_window if family == "Mistral" else None,) * 4


@pytest.mark.parametrize(
    ("family", "bias", "expected"),
    [
        ("Llama", False, (False, False, False)),
        ("Llama", True, (True, True, False)),
        ("Mistral", True, (False, False, False)),
        ("Qwen2", False, (True, False, False)),
        ("Qwen3", False, (False, False, True)),
        ("Qwen3", True, (True, True, True)),
    ],
)
def test_biases_and_norms_by_family(family: str, bias: bool, expected: tuple[bool, bool, bool]) -> None:
    config = _parse(architectures=[f"{family}ForCausalLM"], attention_bias=bias, num_key_value_heads=4)
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == expected


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 2}, (None,) * 4),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, (None, None, 8, 8)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (8, None, 8, None),
        ),
    ],
)
def test_windows_per_layer(changes: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = _parse(architectures=["Qwen2ForCausalLM"], num_key_value_heads=4, **changes)
    assert config.windows == windows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, r"MixtralForCausalLM is not supported.*LlamaForCausalLM"),
        ({"architectures": None, "model_type": "gpt2"}, r"model_type 'gpt2'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"gptq.*bfloat16"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            r"'dynamic'.*default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"'linear' without 'factor'"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, r"factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"per layer type"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor 0.5"),
        ({"hidden_size": "64"}, r"hidden_size"),
        ({"num_attention_heads": 0}, r"num_heads is 0"),
        ({"num_key_value_heads": 3}, r"4 heads do not divide into 3"),
        ({"head_dim": 15}, r"head size 15"),
        ({"torch_dtype": "float64"}, r"'float64'.*bfloat16"),
        (
            {"architectures": ["MistralForCausalLM"], "sliding_window": 0, "num_key_value_heads": 4},
            r"sliding_window",
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "num_key_value_heads": 4,
                "use_sliding_window": True,
                "layer_types": ["linear_attention"] * 4,
            },
            r"linear_attention.*full_attention",
        ),
    ],
)
def test_what_is_refused_names_file_and_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"here/config\.json: .*" + message):
        _parse(**changes)


def test_a_missing_key_is_named() -> None:
    text = json.dumps({key: value for key, value in _LLAMA.items() if key != "vocab_size"}).encode()
    with pytest.raises(ConfigError, match="vocab_size"):
        parse_model_config(text, where="here")


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_the_reference_writes_is_read(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    config = getattr(transformers, tiny.config_class)(**tiny.options)
    config.architectures = [tiny.config_class.replace("Config", "ForCausalLM")]
    config.save_pretrained(tmp_path)
    ours = load_model_config(tmp_path)
    assert ours.rope.kind == config.rope_parameters["rope_type"]
    assert ours.tie_word_embeddings == config.tie_word_embeddings


def test_paths(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_model_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter"):
        load_model_config(tmp_path)
    config = tmp_path / "config.json"
    config.write_text("{not json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        load_model_config(config)
    config.write_bytes(b'{"architectures": ["\xff"]}')
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(2, None, (2,)), ([5, 6], None, (5, 6)), (2, [7, 8], (7, 8)), (2, 9, (9,)), (None, None, ())],
)
def test_end_of_sequence_ids(
    config: int | list[int] | None,
    generation: int | list[int] | None,
    expected: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """generation_config.json goes first, and may be silent."""
    (tmp_path / "config.json").write_text(json.dumps({**_LLAMA, "eos_token_id": config}))
    assert load_model_config(tmp_path).eos_token_ids == (expected if generation is None else _ids(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert load_model_config(tmp_path).eos_token_ids == expected


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value or ())
