"""Which codec is chosen follows from bandwidth and costs; the residual window from lengths."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from contracts.layout import BlockLayout
from kvstore.codecs.choice import CodecCosts, choose_codec, measure_codec, sample_blocks
from kvstore.codecs.window import num_lossy_blocks

GB = 1e9


def costs(name: str, ratio: float, encode_gb_s: float, decode_gb_s: float) -> CodecCosts:
    return CodecCosts(
        name=name, ratio=ratio, encode_s_per_byte=1 / (encode_gb_s * GB), decode_s_per_byte=1 / (decode_gb_s * GB)
    )


RAW = costs("raw", 1.0, 100.0, 100.0)
INT8 = costs("int8", 1.8, 0.5, 4.0)
INT4 = costs("int4", 3.6, 0.5, 1.0)


@pytest.mark.parametrize(
    ("bandwidth", "wanted"), [(0.05 * GB, "int4"), (0.2 * GB, "int4"), (0.9 * GB, "int8"), (8 * GB, "raw")]
)
def test_a_slow_disk_gets_what_is_small_and_a_fast_one_what_is_read_at_once(bandwidth: float, wanted: str) -> None:
    choice = choose_codec([RAW, INT8, INT4], bandwidth)
    assert choice.name == wanted
    assert choice.reason.startswith(f"{wanted}: at {bandwidth / 1e6:,.0f} MB/s 1 MiB of KV takes raw ")


def test_on_a_wire_the_encoder_is_waited_for_too() -> None:
    assert choose_codec([RAW, INT4], 0.3 * GB).name == "int4"
    assert choose_codec([RAW, INT4], 0.3 * GB, encodes_on_path=True).name == "raw"
    assert choose_codec([RAW, INT4], 0.1 * GB, encodes_on_path=True).name == "int4"


def test_a_gain_within_the_error_of_the_figures_is_none() -> None:
    almost = costs("int8", 1.05, 100.0, 100.0)
    assert choose_codec([RAW, almost], 0.1 * GB).name == "raw"


def test_whether_computing_is_sooner_is_told() -> None:
    slow = choose_codec([RAW, INT4], 0.01 * GB, recompute_s_per_byte=1 / (0.02 * GB))
    assert (slow.name, slow.beats_recompute) == ("int4", True)
    assert "computing it 52.4 ms" in slow.reason
    assert not choose_codec([RAW], 0.01 * GB, recompute_s_per_byte=1 / (0.02 * GB)).beats_recompute


@given(
    st.lists(
        st.builds(costs, st.just("int4"), st.floats(1, 4), st.floats(0.1, 9), st.floats(0.1, 9)), min_size=1, max_size=1
    ),
    st.floats(1e6, 1e11),
)
def test_the_choice_is_never_slower_than_raw(others: list[CodecCosts], bandwidth: float) -> None:
    choice = choose_codec([RAW, *others], bandwidth)
    assert choice.read_s_per_byte <= 1 / bandwidth + RAW.decode_s_per_byte


def test_what_cannot_be_chosen_from_is_refused() -> None:
    with pytest.raises(ConfigError, match="chosen beside 'raw'; given are: int4"):
        choose_codec([INT4], GB)
    for bandwidth in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="bandwidth"):
            choose_codec([RAW], bandwidth)


def test_costs_are_measured_by_the_clock_that_is_given() -> None:
    """A clock that ticks once a look: encoding and decoding of three blocks take one second each."""
    layout = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=16, dtype="bfloat16")
    ticks = itertools.count()
    found = measure_codec("int4", layout, lambda: float(next(ticks)))
    assert found.encode_s_per_byte == found.decode_s_per_byte == 1 / (3 * layout.block_bytes)
    assert 3 < found.ratio < 5


def test_sample_blocks_are_a_function_of_their_seed() -> None:
    layout = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=64, block_tokens=16, dtype="bfloat16")
    first, second = (sample_blocks(layout, 2, random.Random(seed)) for seed in (1, 1))
    assert first == second
    assert first[0] != first[1] != sample_blocks(layout, 2, random.Random(2))[1]


@given(st.integers(0, 500), st.integers(1, 64), st.integers(0, 100))
def test_a_lossy_block_ends_before_the_window(num_tokens: int, block_tokens: int, window: int) -> None:
    lossy = num_lossy_blocks(num_tokens, block_tokens, window)
    assert lossy * block_tokens <= max(0, num_tokens - window) < (lossy + 1) * block_tokens
