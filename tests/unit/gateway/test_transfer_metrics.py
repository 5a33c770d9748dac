"""KV transfers as Prometheus sees them."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from contracts.ids import Incarnation, WorkerId
from contracts.layout import PROTOCOL_VERSION, BlockLayout, KvIdentity
from contracts.messages import LinkReport, Member, PullTally, TransferReport, WorkerInfo, WorkerLoad
from gateway.transfer_metrics import TransferCollector

REPORT = TransferReport(
    pulls=(PullTally("shm", "ok", 3, 4096, 0.5, 0.25), PullTally("ucx", "worker_unavailable", 1, 0, 0.0, 1.5)),
    leases={"holder.sealed": 2, "reader.pulling": 1},
    corrupt_blocks=2,
    refetched_blocks=1,
    checksum_bytes=8192,
    checksum_s=0.125,
    unencoded_blocks=4,
    ended={"holder.released": 7, "reader.aborted.cancelled": 2, "reader.adopted": 5},
    links=(
        LinkReport(peer=WorkerId("p0"), transport="shm", bandwidth_bytes_per_s=3e9, latency_s=1e-4, chosen=True),
        LinkReport(peer=WorkerId("p0"), transport="ucx", note="nobody answers"),
    ),
)


def member(transfers: TransferReport | None) -> Member:
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=4, dtype="float32")
    identity = KvIdentity(model_fingerprint="m", layout=layout, rope_base=1e4, protocol_version=PROTOCOL_VERSION)
    info = WorkerInfo(
        worker_id=WorkerId("d0"),
        incarnation=Incarnation(1),
        role="decode",
        address="d0:1",
        model="m",
        identity=identity,
        total_blocks=8,
        max_context_tokens=64,
    )
    return Member(info=info, load=WorkerLoad(), heartbeat_age_s=0.1, transfers=transfers)


def samples(*members: Member) -> dict[tuple[str, tuple[str, ...]], float]:
    registry = CollectorRegistry()
    registry.register(TransferCollector(members))
    text = generate_latest(registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("tandem_kv_transfers_total", ("d0", "decode", "shm", "ok"), 3),
        ("tandem_kv_transfer_bytes_total", ("d0", "decode", "shm", "ok"), 4096),
        ("tandem_kv_transfer_wire_seconds_total", ("d0", "decode", "shm", "ok"), 0.5),
        ("tandem_kv_transfer_wait_seconds_total", ("d0", "decode", "ucx", "worker_unavailable"), 1.5),
        ("tandem_kv_leases", ("d0", "decode", "holder", "sealed"), 2),
        ("tandem_kv_leases", ("d0", "decode", "reader", "pulling"), 1),
        ("tandem_kv_leases_ended_total", ("d0", "decode", "holder", "released", ""), 7),
        ("tandem_kv_leases_ended_total", ("d0", "decode", "reader", "aborted", "cancelled"), 2),
        ("tandem_kv_link_bandwidth_bytes_per_second", ("d0", "p0", "shm", "true"), 3e9),
        ("tandem_kv_corrupt_blocks_total", ("d0", "decode"), 2),
        ("tandem_kv_refetched_blocks_total", ("d0", "decode"), 1),
        ("tandem_kv_unencoded_blocks_total", ("d0", "decode"), 4),
        ("tandem_kv_checksum_bytes_total", ("d0", "decode"), 8192),
        ("tandem_kv_checksum_seconds_total", ("d0", "decode"), 0.125),
        ("tandem_kv_link_latency_seconds", ("d0", "p0", "shm", "true"), 1e-4),
    ],
)
def test_every_figure_has_its_labels(name: str, labels: tuple[str, ...], value: float) -> None:
    assert samples(member(REPORT))[name, tuple(sorted(labels))] == value


def test_what_was_not_measured_or_told_is_absent() -> None:
    found = samples(member(REPORT), member(None))
    assert not any("ucx" in labels for name, labels in found if name.startswith("tandem_kv_link"))
    assert samples(member(None)) == {}
