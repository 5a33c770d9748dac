"""Conductors over made-up workers, for tests of what they decide."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.latency_models import CostCurve, FittedLatency
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import DispatchItem, WorkerInfo, WorkerLoad
from contracts.transfer_models import LinkTransfer
from coordinator.conductor import Conductor, ConductorSettings
from coordinator.costs import WorkerCosts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.latency import LatencyModel
    from contracts.messages import LatencyFit, MemberRole
    from coordinator.policy.pair_links import PairLinks
    from workload.slo import SloClass

ROLES: dict[str, MemberRole] = {"p": "prefill", "d": "decode", "m": "mixed", "s": "store"}
BLOCK_TOKENS = 16
LAYOUT = BlockLayout(num_layers=2, num_kv_heads=2, head_dim=16, block_tokens=BLOCK_TOKENS, dtype="float32")

#: A prompt token takes 1 ms, a decode step 10 ms and 1 ms for each answer in it, whatever the context; all numbers in
#: it are sums of powers of two, so that sums of seconds are exact.
MILLI = 2.0**-10
PLAIN = FittedLatency(
    prefill=CostCurve.line(0.0, MILLI), pair_s=0.0, decode=CostCurve.line(10 * MILLI, MILLI), context_token_s=0.0
)


def identity(fingerprint: str = "m") -> KvIdentity:
    return KvIdentity(model_fingerprint=fingerprint, layout=LAYOUT, rope_base=10000.0, protocol_version=1)


def info_of(
    name: str,
    *,
    role: MemberRole | None = None,
    fingerprint: str = "m",
    blocks: int = 1000,
    max_context_tokens: int = 8192,
) -> WorkerInfo:
    """The role by the first letter of the name where none is given."""
    return WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(1),
        role=role or ROLES[name[0]],
        address=f"{name}:1",
        model="m",
        identity=identity(fingerprint),
        total_blocks=blocks,
        max_context_tokens=min(max_context_tokens, blocks * BLOCK_TOKENS),
    )


@dataclass(slots=True)
class Costs:
    """A `CostSource`: the same for all workers, but for those named."""

    common: WorkerCosts | None = field(default_factory=lambda: WorkerCosts(latency=PLAIN, max_batch_tokens=512))
    named: dict[str, WorkerCosts | None] = field(default_factory=dict[str, "WorkerCosts | None"])
    transfer: LinkTransfer = field(default_factory=lambda: LinkTransfer(latency_s=0.0, bandwidth_bytes_s=2.0**40))
    kv_token_bytes: int = 1024
    pairs: PairLinks | None = None

    def of(self, info: WorkerInfo) -> WorkerCosts | None:
        return self.named.get(info.worker_id, self.common)

    def observe(self, info: WorkerInfo, fit: LatencyFit) -> bool:
        del info, fit
        return False


def costs_of(latency: LatencyModel, max_batch_tokens: int = 512) -> Costs:
    return Costs(common=WorkerCosts(latency=latency, max_batch_tokens=max_batch_tokens))


def conductor_of(
    workers: Iterable[str | tuple[WorkerInfo, WorkerLoad]],
    *,
    costs: Costs | None = None,
    slos: Iterable[SloClass] = (),
    default_slo: str | None = None,
    settings: ConductorSettings | None = None,
    seed: int = 0,
    now_s: float = 0.0,
) -> Conductor:
    """Workers by name, idle, or with what they have reported at `now_s`."""
    made = Conductor(
        costs=costs or Costs(),
        slos={slo.name: slo for slo in slos},
        default_slo=default_slo,
        settings=settings or ConductorSettings(),
        rng=random.Random(seed),
    )
    for worker in workers:
        if isinstance(worker, str):
            info, load = info_of(worker), None
        else:
            info, load = worker
        made.add(info, now_s)
        if load is None:
            load = WorkerLoad(free_blocks=info.total_blocks)
        made.report(info.worker_id, load, now_s)
    return made


def item_of(
    prompt_tokens: int = 100,
    max_tokens: int = 16,
    *,
    name: str = "r",
    avoid: Iterable[str] = (),
    blocks: Iterable[int] = (),
    slo_class: str = "",
    priority: int = 0,
    waited_s: float = 0.0,
    was_accepted: bool = False,
) -> DispatchItem:
    return DispatchItem(
        request_id=RequestId(name),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        avoid=tuple(WorkerId(each) for each in avoid),
        slo_class=slo_class,
        priority=priority,
        block_keys=hints_of(blocks).tobytes(),
        waited_s=waited_s,
        was_accepted=was_accepted,
    )


def hints_of(blocks: Iterable[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array([block + 1 for block in blocks], np.uint64)


def hold(conductor: Conductor, name: str, blocks: Iterable[int]) -> None:
    """The worker's prefix cache has these blocks."""
    conductor.directory.store(conductor.number_of(WorkerId(name)), hints_of(blocks))
