"""What the gateway measures, for Prometheus: names, units and buckets as dashboards of LLM servers expect."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from gateway.service_metrics import CoordinatorCollector, ServiceMetrics
from gateway.transfer_metrics import TransferCollector

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contracts.messages import Member, MembersReply
    from gateway.core import GatewayCore
    from gateway.settings import GatewaySettings
    from gateway.stats import Durations
    from gateway.timeline import Timeline

_FAST_BUCKETS = (
    *(0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0),
)
_SLOW_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)

#: Fields of other servers that clients send; any other unknown field counts as "other".
KNOWN_ELSEWHERE = frozenset(
    {
        "audio", "chat_template", "continue_final_message", "documents", "guided_choice",
        "guided_grammar", "guided_json", "guided_regex", "kv_transfer_params", "length_penalty", "metadata",
        "min_new_tokens", "modalities", "prediction", "reasoning_effort", "regex", "request_id",
        "rid", "service_tier", "session_id", "spaces_between_special_tokens", "store", "structured_outputs",
        "truncate_prompt_tokens", "use_beam_search", "verbosity",
    }
)  # fmt: skip


class Metrics:
    """Owns its registry, so that several gateways may live in one process."""

    def __init__(self, core: GatewayCore, settings: GatewaySettings) -> None:
        self.registry = CollectorRegistry()
        self._service = ServiceMetrics(self.registry, settings.slos)
        self.count_refusal = self._service.count_refusal
        running = self._gauge("num_requests_running", "Requests open at this gateway.")
        running.set_function(lambda: core.num_open)
        self.ttft = self._histogram("time_to_first_token_seconds", "Until the first token.", _SLOW_BUCKETS)
        self.itl = self._histogram("inter_token_latency_seconds", "Between tokens.", _FAST_BUCKETS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Until the last token.", _SLOW_BUCKETS)
        self.phases = {
            phase: self._histogram(f"request_{phase}_time_seconds", f"In phase {phase}.", _SLOW_BUCKETS)
            for phase in ("gateway", "queue", "prefill", "handoff", "decode")
        }
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that were answered.")
        self.generation_tokens = self._counter("generation_tokens", "Tokens written.")
        self.success = self._counter("request_success", "Requests answered.", "finished_reason")
        self.failures = self._counter("request_failures", "Requests that failed.", "code")
        self.unknown_fields = self._counter("unknown_fields", "Fields ignored in requests.", "field")
        self.registry.register(_CoreCollector(core))

    def exposition(self, cluster: MembersReply) -> bytes:
        """The text for Prometheus; `cluster` as the coordinator just told."""
        return generate_latest(self.registry) + generate_latest(self._told(cluster))

    def families(self, cluster: MembersReply) -> Iterable[Metric]:
        """The same before it is text."""
        yield from self.registry.collect()
        yield from self._told(cluster).collect()

    def _told(self, cluster: MembersReply) -> CollectorRegistry:
        told = CollectorRegistry()
        told.register(_WorkerCollector(cluster.members))
        told.register(TransferCollector(cluster.members))
        if cluster.coordinator is not None:
            told.register(CoordinatorCollector(cluster.coordinator))
        return told

    def count_unknown(self, names: Iterable[str]) -> None:
        for name in names:
            self.unknown_fields.labels(name if name in KNOWN_ELSEWHERE else "other").inc()

    def record(self, timeline: Timeline) -> None:
        """Counts one ended request."""
        self._service.record(timeline)
        self.generation_tokens.inc(timeline.num_output_tokens)
        if timeline.ttft_us is not None:
            self.ttft.observe(timeline.ttft_us / 1e6)
        if timeline.outcome not in ("stop", "length"):
            self.failures.labels(timeline.outcome).inc()
            return
        self.success.labels(timeline.outcome).inc()
        self.prompt_tokens.inc(timeline.num_prompt_tokens)
        self.e2e.observe(timeline.total_us / 1e6)
        for phase, histogram in self.phases.items():
            histogram.observe(getattr(timeline, f"{phase}_us") / 1e6)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"tandem_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"tandem_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"tandem_{name}", text, buckets=buckets, registry=self.registry)


class _WorkerCollector(Collector):
    """What the workers' last heartbeats said."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members

    def collect(self) -> Iterable[Metric]:
        labels = ["worker_id", "role"]
        waiting = GaugeMetricFamily("tandem_num_requests_waiting", "Not computing yet.", labels=labels)
        running = GaugeMetricFamily("tandem_worker_num_requests_running", "In the batch.", labels=labels)
        pending = GaugeMetricFamily("tandem_pending_prompt_tokens", "Not computed yet.", labels=labels)
        usage = GaugeMetricFamily("tandem_kv_cache_usage_perc", "Blocks not available, 0 to 1.", labels=labels)
        blocks = GaugeMetricFamily("tandem_kv_blocks", "KV blocks by class.", labels=[*labels, "class"])
        for member in self._members:
            load, total = member.load, member.info.total_blocks
            own = [member.info.worker_id, member.info.role]
            waiting.add_metric(own, load.waiting_requests)
            running.add_metric(own, load.running_requests)
            pending.add_metric(own, load.pending_prompt_tokens)
            usage.add_metric(own, 1 - (load.free_blocks + load.cached_blocks) / total)
            for name in ("free", "owned", "offered", "reserved", "cached", "quarantined"):
                blocks.add_metric([*own, name], getattr(load, f"{name}_blocks"))
        yield from (waiting, running, pending, usage, blocks)


class _CoreCollector(Collector):
    """The core's own counters, read when asked."""

    def __init__(self, core: GatewayCore) -> None:
        self._core = core

    def collect(self) -> Iterable[Metric]:
        stats = self._core.stats
        dropped = CounterMetricFamily(
            "tandem_dropped_deltas", "Token deltas that no client waited for.", labels=["reason"]
        )
        for reason, count in stats.dropped_deltas.items():
            dropped.add_metric([reason], count)
        yield dropped
        yield CounterMetricFamily("tandem_lost_streams", "Worker streams lost.", value=stats.lost_streams)
        yield CounterMetricFamily("tandem_frames", "Token frames received.", value=stats.num_frames)
        replays = CounterMetricFamily(
            "tandem_request_replays", "Requests taken up again on other workers.", labels=["reason"]
        )
        for reason, count in stats.replays.items():
            replays.add_metric([reason], count)
        yield replays
        yield _histogram_of("tandem_request_replay_seconds", "From losing a request to its next token.", stats.resumed)
        moved = CounterMetricFamily(
            "tandem_requests_moved", "Claims of workers on requests, by what became of them.", labels=["result"]
        )
        for outcome, count in stats.claims.items():
            moved.add_metric([outcome], count)
        yield moved
        yield _histogram_of(
            "tandem_move_gap_seconds", "From the last token before a move to the first after it.", stats.move_gaps
        )
        yield CounterMetricFamily(
            "tandem_requests_failed_after_replays",
            "Requests taken up again that failed all the same.",
            value=stats.failed_after_replays,
        )
        placements = CounterMetricFamily(
            "tandem_placements", "Requests placed; by the gateway itself while no coordinator answers.", labels=["by"]
        )
        for by, count in stats.placements.items():
            placements.add_metric([by], count)
        yield placements
        yield CounterMetricFamily(
            "tandem_coordinator_outages", "Times the coordinator did not answer.", value=stats.coordinator_outages
        )
        yield CounterMetricFamily("tandem_dropped_cancels", "Cancels given up.", value=self._core.num_dropped_cancels)
        yield CounterMetricFamily(
            "tandem_dropped_verdicts", "Answers to claims that did not arrive.", value=self._core.num_dropped_verdicts
        )


def exposition_of(parts: Iterable[tuple[str, Iterable[Metric]]]) -> bytes:
    """Several models' families as one text: each family once, each sample with the label `model`."""
    merged = CollectorRegistry()
    merged.register(_Merged(parts))
    return generate_latest(merged)


class _Merged(Collector):
    def __init__(self, parts: Iterable[tuple[str, Iterable[Metric]]]) -> None:
        self._families: dict[str, Metric] = {}
        for model, families in parts:
            for family in families:
                known = self._families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                known.samples += [
                    sample._replace(labels={"model": model, **sample.labels}) for sample in family.samples
                ]

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


def _histogram_of(name: str, text: str, durations: Durations) -> HistogramMetricFamily:
    names = [*map(str, durations.bounds_s), "+Inf"]
    buckets = list(zip(names, accumulate(durations.counts), strict=True))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=durations.sum_s)
