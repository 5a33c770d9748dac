"""Prompt tokens in the metrics by where their KV stood: nothing is counted twice, and nothing is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from contracts.ids import RequestId
from contracts.requests import PhaseTimes, TokenDelta
from gateway.service_metrics import ServiceMetrics
from gateway.timeline import Marks, Timeline

if TYPE_CHECKING:
    from collections.abc import Mapping

TIERS = ("device", "peer", "dram", "ssd")


def answered(num_prompt_tokens: int, cached_tokens: int | None, by_tier: Mapping[str, int]) -> Timeline:
    return Timeline(
        request_id=RequestId("r"),
        total_us=0,
        gateway_us=0,
        queue_us=0,
        prefill_us=0,
        handoff_us=0,
        decode_us=0,
        ttft_us=1,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=1,
        num_replays=0,
        num_moves=0,
        outcome="stop",
        prefill_worker=None,
        decode_worker=None,
        tenant="",
        slo_class="",
        predicted_ttft_us=None,
        predicted_tpot_us=None,
        num_cached_tokens=cached_tokens,
        cached_by_tier=by_tier,
        refused_why=None,
    )


class Counted:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ServiceMetrics(self.registry, {})

    def __call__(self, name: str) -> float:
        return self.registry.get_sample_value(f"tandem_{name}_total") or 0.0

    def tier(self, tier: str) -> float:
        return self.registry.get_sample_value("tandem_prefix_tokens_total", {"tier": tier}) or 0.0


def test_tokens_are_counted_by_where_they_stood() -> None:
    counted = Counted()
    counted.metrics.record(answered(100, 80, {"device": 10, "peer": 20, "dram": 30, "ssd": 20}))
    assert [counted.tier(tier) for tier in (*TIERS, "computed")] == [10, 20, 30, 20, 20]
    assert (counted("prefix_cache_queries"), counted("prefix_cache_hits")) == (100, 10)
    assert (counted("external_prefix_cache_queries"), counted("external_prefix_cache_hits")) == (90, 70)


def test_what_is_not_told_apart_stood_at_the_worker_and_what_is_not_told_at_all_is_not_counted() -> None:
    counted = Counted()
    counted.metrics.record(answered(100, 40, {"tape": 40}))
    counted.metrics.record(answered(100, None, {}))
    assert (counted.tier("device"), counted.tier("computed"), counted.tier("tape")) == (40, 60, 0)


@given(
    prompt=st.integers(1, 1000),
    by_tier=st.dictionaries(st.sampled_from(TIERS), st.integers(0, 400)),
    unsaid=st.integers(0, 50),
)
def test_the_tiers_and_what_was_computed_make_up_all_that_was_looked_up(
    prompt: int, by_tier: dict[str, int], unsaid: int
) -> None:
    counted = Counted()
    cached = sum(by_tier.values()) + unsaid
    counted.metrics.record(answered(prompt, cached, by_tier))
    looked_up = counted("prefix_cache_queries")
    assert looked_up == max(prompt, cached)
    assert sum(counted.tier(tier) for tier in (*TIERS, "computed")) == looked_up
    assert counted("prefix_cache_hits") + counted("external_prefix_cache_queries") == looked_up
    assert counted("external_prefix_cache_hits") == sum(by_tier.get(tier, 0) for tier in TIERS[1:])


@pytest.mark.parametrize("first", [{"dram": 8}, {}])
def test_a_timeline_keeps_what_the_first_try_was_spared(first: dict[str, int]) -> None:
    marks = Marks(received_s=0.0)
    for index, phases in enumerate(
        [PhaseTimes(cached_tokens=sum(first.values()), cached_by_tier=first), PhaseTimes(cached_tokens=16)]
    ):
        marks.note(TokenDelta(request_id=RequestId("r"), index=index, token_ids=(1,), phases=phases), float(index))
    assert (marks.cached_tokens, marks.cached_by_tier) == (sum(first.values()), first)
