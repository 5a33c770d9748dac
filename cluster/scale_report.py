"""What `tandem autoscale` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cluster.operate import ASK_TIMEOUT_S, asking, by_model
from contracts.messages import Empty
from contracts.scale_messages import SCALING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cluster.cache import Cluster
    from contracts.scale_messages import PoolScaling, ScalingReply

_MIB = 1 << 20


def print_scaling(clusters: Sequence[Cluster], *, dry_run: bool, as_json: bool) -> int:
    """Asks each model's coordinator; nothing changes."""
    found = [
        (cluster, asking(cluster, lambda channel: channel.call(SCALING, Empty(), timeout_s=ASK_TIMEOUT_S)))
        for cluster in clusters
    ]
    if as_json:
        print(msgspec.json.encode(by_model(found)).decode())
        return 0
    for cluster, reply in found:
        if len(found) > 1:
            print(f"{cluster.model}:")
        for line in dry_run_lines(reply) if dry_run else lines(reply):
            print(line)
    return 0


def lines(reply: ScalingReply) -> Iterator[str]:
    """Each pool, and what was done lately."""
    yield _mode(reply)
    for pool in reply.pools:
        yield _head(pool)
    for age_s, text in reply.done:
        yield f"{age_s:6.0f} s ago  {text}"
    yield from _nodes(reply)


def dry_run_lines(reply: ScalingReply) -> Iterator[str]:
    """What would be done about each pool, and why."""
    yield _mode(reply)
    for pool in reply.pools:
        yield _head(pool)
        yield f"  {_what(pool)}"
        yield f"  {pool.why}: {pool.reason}"
        if pool.next_start:
            yield f"  next start: {pool.next_start}"
    if reply.lending:
        yield f"lending ({reply.lend_mode}): {reply.lending}"
    yield from _nodes(reply)


def _mode(reply: ScalingReply) -> str:
    said = {
        "off": "scaling is off (coordinator.autoscale.mode)",
        "propose": "scaling is proposed, not done (coordinator.autoscale.mode)",
        "apply": "scaling is on",
    }
    if not reply.pools:
        return f"{said[reply.mode]}; no pool has a range of workers (pools.NAME.workers: {{min: 1, max: 4}})"
    return said[reply.mode]


def _head(pool: PoolScaling) -> str:
    leaving = f", {pool.leaving} leaving" if pool.leaving else ""
    seen = f"seen {pool.starts_seen} times" if pool.starts_seen else "configured"
    start = f"{pool.start_s:.1f} s, give or take {pool.start_spread_s:.1f} ({seen})"
    return (
        f"{pool.pool} ({pool.role}, {pool.min_workers} to {pool.max_workers}): {pool.ready} ready, "
        f"{pool.coming} coming{leaving}; wanted {pool.wanted}; a start takes {start}"
    )


def _nodes(reply: ScalingReply) -> Iterator[str]:
    """Where weights lie, and how fast they come."""
    if reply.nodes:
        yield "weights:"
    width = max((len(node.node) for node in reply.nodes), default=0)
    for node in reply.nodes:
        held = [f"{one.model} in {one.tier} ({one.num_bytes / _MIB:.1f} MiB)" for one in node.held]
        line = [f"{node.in_line} loads in line ({node.in_line_bytes / _MIB:.1f} MiB)"] if node.in_line else []
        speeds = [
            f"from {one.tier} {one.bytes_per_s / 1e9:.2f} GB/s ({one.origin}, {one.num_loads} loads)"
            for one in node.speeds
        ]
        yield f"  {node.node:{width}}  {'; '.join([*(held or ['no weights known']), *line, *speeds])}"


def _what(pool: PoolScaling) -> str:
    parts = [
        *([f"flip {', '.join(pool.flips)}"] if pool.flips else []),
        *([f"start {pool.num_starts}"] if pool.num_starts else []),
        *([f"remove {', '.join(pool.remove)}"] if pool.remove else []),
    ]
    return f"would {' and '.join(parts)}" if parts else "would do nothing"
