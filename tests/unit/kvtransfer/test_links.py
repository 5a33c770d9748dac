"""Which way KV takes: the pure choice, the probe over real pools, and the set that routes pulls."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError, IncompatiblePeer, NoCapacity, WorkerUnavailable
from contracts.ids import BlockId, Incarnation, WorkerId
from contracts.messages import Peer
from kvtransfer import HostPool, Ledger, LinkClass, LinkPolicy, MemoryFabric, MemoryTransport, Prober, TransportSet
from kvtransfer.links import TYPICAL_BYTES, Measured, best_of, choose, shortfall
from kvtransfer.memory import PullFate, PullInfo
from kvtransfer.transport_set import ROUNDS_TO_REFUSE
from simulator import VirtualClock, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator import Program

RDMA = LinkClass(name="RDMA", bandwidth_bytes_per_s=5e9, latency_s=0.001)
#: What 64 KiB at once can show on a link with 0.1 ms of latency.
QUICK = LinkClass(name="quick", bandwidth_bytes_per_s=1e9, latency_s=0.001)
HOLDER = Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(1), address="p0:1")

measurements = st.lists(
    st.builds(
        Measured,
        transport=st.sampled_from(["a", "b", "c"]),
        bandwidth_bytes_per_s=st.none() | st.floats(1e3, 1e12),
        latency_s=st.floats(1e-6, 10.0),
        problem=st.just("no answer"),
    ),
    min_size=1,
    max_size=3,
    unique_by=lambda measured: measured.transport,
)
policies = st.builds(
    LinkPolicy, classes=st.sampled_from([{}, {"a": RDMA}, {"a": RDMA, "b": RDMA}]), allow_slow=st.booleans()
)


def measured(transport: str, gigabytes_per_s: float, latency_ms: float = 0.1) -> Measured:
    return Measured(transport=transport, bandwidth_bytes_per_s=gigabytes_per_s * 1e9, latency_s=latency_ms / 1e3)


@given(measurements, policies)
def test_the_choice_is_the_fastest_acceptable_one(found: list[Measured], policy: LinkPolicy) -> None:
    choice = choose(found, policy)
    fits = [each for each in found if shortfall(each, policy.classes.get(each.transport)) is None]
    if policy.allow_slow and not fits:
        fits = [each for each in found if each.bandwidth_bytes_per_s is not None]
    if not fits:
        assert choice.transport is None
        assert all(each.transport in choice.reason for each in found)
        return
    best = next(each for each in found if each.transport == choice.transport)
    assert best in fits
    assert all(best.typical_s <= each.typical_s for each in fits)


def test_a_transport_five_times_under_its_class_is_refused_by_name() -> None:
    policy = LinkPolicy(classes={"ucx": RDMA})
    choice = choose([measured("ucx", 0.9)], policy)
    assert choice.transport is None
    assert "ucx: 0.900 GB/s is less than a fifth of the 5 GB/s of RDMA" in choice.reason
    late = choose([measured("ucx", 5.0, latency_ms=6.0)], policy)
    assert "6.0 ms a block is more than five times the 1 ms of RDMA" in late.reason
    allowed = choose([measured("ucx", 0.9)], LinkPolicy(classes={"ucx": RDMA}, allow_slow=True))
    assert allowed.transport == "ucx"
    assert "allowed though slow" in allowed.reason


def test_small_blocks_over_a_slow_start_lose_to_a_quick_one() -> None:
    choice = choose([measured("wide", 8.0, latency_ms=50), measured("quick", 4.0, latency_ms=0.1)], LinkPolicy())
    assert choice.transport == "quick"
    assert "wide: 8.00 GB/s, 50.00 ms a block" in choice.reason
    assert choice.notes == {"wide": "slower than quick"}
    assert TYPICAL_BYTES / 4e9 < 0.05


def test_the_best_of_all_measurements_counts() -> None:
    failed = Measured(transport="ucx", problem="no answer")
    both = best_of(measured("ucx", 3.0, latency_ms=9.0), measured("ucx", 1.0, latency_ms=0.5))
    assert both == measured("ucx", 3.0, latency_ms=0.5)
    assert best_of(None, failed) == best_of(failed, failed) == failed
    assert best_of(failed, both) == best_of(both, failed) == both


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no transport is common"):
        choose([], LinkPolicy())


# --- probing and routing, on a virtual clock --------------------------------------------------------------


class Named(MemoryTransport):
    """An in-memory transport of another name, over a fabric of its own."""

    def __init__(self, fabric: MemoryFabric, name: str, who: str, number: int) -> None:
        super().__init__(fabric, who, number)
        self.name = name


def pair(name: str, fate: Callable[[PullInfo], PullFate], pools: tuple[HostPool, HostPool]) -> tuple[Named, Named]:
    fabric = MemoryFabric(fate)
    holder, reader = Named(fabric, name, "p", 0), Named(fabric, name, "d", 1)
    holder.register(pools[0])
    reader.register(pools[1])
    return holder, reader


def link(gigabytes_per_s: float) -> Callable[[PullInfo], PullFate]:
    return lambda info: PullFate(duration_s=1e-4 + info.num_bytes / (gigabytes_per_s * 1e9))


def pools() -> tuple[HostPool, HostPool]:
    return HostPool(64, 4096), HostPool(64, 4096)


def test_probe_settles_the_way_and_leaves_the_ledger_clean() -> None:
    async def main(program: Program) -> None:
        both = pools()
        slow, fast = pair("slow", link(0.1), both), pair("fast", link(2.0), both)
        transports = TransportSet((slow[1], fast[1]))
        endpoints = {"slow": slow[0].endpoint(), "fast": fast[0].endpoint()}
        ledger, settled = Ledger(64), list[int]()
        prober = Prober(ledger, VirtualClock(), block_bytes=4096, on_settled=lambda: settled.append(1))
        choice = await transports.probe(HOLDER, endpoints, 64, prober)
        assert choice.transport == "fast"
        assert ledger.available_blocks == 64
        assert settled
        both[0].view()[:4] = b"abcd"
        result = await transports.pull(HOLDER, endpoints, [(BlockId(0), BlockId(3))]).wait()
        assert result.error is None
        assert bytes(both[1].view()[3 * 4096 : 3 * 4096 + 4]) == b"abcd"
        (tally,) = transports.tallies()
        assert (tally.transport, tally.outcome, tally.count, tally.num_bytes) == ("fast", "ok", 1, 4096)
        assert [(each.transport, each.chosen) for each in transports.links()] == [("slow", False), ("fast", True)]
        transports.forget(HOLDER.worker_id, HOLDER.incarnation)
        assert not transports.is_probed(HOLDER.worker_id, HOLDER.incarnation)

    run(main, seed=1)


def test_a_probe_that_does_not_end_keeps_its_scratch_blocks_in_quarantine() -> None:
    async def main(program: Program) -> None:
        stuck = pair("stuck", lambda info: PullFate(duration_s=60.0, heeds_stop=False), pools())
        transports = TransportSet((stuck[1],), LinkPolicy(allow_slow=True))
        ledger = Ledger(64)
        prober = Prober(ledger, VirtualClock(), block_bytes=4096, on_settled=lambda: None)
        with pytest.raises(WorkerUnavailable, match="took longer than"):
            await transports.probe(HOLDER, {"stuck": stuck[0].endpoint()}, 64, prober)
        assert ledger.load()["quarantined_blocks"] == 16
        assert transports.refusal(HOLDER) is None
        assert not transports.is_probed(HOLDER.worker_id, HOLDER.incarnation)
        await asyncio.sleep(61.0)
        assert ledger.available_blocks == 64
        ledger.check()
        await prober.close()

    run(main, seed=1)


def test_a_holder_whose_ways_are_all_too_slow_is_refused_until_it_is_measured_again() -> None:
    async def main(program: Program) -> None:
        speed = [0.5]
        both = pools()
        holder, reader = pair("ucx", lambda info: link(speed[0])(info), both)
        transports = TransportSet((reader,), LinkPolicy(classes={"ucx": RDMA}))
        prober = Prober(Ledger(64), VirtualClock(), block_bytes=4096, on_settled=lambda: None)
        for _ in range(ROUNDS_TO_REFUSE):
            assert transports.refusal(HOLDER) is None, "one slow round proves nothing"
            assert not transports.is_probed(HOLDER.worker_id, HOLDER.incarnation)
            assert (await transports.probe(HOLDER, {"ucx": holder.endpoint()}, 64, prober)).transport is None
        assert "no transport to p0 is fast enough: ucx: " in (transports.refusal(HOLDER) or "")
        speed[0] = 1000.0
        reader_of_quick = TransportSet((reader,), LinkPolicy(classes={"ucx": QUICK}))
        assert (await reader_of_quick.probe(HOLDER, {"ucx": holder.endpoint()}, 64, prober)).transport == "ucx"
        assert reader_of_quick.refusal(HOLDER) is None

    run(main, seed=1)


def test_a_full_pool_learns_nothing() -> None:
    async def main(program: Program) -> None:
        holder, reader = pair("memory", link(1.0), pools())
        ledger = Ledger(64)
        ledger.allocate("request", 64)
        prober = Prober(ledger, VirtualClock(), block_bytes=4096, on_settled=lambda: None)
        transports = TransportSet((reader,))
        with pytest.raises(NoCapacity):
            await transports.probe(HOLDER, {"memory": holder.endpoint()}, 64, prober)
        assert transports.refusal(HOLDER) is None
        assert not transports.is_probed(HOLDER.worker_id, HOLDER.incarnation)

    run(main, seed=1)


def test_an_unmeasured_holder_is_reached_by_the_first_way_that_connects() -> None:
    async def main(program: Program) -> None:
        both = pools()
        near, far = pair("near", link(5.0), both), pair("far", link(0.5), both)
        transports = TransportSet((near[1], far[1]))
        endpoints = {"near": near[0].endpoint(), "far": far[0].endpoint()}
        near[0].crash()
        pull = transports.pull(HOLDER, endpoints, [(BlockId(0), BlockId(1))])
        assert (await pull.wait()).error is None
        (tally,) = transports.tallies()
        assert tally.transport == "far"
        far[0].crash()
        lost = await transports.pull(HOLDER, endpoints, [(BlockId(0), BlockId(1))]).wait()
        assert isinstance(lost.error, WorkerUnavailable)
        unknown = Peer(worker_id=WorkerId("p1"), incarnation=Incarnation(1), address="p1:1")
        nowhere = await transports.pull(unknown, endpoints, [(BlockId(0), BlockId(1))]).wait()
        assert isinstance(nowhere.error, WorkerUnavailable)
        assert "near: " in nowhere.error.message
        assert "far: " in nowhere.error.message
        foreign = await transports.pull(unknown, {"other": b""}, [(BlockId(0), BlockId(1))]).wait()
        assert isinstance(foreign.error, IncompatiblePeer)
        assert "near, far here, other there" in foreign.error.message

    run(main, seed=1)


def test_a_pull_stopped_before_its_way_is_known_moves_nothing() -> None:
    async def main(program: Program) -> None:
        both = pools()
        near, far = pair("near", link(5.0), both), pair("far", link(0.5), both)
        transports = TransportSet((near[1], far[1]))
        both[0].view()[0] = 7
        endpoints = {"near": near[0].endpoint(), "far": far[0].endpoint()}
        pull = transports.pull(HOLDER, endpoints, [(BlockId(0), BlockId(0))])
        pull.request_stop()
        assert (await pull.wait()).error is not None
        assert both[1].view()[0] == 0

    run(main, seed=1)


def test_a_new_life_replaces_the_old_one() -> None:
    async def main(program: Program) -> None:
        holder, reader = pair("memory", link(1.0), pools())
        transports = TransportSet((reader,))
        endpoints = {"memory": holder.endpoint()}
        for incarnation in range(1, 100):
            peer = Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(incarnation), address="p0:1")
            await transports.pull(peer, endpoints, [(BlockId(0), BlockId(0))]).wait()
        assert repr(transports) == "<TransportSet memory | 1 holders>"

    run(main, seed=1)
