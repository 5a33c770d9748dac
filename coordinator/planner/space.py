"""Which plans there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coordinator.planner.plans import Dropped, Parallelism, Plan, Pool, WorkerKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from contracts.messages import Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """What there is to plan with. Raises ValueError for devices that do not divide among the nodes."""

    num_devices: int
    num_nodes: int = 1
    #: KV may go between nodes; else only within one (DistServe's low node-affinity, its algorithm 2).
    fast_fabric: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.num_nodes <= self.num_devices or self.num_devices % self.num_nodes:
            raise ValueError(f"{self.num_devices} devices do not divide among {self.num_nodes} nodes")

    @property
    def node_devices(self) -> int:
        return self.num_devices // self.num_nodes


def parallelisms(
    machines: Machines, *, num_heads: int, num_layers: int, max_pipeline: int, fits: Callable[[Parallelism], str | None]
) -> tuple[list[Parallelism], list[Dropped]]:
    """Those that the model's dimensions and the devices' memory allow, by tensor and pipeline parallelism.

    Tensor parallelism divides the heads and stays within a node, pipeline parallelism divides the layers. `fits` says
    why one is too large for the memory, or None.
    """
    found: list[Parallelism] = []
    dropped: list[Dropped] = []
    for tensor in range(1, machines.node_devices + 1):
        if num_heads % tensor:
            continue
        for pipeline in range(1, min(max_pipeline, machines.num_devices // tensor) + 1):
            if num_layers % pipeline:
                continue
            parallel = Parallelism(tensor, pipeline)
            why = fits(parallel)
            if why is None:
                found.append(parallel)
            else:
                dropped.append(Dropped(str(parallel), why))
    return found, dropped


def colocated_plans(machines: Machines, kinds: Sequence[WorkerKind], *, all_counts: bool) -> Iterator[Plan]:
    """Mixed workers of one kind: as many as there can be, or every count up to that."""
    for kind in kinds:
        most = _most_workers(machines, kind.parallel)
        for count in range(1 if all_counts else most, most + 1):
            if count:
                yield Plan((Pool("mixed", kind, count),))


def split_plans(machines: Machines, kinds: Mapping[Role, Sequence[WorkerKind]], *, all_counts: bool) -> Iterator[Plan]:
    """Prefill and decode workers, one kind of each; with `all_counts` every number of both that there can be, else
    only those with no room for one more of either."""
    for reader in kinds["prefill"]:
        for writer in kinds["decode"]:
            if machines.fast_fabric:
                yield from _anywhere(machines, reader, writer, all_counts=all_counts)
            elif reader.parallel.pipeline == writer.parallel.pipeline:
                yield from _within_nodes(machines, reader, writer, all_counts=all_counts)


def _anywhere(machines: Machines, reader: WorkerKind, writer: WorkerKind, *, all_counts: bool) -> Iterator[Plan]:
    widths = (reader.parallel.tensor, writer.parallel.tensor)
    # Else workers that fit by their number may not fit by their place: tensor parallelism needs one node.
    place_follows = machines.node_devices % max(widths) == 0 and max(widths) % min(widths) == 0
    plans = {
        split: Plan((Pool("prefill", reader, split[0]), Pool("decode", writer, split[1])))
        for split in _splits(machines.num_devices, reader.parallel.num_devices, writer.parallel.num_devices)
    }
    if not place_follows:
        plans = {split: plan for split, plan in plans.items() if _has_places(machines, plan.pools)}
    for (num_readers, num_writers), plan in plans.items():
        one_more = ((num_readers + 1, num_writers), (num_readers, num_writers + 1))
        if all_counts or not any(split in plans for split in one_more):
            yield plan


def _within_nodes(machines: Machines, reader: WorkerKind, writer: WorkerKind, *, all_counts: bool) -> Iterator[Plan]:
    """A copy is some readers and some writers whose stages of the same layers share a node; as many copies as there
    is room for. DistServe has one of each in a copy."""
    stages = reader.parallel.pipeline
    for num_readers, num_writers in _splits(machines.node_devices, reader.parallel.tensor, writer.parallel.tensor):
        segment = num_readers * reader.parallel.tensor + num_writers * writer.parallel.tensor
        most = machines.node_devices // segment * machines.num_nodes // stages
        pools = (Pool("prefill", reader, num_readers), Pool("decode", writer, num_writers))
        for copies in range(1 if all_counts else most, most + 1):
            if copies:
                yield Plan(pools, copies)


def _splits(total: int, reader: int, writer: int) -> Iterator[tuple[int, int]]:
    """Counts, at least one each, of two kinds of workers with so many devices each."""
    for num_readers in range(1, (total - writer) // reader + 1):
        left = total - num_readers * reader
        yield from ((num_readers, num_writers) for num_writers in range(1, left // writer + 1))


def _most_workers(machines: Machines, parallel: Parallelism) -> int:
    return machines.node_devices // parallel.tensor * machines.num_nodes // parallel.pipeline


def _has_places(machines: Machines, pools: Sequence[Pool]) -> bool:
    """Whether first-fit, the widest first, finds a node for every stage of every worker."""
    free = [machines.node_devices] * machines.num_nodes
    widths = sorted(
        (pool.kind.parallel.tensor for pool in pools for _ in range(pool.num_workers * pool.kind.parallel.pipeline)),
        reverse=True,
    )
    for width in widths:
        node = next((number for number, room in enumerate(free) if room >= width), None)
        if node is None:
            return False
        free[node] -= width
    return True
