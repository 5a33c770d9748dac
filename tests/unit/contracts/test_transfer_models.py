"""Transfers against the published figures and against a simulation layer by layer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.roofline import DEVICES, MODELS
from contracts.transfer_models import (
    LinkTransfer,
    break_even_bandwidth_bytes_s,
    exposed_transfer_s,
    reuse_break_even_bandwidth_bytes_s,
)


def test_flows_share_a_link_evenly() -> None:
    link = LinkTransfer(latency_s=0.001, bandwidth_bytes_s=1e9, efficiency=0.5)
    assert link.transfer_s(50_000_000, 1) == pytest.approx(0.101)
    assert link.transfer_s(50_000_000, 4) == pytest.approx(0.401)


@pytest.mark.parametrize(
    "wrong", [{"latency_s": -1.0}, {"bandwidth_bytes_s": 0.0}, {"efficiency": 0.0}, {"efficiency": 1.5}]
)
def test_a_link_that_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a link needs"):
        LinkTransfer(**{"latency_s": 0.0, "bandwidth_bytes_s": 1.0, **wrong})


@pytest.mark.parametrize(("device", "gigabytes_s"), [("a800-80g", 5.9), ("h800-sxm", 18.6)])
def test_reuse_pays_from_the_bandwidth_that_mooncake_states(device: str, gigabytes_s: float) -> None:
    shape = MODELS["llama-3-70b"]
    found = reuse_break_even_bandwidth_bytes_s(
        prefix_tokens=8192,
        hidden_size=shape.hidden_size,
        queries_per_kv_head=shape.num_heads // shape.num_kv_heads,
        element_bytes=2,
        flop_s=8 * DEVICES[device].peak_flop_s,
    )
    assert found / 1e9 == pytest.approx(gigabytes_s, abs=0.05)


def test_both_forms_of_the_break_even_bandwidth_agree() -> None:
    shape, prefix, flop_s = MODELS["llama-3-70b"], 8192, 1e15
    d = shape.hidden_size
    prefill_s_per_token = shape.num_layers * (4 * prefix * d + 22 * d * d) / flop_s
    assert break_even_bandwidth_bytes_s(shape.kv_token_bytes, prefill_s_per_token) == pytest.approx(
        reuse_break_even_bandwidth_bytes_s(
            prefix_tokens=prefix, hidden_size=d, queries_per_kv_head=8, element_bytes=2, flop_s=flop_s
        )
    )


@given(st.floats(1e-4, 10.0), st.floats(1e-4, 10.0), st.integers(1, 100))
def test_what_is_exposed_of_a_layer_wise_transfer(transfer_s: float, prefill_s: float, num_layers: int) -> None:
    link_free_s = 0.0
    for layer in range(1, num_layers + 1):
        link_free_s = max(link_free_s, prefill_s * layer / num_layers) + transfer_s / num_layers
    assert exposed_transfer_s(transfer_s, prefill_s, num_layers) == pytest.approx(link_free_s - prefill_s, abs=1e-9)
