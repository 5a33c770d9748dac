"""The roofline counts what it should, once: weights, grouped heads, causal pairs, the LM head, communication."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from contracts.latency import StepWork
from contracts.latency_models import DISTSERVE_OPT
from contracts.roofline import (
    DEVICES,
    MODELS,
    DeviceSpec,
    Efficiencies,
    ModelShape,
    Roofline,
    kv_blocks_that_fit,
    shape_from_config,
)
from tests.support.layout import ROOT

#: Small round numbers: 2 layers of 4 query and 2 KV heads.
SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=2,
    ffn_size=16,
    ffn_matrices=3,
    vocab_size=100,
)
LAYER_PARAMS = 8 * 2 * (4 + 2 + 2 + 4) + 3 * 8 * 16
HEAD_PARAMS = 800

#: One where only arithmetic takes time, one where only memory does.
COMPUTES = DeviceSpec(peak_flop_s=1.0, memory_bandwidth_bytes_s=1e30, memory_bytes=1 << 30, link_bytes_s=1e30)
READS = DeviceSpec(peak_flop_s=1e30, memory_bandwidth_bytes_s=1.0, memory_bytes=1 << 30, link_bytes_s=1e30)


def chunk(num_tokens: int, prefix: int) -> StepWork:
    pairs = num_tokens * prefix + num_tokens * (num_tokens + 1) / 2
    return StepWork(prefill_tokens=num_tokens, prefill_pairs=pairs, num_chunks=1)


def test_kv_bytes_per_token_are_the_published_ones() -> None:
    assert MODELS["llama-3-70b"].kv_token_bytes == 320 << 10
    assert MODELS["llama-3-8b"].kv_token_bytes == 128 << 10
    assert MODELS["opt-66b"].kv_token_bytes * 512 == 1.125 * 2**30


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3-8b", 8.03), ("llama-3-70b", 70.55), ("opt-13b", 12.85), ("opt-66b", 65.7), ("llama-88m", 0.0881)],
)
def test_models_have_the_parameters_of_their_names(name: str, billions: float) -> None:
    assert MODELS[name].num_params / 1e9 == pytest.approx(billions, rel=0.005)


def test_prefill_arithmetic_counts_causal_pairs_of_query_heads_and_one_row_of_the_head() -> None:
    pairs = 5 * 7 + 15
    flop = 2 * 2 * LAYER_PARAMS * 5 + 2 * HEAD_PARAMS + 4 * 2 * 4 * 2 * pairs
    assert Roofline(SHAPE, COMPUTES).step_s(chunk(5, 7)) == pytest.approx(flop)


def test_decode_arithmetic_counts_the_head_for_each_token() -> None:
    flop = 2 * 3 * (2 * LAYER_PARAMS + HEAD_PARAMS) + 4 * 2 * 4 * 2 * 60
    assert Roofline(SHAPE, COMPUTES).step_s(StepWork(num_decodes=3, context_tokens=60)) == pytest.approx(flop)


def test_memory_reads_weights_once_and_the_context_by_kv_heads() -> None:
    weights, kv_token = 2 * (2 * LAYER_PARAMS + HEAD_PARAMS), 2 * 2 * 2 * 2 * 2
    assert SHAPE.kv_token_bytes == kv_token
    model = Roofline(SHAPE, READS)
    assert model.step_s(chunk(5, 7)) == pytest.approx(weights + kv_token * 12)
    assert model.step_s(StepWork(num_decodes=3, context_tokens=60)) == pytest.approx(weights + kv_token * 60)
    # Two equal chunks read two contexts; beside decodes the weights are still read once.
    one = chunk(5, 7)
    step = StepWork(2 * one.prefill_tokens, 2 * one.prefill_pairs, 2, num_decodes=3, context_tokens=60)
    assert model.step_s(step) == pytest.approx(weights + kv_token * 84)


def test_efficiencies_and_overhead() -> None:
    work = StepWork(num_decodes=3, context_tokens=60)
    half = Roofline(SHAPE, COMPUTES, Efficiencies(compute=0.5, overhead_s=7.0))
    assert half.step_s(work) == pytest.approx(2 * Roofline(SHAPE, COMPUTES).step_s(work) + 7.0)


def test_tensor_parallel_divides_the_work_and_pays_two_all_reduces_a_layer() -> None:
    work = StepWork(num_decodes=3, context_tokens=60)
    link = DeviceSpec(
        peak_flop_s=1.0, memory_bandwidth_bytes_s=1e30, memory_bytes=1, link_bytes_s=0.001, link_latency_s=11.0
    )
    all_reduce_s = 2 * 3 / 4 * 3 * 8 * 2 / 0.001 + 11.0
    expected_s = Roofline(SHAPE, COMPUTES).step_s(work) / 4 + 2 * 2 * all_reduce_s
    assert Roofline(SHAPE, link, tensor_parallel=4).step_s(work) == pytest.approx(expected_s)


def test_kv_heads_that_do_not_divide_are_kept_twice() -> None:
    context_s = [Roofline(SHAPE, READS, tensor_parallel=ranks).decode_terms(1).per_context_token_s for ranks in (2, 4)]
    assert context_s == [pytest.approx(SHAPE.kv_token_bytes / 2)] * 2


def test_heads_must_divide_among_devices() -> None:
    with pytest.raises(ValueError, match="4 heads do not divide among 3"):
        Roofline(SHAPE, READS, tensor_parallel=3)


@given(
    st.sampled_from(sorted(MODELS)),
    st.sampled_from(sorted(DEVICES)),
    st.integers(1, 500),
    st.integers(0, 10**6),
    st.sampled_from([1, 2, 4]),
)
def test_decode_terms_are_exact(model: str, device: str, count: int, context_tokens: int, ranks: int) -> None:
    roofline = Roofline(MODELS[model], DEVICES[device], Efficiencies(overhead_s=1e-3), tensor_parallel=ranks)
    terms = roofline.decode_terms(count)
    step_s = roofline.step_s(StepWork(num_decodes=count, context_tokens=context_tokens))
    assert step_s == pytest.approx(terms.base_s + terms.per_context_token_s * context_tokens)


@pytest.mark.parametrize(
    ("setting", "prefill_share", "weights_share"),
    [
        ("opt-13b-tp1", 0.81, 0.63),
        ("opt-13b-tp2", 0.60, 0.47),
        ("opt-66b-tp4", 0.70, 0.52),
        ("opt-66b-tp8", 0.49, 0.35),
    ],
)
def test_published_fits_reach_the_known_shares_of_a_data_sheet(
    setting: str, prefill_share: float, weights_share: float
) -> None:
    """What DistServe's coefficients imply: so the roofline's own terms are of the right size."""
    model, _, ranks = setting.rpartition("-tp")
    shape = MODELS[model]
    device = DEVICES["a100-80g"]
    flop_token_s = 2 * shape.num_layers * shape.layer_params / (device.peak_flop_s * int(ranks))
    assert flop_token_s / DISTSERVE_OPT[setting].prefill_token_s == pytest.approx(prefill_share, abs=0.02)
    read_s = 2 * shape.num_params / (device.memory_bandwidth_bytes_s * int(ranks))
    assert read_s / DISTSERVE_OPT[setting].decode_base_s == pytest.approx(weights_share, abs=0.02)


def test_blocks_that_fit_beside_the_weights() -> None:
    shape, device = MODELS["llama-3-70b"], DEVICES["h100-sxm"]
    num_blocks = kv_blocks_that_fit(shape, device, block_tokens=16, tensor_parallel=4)
    used = shape.num_params * 2 + num_blocks * 16 * shape.kv_token_bytes
    assert used <= 0.9 * 4 * device.memory_bytes < used + 16 * shape.kv_token_bytes
    with pytest.raises(ConfigError, match=r"131\.4 GiB leave no room for KV in 90% of 1 x 80\.0 GiB"):
        kv_blocks_that_fit(shape, device, block_tokens=16)


def test_a_pipeline_holds_the_weights_together() -> None:
    shape, device = MODELS["llama-3-70b"], DEVICES["h100-sxm"]
    flat = kv_blocks_that_fit(shape, device, block_tokens=16, tensor_parallel=4)
    assert kv_blocks_that_fit(shape, device, block_tokens=16, tensor_parallel=2, pipeline_parallel=2) == flat
    assert kv_blocks_that_fit(shape, device, block_tokens=16, pipeline_parallel=2) > 0
    with pytest.raises(ValueError, match="80 layers do not divide among 3 stages"):
        kv_blocks_that_fit(shape, device, block_tokens=16, pipeline_parallel=3)


def test_a_70b_model_fits_one_device_of_192_gb() -> None:
    assert kv_blocks_that_fit(MODELS["llama-3-70b"], DEVICES["mi300x"], block_tokens=16) > 0
    assert DEVICES["mi300x"].memory_bytes == 192 * 10**9


def test_a_shape_is_read_from_a_config_file() -> None:
    demo = json.loads((ROOT / "engine" / "demo" / "config.json").read_text())
    assert shape_from_config(demo, where="demo") == ModelShape(
        num_layers=4,
        hidden_size=192,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        ffn_size=384,
        ffn_matrices=3,
        vocab_size=960,
        tied_embeddings=True,
        element_bytes=4,
    )


def test_opt_is_read_by_its_own_keys() -> None:
    config = {
        "model_type": "opt",
        "num_hidden_layers": 40,
        "hidden_size": 5120,
        "num_attention_heads": 40,
        "ffn_dim": 20_480,
        "vocab_size": 50_272,
        "torch_dtype": "float16",
    }
    assert shape_from_config(config, where="opt") == MODELS["opt-13b"]


CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "intermediate_size": 16,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' has no roofline; known are llama"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"intermediate_size": None}, "neither intermediate_size nor ffn_dim"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"num_attention_heads": -4, "num_key_value_heads": 2}, "num_heads is -4"),
    ],
)
def test_a_config_without_a_shape_is_refused_by_its_key(change: dict[str, object], complaint: str) -> None:
    assert shape_from_config(CONFIG, where="a file").num_layers == 2
    with pytest.raises(ConfigError, match=f"a file: .*{complaint}"):
        shape_from_config({**CONFIG, **change}, where="a file")


@pytest.mark.parametrize("wrong", [{"compute": 0.0}, {"memory": 1.1}, {"overhead_s": -1.0}])
def test_impossible_efficiencies_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="efficiencies"):
        Efficiencies(**wrong)
