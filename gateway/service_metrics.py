"""What the gateway measures of promises: refusals, targets met, predictions, cached prompts, tenants.

Labels are bounded: tenants and classes are those of the configuration, reasons are words of our own processes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

    from contracts.messages import CoordinatorFigures
    from gateway.timeline import Timeline
    from workload.slo import SloClass

#: Where a cached prompt token's KV can have stood, as workers tell it (`contracts.requests.PhaseTimes`).
_TIERS = ("device", "peer", "dram", "ssd")

#: Measured less predicted: below 0 it came sooner.
_ERROR_BUCKETS_S = (
    *(-10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, -0.05, -0.02, 0.0),
    *(0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)


class ServiceMetrics:
    def __init__(self, registry: CollectorRegistry, slos: Mapping[str, SloClass]) -> None:
        self._slos = slos
        self._refusals = Counter(
            "tandem_admission_rejections",
            "Requests that no worker took.",
            ("reason", "slo_class"),
            registry=registry,
        )
        self._answered = Counter(
            "tandem_slo_requests",
            "Answered requests of classes with targets, by whether both were met.",
            ("slo_class", "met"),
            registry=registry,
        )
        self._ttft_error = Histogram(
            "tandem_ttft_prediction_error_seconds",
            "Time to first token, measured less predicted.",
            buckets=_ERROR_BUCKETS_S,
            registry=registry,
        )
        self._looked_up = Counter(
            "tandem_prefix_cache_queries", "Prompt tokens looked up in the worker's own pool.", registry=registry
        )
        self._found = Counter("tandem_prefix_cache_hits", "Prompt tokens found there.", registry=registry)
        self._looked_up_elsewhere = Counter(
            "tandem_external_prefix_cache_queries",
            "Prompt tokens not found there, which may come from other workers and from stores.",
            registry=registry,
        )
        self._found_elsewhere = Counter(
            "tandem_external_prefix_cache_hits", "Prompt tokens that came from these.", registry=registry
        )
        self._by_tier = Counter(
            "tandem_prefix_tokens",
            "Prompt tokens by where their KV stood; computed: it stood nowhere.",
            ("tier",),
            registry=registry,
        )
        self._tenants = Counter(
            "tandem_tenant_requests", "Ended requests by tenant.", ("tenant", "outcome"), registry=registry
        )
        self._tokens = Counter(
            "tandem_tenant_tokens",
            "Tokens of answered requests by tenant; cached ones are among the prompt's.",
            ("tenant", "kind"),
            registry=registry,
        )

    def count_refusal(self, reason: str, slo_class: str, tenant: str) -> None:
        self._refusals.labels(reason, slo_class).inc()
        self._tenants.labels(tenant, "refused").inc()

    def record(self, timeline: Timeline) -> None:
        """Counts one ended request."""
        if timeline.refused_why is not None:
            self.count_refusal(timeline.refused_why, timeline.slo_class, timeline.tenant)
            return
        is_answered = timeline.outcome in ("stop", "length")
        outcome = "answered" if is_answered else "cancelled" if timeline.outcome == "cancelled" else "failed"
        self._tenants.labels(timeline.tenant, outcome).inc()
        self._note_prediction(timeline)
        if is_answered:
            self._note_tokens(timeline)
            self._note_targets(timeline)

    def _note_prediction(self, timeline: Timeline) -> None:
        """What a lost worker cost was nobody's prediction."""
        measured_us, predicted_us = timeline.ttft_us, timeline.predicted_ttft_us
        if measured_us is not None and predicted_us is not None and not timeline.num_replays:
            self._ttft_error.observe((measured_us - predicted_us) / 1e6)

    def _note_tokens(self, timeline: Timeline) -> None:
        self._tokens.labels(timeline.tenant, "prompt").inc(timeline.num_prompt_tokens)
        self._tokens.labels(timeline.tenant, "generation").inc(timeline.num_output_tokens)
        if timeline.num_cached_tokens is not None:
            self._tokens.labels(timeline.tenant, "cached").inc(timeline.num_cached_tokens)
            self._note_tiers(timeline.num_prompt_tokens, timeline.num_cached_tokens, timeline.cached_by_tier)

    def _note_tiers(self, num_prompt_tokens: int, num_cached_tokens: int, by_tier: Mapping[str, int]) -> None:
        # A replayed prompt holds what was written of its answer too.
        num_looked_up = max(num_prompt_tokens, num_cached_tokens)
        counts = {tier: by_tier.get(tier, 0) for tier in _TIERS}
        # Of what a worker does not tell apart, all that is known is that it was not computed.
        counts["device"] += max(0, num_cached_tokens - sum(counts.values()))
        num_elsewhere = sum(counts.values()) - counts["device"]
        self._looked_up.inc(num_looked_up)
        self._found.inc(counts["device"])
        self._looked_up_elsewhere.inc(max(0, num_looked_up - counts["device"]))
        self._found_elsewhere.inc(num_elsewhere)
        counts["computed"] = max(0, num_looked_up - sum(counts.values()))
        for tier, count in counts.items():
            self._by_tier.labels(tier).inc(count)

    def _note_targets(self, timeline: Timeline) -> None:
        slo = self._slos.get(timeline.slo_class)
        if slo is None or timeline.ttft_us is None:
            return
        is_met = slo.attained(ttft_s=timeline.ttft_us / 1e6, tpot_s=timeline.tpot_s)
        self._answered.labels(timeline.slo_class, str(is_met).lower()).inc()


class CoordinatorCollector(Collector):
    """What the coordinator told of itself."""

    def __init__(self, figures: CoordinatorFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        figures = self._figures
        verdicts = CounterMetricFamily(
            "tandem_coordinator_verdicts", "Decisions: placements, or reasons of rejections.", labels=["verdict"]
        )
        for verdict, count in figures.verdicts_total.items():
            verdicts.add_metric([verdict], count)
        yield verdicts
        if figures.decisions_within:
            names = [*map(str, figures.decision_bounds_s[: len(figures.decisions_within) - 1]), "+Inf"]
            yield HistogramMetricFamily(
                "tandem_coordinator_decision_seconds",
                "Time that one decision took.",
                buckets=list(zip(names, figures.decisions_within, strict=True)),
                sum_value=figures.decisions_s,
            )
        margins = GaugeMetricFamily(
            "tandem_admission_ttft_margin",
            "Share of the TTFT target that predictions may reach: below 1 where too many of the accepted were late.",
            labels=["slo_class"],
        )
        for slo_class, share in figures.ttft_margins.items():
            margins.add_metric([slo_class], share)
        yield margins
        yield GaugeMetricFamily("tandem_directory_blocks", "Cached blocks known.", value=figures.directory_blocks)
        yield GaugeMetricFamily("tandem_directory_bytes", "Memory of that.", value=figures.directory_bytes)
        for name, text, label, counts in (
            ("tandem_moves_asked", "Requests that workers were asked to move.", "purpose", figures.moves_asked_total),
            ("tandem_moves_begun", "Of these: begun.", "purpose", figures.moves_begun_total),
            ("tandem_moves_refused", "Of these: not begun.", "purpose", figures.moves_refused_total),
            ("tandem_moves_failed", "Of these: no answer.", "purpose", figures.moves_failed_total),
            ("tandem_moves_withheld", "Full workers that gave nothing away.", "reason", figures.moves_withheld_total),
        ):
            moves = CounterMetricFamily(name, text, labels=[label])
            for which, count in counts.items():
                moves.add_metric([which], count)
            yield moves
        workers = GaugeMetricFamily(
            "tandem_pool_workers", "Workers of pools that follow the load.", labels=["pool", "state"]
        )
        looks = CounterMetricFamily(
            "tandem_pool_decisions", "Looks at pools that follow the load.", labels=["pool", "decision"]
        )
        for pool in figures.pools:
            for state, number in (("wanted", pool.wanted), ("ready", pool.ready), ("coming", pool.coming)):
                workers.add_metric([pool.pool, state], number)
            for decision, number in pool.decisions_total.items():
                looks.add_metric([pool.pool, decision], number)
        yield workers
        yield looks
        counters = {
            "tandem_directory_dropped_blocks": ("Cached blocks not kept track of.", figures.directory_dropped),
            "tandem_block_events": ("Changes of prefix caches told.", figures.block_events_total),
            "tandem_block_event_gaps": ("Gaps in their numbers.", figures.block_gaps_total),
            "tandem_block_snapshots": ("Whole caches told anew.", figures.block_snapshots_total),
            "tandem_workload_shifts": ("Lasting changes of the workload.", figures.workload_shifts_total),
            "tandem_splits_proposed": ("Better splits of the workers proposed.", figures.splits_proposed_total),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=value)
