"""What is kept compressed: only what is cold, where memory is short, and where it is a gain by measured rates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from coldstart.compressing import CodecRates, ColdView, CompressRules, TierRates, judge

MIB = 1 << 20
RULES = CompressRules(cold_after_s=600.0)
RATES = CodecRates(
    sampled_bytes=150 * MIB,
    compressed_bytes=100 * MIB,
    compress_bytes_per_s=1e9,
    decode_bytes_per_s=4e9,
    num_threads=2,
)
#: 1,000 MiB that would be compressed.
COLD = ColdView(
    num_bytes=1000 * MIB,
    idle_s=700.0,
    free_bytes=900 * MIB,
    largest_bytes=1000 * MIB,
    next_tier="ssd",
    next_bytes_per_s=2e9,
    rates=RATES,
    bound_bytes=700 * MIB,
)


def test_what_is_cold_and_decoded_faster_than_it_is_read_is_compressed() -> None:
    verdict = judge(COLD, RULES)
    assert verdict.action == "compress"
    assert verdict.reason == "1.50 times smaller, decoded at 4.00 GB/s (2 threads), faster than ssd's 2.00 GB/s"


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (replace(COLD, idle_s=599.0), "used 599 s ago, less than 600 s"),
        (replace(COLD, free_bytes=2000 * MIB), "2000.0 MiB are free, room for 2 more of the largest model"),
        (replace(COLD, next_bytes_per_s=0.0), "how fast ssd is was not measured yet"),
        (replace(COLD, next_bytes_per_s=3.5e9), "no gain over ssd's 3.50 GB/s"),
        (replace(COLD, decoded_bytes_per_s=1e9), "compressed copies came at 1.00 GB/s, no gain over ssd's 2.00 GB/s"),
        (replace(COLD, bound_bytes=901 * MIB), "needs 901.0 MiB beside itself, 900.0 MiB are free"),
    ],
)
def test_what_speaks_against_it_is_said(view: ColdView, reason: str) -> None:
    verdict = judge(view, RULES)
    assert verdict.action == "leave"
    assert reason in verdict.reason


def test_what_hardly_becomes_smaller_stays() -> None:
    rates = CodecRates(
        sampled_bytes=105,
        compressed_bytes=100,
        compress_bytes_per_s=1e9,
        decode_bytes_per_s=9e9,
        num_threads=2,
    )
    assert "less than 1.1 times is not worth it" in judge(replace(COLD, rates=rates), RULES).reason


def test_compressing_that_takes_longer_than_it_was_idle_waits() -> None:
    rates = CodecRates(
        sampled_bytes=150,
        compressed_bytes=100,
        compress_bytes_per_s=1000 * MIB / 701,
        decode_bytes_per_s=4e9,
        num_threads=2,
    )
    assert "compressing takes 701.0 s, it is idle for 700.0 s" in judge(replace(COLD, rates=rates), RULES).reason
    assert judge(replace(COLD, rates=rates, idle_s=702.0), RULES).action == "compress"


def test_a_copy_whose_codec_was_not_measured_is_tried_first() -> None:
    assert judge(replace(COLD, rates=None), RULES).action == "try"
    # What forbids it whatever the codec does is looked at before.
    assert judge(replace(COLD, rates=None, idle_s=1.0), RULES).action == "leave"
    assert judge(replace(COLD, rates=None, next_bytes_per_s=0.0), RULES).action == "leave"


def test_rates_are_medians_of_the_last_loads() -> None:
    rates = TierRates()
    assert rates.bytes_per_s("ssd") == 0.0
    for number, seconds in enumerate((1.0, 2.0, 100.0)):
        rates.observe("ssd", 200, seconds, float(number))
    assert rates.bytes_per_s("ssd") == 100.0
    assert rates.bytes_per_s("ssd", since_s=2.0) == 2.0
    assert rates.bytes_per_s("ssd", since_s=3.0) == 0.0
    for number in range(8):
        rates.observe("ssd", 300, 1.0, 10.0 + number)
    assert rates.bytes_per_s("ssd") == 300.0
    rates.observe("remote", 300, 0.0, 0.0)
    assert rates.bytes_per_s("remote") == 0.0


def test_rules_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="make no sense"):
        CompressRules(min_ratio=0.9)
    with pytest.raises(ValueError, match="make no sense"):
        CompressRules(cold_after_s=-1.0)
    with pytest.raises(ValueError, match="make no sense"):
        CompressRules(min_speedup=0.5)
