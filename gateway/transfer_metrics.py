"""KV transfers for Prometheus, as the workers' last heartbeats told them.

Wire time and waiting are apart: a slow link and a queue in front of a fast one are different troubles.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prometheus_client.core import Metric

    from contracts.messages import Member

_OWN = ["worker_id", "role"]


class TransferCollector(Collector):
    def __init__(self, members: Sequence[Member]) -> None:
        #: Those that have told anything.
        self._members = [member for member in members if member.transfers is not None]

    def collect(self) -> Iterable[Metric]:
        yield from self._pulls()
        yield from self._leases()
        yield from self._links()
        yield from self._checksums()

    def _pulls(self) -> Iterable[Metric]:
        labels = [*_OWN, "transport", "outcome"]
        families = {
            "count": CounterMetricFamily("tandem_kv_transfers", "Ended pulls of KV.", labels=labels),
            "num_bytes": CounterMetricFamily("tandem_kv_transfer_bytes", "Bytes that pulls moved.", labels=labels),
            "wire_s": CounterMetricFamily(
                "tandem_kv_transfer_wire_seconds", "First to last byte of pulls.", labels=labels
            ),
            "wait_s": CounterMetricFamily(
                "tandem_kv_transfer_wait_seconds", "Asked to first byte of pulls.", labels=labels
            ),
        }
        for member in self._members:
            assert member.transfers is not None, "kept by the constructor"
            for tally in member.transfers.pulls:
                values = [member.info.worker_id, member.info.role, tally.transport, tally.outcome]
                for name, family in families.items():
                    family.add_metric(values, getattr(tally, name))
        return families.values()

    def _leases(self) -> Iterable[Metric]:
        leases = GaugeMetricFamily("tandem_kv_leases", "Open leases.", labels=[*_OWN, "side", "state"])
        ended = CounterMetricFamily(
            "tandem_kv_leases_ended", "Leases that ended.", labels=[*_OWN, "side", "outcome", "reason"]
        )
        for member in self._members:
            assert member.transfers is not None, "kept by the constructor"
            own = [member.info.worker_id, member.info.role]
            for name, count in member.transfers.leases.items():
                leases.add_metric([*own, *name.split(".", 1)], count)
            for name, count in member.transfers.ended.items():
                side, outcome, reason = (*name.split(".", 2), "", "")[:3]
                ended.add_metric([*own, side, outcome, reason], count)
        return (leases, ended)

    def _checksums(self) -> Iterable[Metric]:
        families = {
            "corrupt_blocks": CounterMetricFamily(
                "tandem_kv_corrupt_blocks", "Blocks that came with a wrong checksum.", labels=_OWN
            ),
            "refetched_blocks": CounterMetricFamily(
                "tandem_kv_refetched_blocks", "Blocks pulled again for a wrong checksum.", labels=_OWN
            ),
            "unencoded_blocks": CounterMetricFamily(
                "tandem_kv_unencoded_blocks",
                "Blocks that a store kept as they are because their codec failed.",
                labels=_OWN,
            ),
            "checksum_bytes": CounterMetricFamily("tandem_kv_checksum_bytes", "Bytes hashed.", labels=_OWN),
            "checksum_s": CounterMetricFamily("tandem_kv_checksum_seconds", "Time spent hashing.", labels=_OWN),
        }
        for member in self._members:
            for name, family in families.items():
                family.add_metric([member.info.worker_id, member.info.role], getattr(member.transfers, name))
        return families.values()

    def _links(self) -> Iterable[Metric]:
        labels = ["worker_id", "peer", "transport", "chosen"]
        bandwidth = GaugeMetricFamily(
            "tandem_kv_link_bandwidth_bytes_per_second", "Measured when the two met.", labels=labels
        )
        latency = GaugeMetricFamily("tandem_kv_link_latency_seconds", "Of one block, when the two met.", labels=labels)
        for member in self._members:
            assert member.transfers is not None, "kept by the constructor"
            for link in member.transfers.links:
                values = [member.info.worker_id, link.peer, link.transport, "true" if link.chosen else "false"]
                if link.bandwidth_bytes_per_s is not None:
                    bandwidth.add_metric(values, link.bandwidth_bytes_per_s)
                if link.latency_s is not None:
                    latency.add_metric(values, link.latency_s)
        return (bandwidth, latency)
