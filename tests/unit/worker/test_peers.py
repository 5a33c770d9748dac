"""Which members a worker measures, and which store it uses."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from contracts.errors import WorkerUnavailable
from contracts.ids import Incarnation, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import DescribeReply, Member, MembersReply, Peer, WorkerInfo, WorkerLoad
from simulator import Program, VirtualClock, run
from worker.peers import EAGER_INTERVAL_S, PeerWatch, nearest_store

if TYPE_CHECKING:
    from contracts.messages import MemberRole

IDENTITY = KvIdentity(
    model_fingerprint="m",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=4, dtype="float32"),
    rope_base=10000.0,
    protocol_version=1,
)
LOAD = WorkerLoad(
    free_blocks=8, owned_blocks=0, offered_blocks=0, reserved_blocks=0, cached_blocks=0, quarantined_blocks=0
)


def info(name: str, role: MemberRole, *, node: str = "", incarnation: int = 1, model: str = "m") -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(incarnation),
        role=role,
        address=f"{name}:{incarnation}",
        model="m",
        identity=msgspec.structs.replace(IDENTITY, model_fingerprint=model),
        total_blocks=8,
        max_context_tokens=64,
        node=node,
    )


def member(each: WorkerInfo) -> Member:
    return Member(info=each, load=LOAD, heartbeat_age_s=0.0)


@pytest.mark.parametrize(
    ("stores", "expected"),
    [
        ([], None),
        ([info("s1", "store", node="b"), info("s0", "store", node="a")], "s1"),
        ([info("s1", "store", node="x"), info("s0", "store", node="y")], "s0"),
        ([info("s0", "store", node="b", model="other"), info("s1", "store", node="c")], "s1"),
        ([info("s0", "store", node="b", model="other")], None),
        ([info("b0", "mixed", node="b")], None),
    ],
)
def test_the_store_of_the_own_machine_goes_before_the_first_by_id(
    stores: list[WorkerInfo], expected: str | None
) -> None:
    found = nearest_store(info("d0", "decode", node="b"), [member(each) for each in stores])
    assert (None if found is None else found.worker_id) == expected


def test_machines_without_a_name_are_not_the_same_machine() -> None:
    stores = [member(info("s1", "store")), member(info("s0", "store", node="a"))]
    found = nearest_store(info("d0", "decode"), stores)
    assert found == Peer(worker_id=WorkerId("s0"), incarnation=Incarnation(1), address="s0:1")


class Cluster:
    """Coordinator, peers, and what measures the ways to them, in one."""

    def __init__(self, members: list[WorkerInfo]) -> None:
        self.members = members
        self.answers = True
        self.probed: list[str] = []

    def channel(self, address: str) -> Cluster:
        return self

    async def call(self, method: Any, body: Any, *, timeout_s: float) -> Any:
        if not self.answers:
            raise WorkerUnavailable("nobody answers")
        if hasattr(body, "target"):
            return DescribeReply(identity=IDENTITY, num_blocks=8, endpoints={})
        return MembersReply(members=tuple(member(each) for each in self.members))

    def is_probed(self, worker_id: WorkerId, incarnation: Incarnation) -> bool:
        return f"{worker_id}@{incarnation}" in self.probed

    async def probe(self, peer: Peer, endpoints: object, num_blocks: int, prober: object) -> Any:
        self.probed.append(f"{peer.worker_id}@{peer.incarnation}")

        class Choice:
            transport = "shm"
            reason = "shm"

        return Choice()


def watch_of(cluster: Cluster, own: WorkerInfo, stores: list[Peer | None], **options: Any) -> PeerWatch:
    return PeerWatch(
        info=own,
        network=cast("Any", cluster),
        coordinator_address="coordinator:1",
        transports=cast("Any", cluster),
        prober=cast("Any", None),
        clock=VirtualClock(),
        on_store=stores.append,
        log=lambda line: None,
        **options,
    )


EVERYBODY = [
    info("p0", "prefill"),
    info("p1", "prefill"),
    info("d0", "decode"),
    info("d1", "decode"),
    info("m0", "mixed"),
    info("m1", "mixed"),
    info("s0", "store"),
    info("s1", "store"),
]


@pytest.mark.parametrize(
    ("own", "fetches", "expected"),
    [
        ("p0", True, {"p1", "d0", "d1", "m0", "m1", "s0", "s1"}),
        ("p0", False, set[str]()),
        ("d0", True, {"p0", "p1", "m0", "m1"}),
        ("d0", False, {"p0", "p1", "m0", "m1"}),
        ("m0", True, {"p0", "p1", "d0", "d1", "m1", "s0", "s1"}),
        ("m0", False, {"p0", "p1", "m1"}),
        ("s0", True, {"p0", "p1", "d0", "d1", "m0", "m1"}),
    ],
)
def test_whoever_takes_kv_from_others_measures_the_way_to_them_once(
    own: str, fetches: bool, expected: set[str]
) -> None:
    async def main(program: Program) -> None:
        cluster = Cluster(EVERYBODY)
        mine = next(each for each in EVERYBODY if each.worker_id == own)
        task = asyncio.create_task(watch_of(cluster, mine, [], fetches=fetches).run())
        await asyncio.sleep(10 * EAGER_INTERVAL_S)
        task.cancel()
        assert sorted(cluster.probed) == sorted(f"{name}@1" for name in expected)

    run(main, seed=0)


def test_the_store_is_told_also_where_nothing_is_measured_and_stays_while_nobody_answers() -> None:
    async def main(program: Program) -> None:
        cluster = Cluster(EVERYBODY)
        stores: list[Peer | None] = []
        task = asyncio.create_task(watch_of(cluster, info("d0", "decode"), stores, fetches=True, probes=False).run())
        await asyncio.sleep(1.0)
        assert cluster.probed == []
        assert {None if store is None else store.worker_id for store in stores} == {"s0"}
        cluster.answers = False
        stores.clear()
        await asyncio.sleep(10.0)
        assert stores == []
        cluster.answers = True
        cluster.members = [info("s0", "store", incarnation=2)]
        await asyncio.sleep(1.0)
        assert stores[-1] == Peer(worker_id=WorkerId("s0"), incarnation=Incarnation(2), address="s0:2")
        cluster.members = []
        await asyncio.sleep(1.0)
        assert stores[-1] is None
        task.cancel()

    run(main, seed=0)
