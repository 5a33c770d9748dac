"""One process, several models: who hears of which worker, what each is planned as, and how a command finds its one."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest

from cluster.agent_service import Overseer, agent_service
from cluster.cache import Cluster
from cluster.following import LocalCluster
from cluster.launch import Loading
from cluster.node_agent import NodeAgent, WorkerStatus
from cluster.plan import Site, plan_cells, plan_store
from cluster.state_file import CellState, ClusterState, read_state, write_state
from cluster.supervision import State, SupervisionLimits
from contracts.cells import cells_of
from contracts.config import ClusterConfig
from contracts.control_messages import AGENT_BEAT, AgentBeat, AgentBeatReply
from contracts.errors import ConfigError
from contracts.ids import Incarnation, WorkerId
from rpc import GrpcNetwork, LiveClock
from tests.support.fake_agent import fake_plan

if TYPE_CHECKING:
    from pathlib import Path

    from contracts.messages import MemberRole
    from rpc import CallContext

PATIENCE_S = 60.0
SITE = Site(
    model_dir="m",
    model_name="m",
    coordinator_address="c:1",
    cluster_token="t",
    runtime_dir="/r",
    bind="127.0.0.1:0",
    parent_pid=None,
    allowed_cores=(0, 1, 2, 3),
    node="here",
)


class Coordinator:
    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.news = asyncio.Event()

    async def on_beat(self, beat: AgentBeat, context: CallContext) -> AgentBeatReply:
        self.states = {slot.worker_id: slot.state for slot in beat.slots}
        self.news.set()
        return AgentBeatReply(interval_s=PATIENCE_S)

    async def until(self, states: dict[str, str]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.states != states:
                self.news.clear()
                await self.news.wait()


async def test_each_coordinator_hears_of_its_own_workers_at_once(tmp_path: Path) -> None:
    pid = psutil.Process().pid
    plans = [replace(fake_plan(name, "ready", tmp_path, parent_pid=pid), starts=False) for name in ("a-0", "b-0")]
    network = GrpcNetwork(token="t")
    a, b = Coordinator(), Coordinator()
    servers = [network.server("127.0.0.1:0") for _ in range(2)]
    overseers: list[Overseer] = []
    for server, coordinator, name in zip(servers, (a, b), ("a-0", "b-0"), strict=True):
        server.register(AGENT_BEAT, coordinator.on_beat)
        overseers.append(Overseer(await server.start(), frozenset({WorkerId(name)})))
    # One that never answers is the others' business as little.
    overseers.append(Overseer("127.0.0.1:1", None))
    agent = NodeAgent(
        plans,
        limits=SupervisionLimits(stop_timeout_s=10.0),
        first_incarnation=Incarnation(1),
        log_dir=tmp_path,
        clock=LiveClock(),
        say=lambda _: None,
    )
    try:
        async with (
            agent,
            agent_service(agent, SITE, network, "127.0.0.1:0", Incarnation(7), lambda _: None, overseers=overseers),
        ):
            await a.until({"a-0": "absent"})
            await b.until({"b-0": "absent"})
            agent.start(WorkerId("b-0"))
            await b.until({"b-0": "ready"})
            assert a.states == {"a-0": "absent"}
    finally:
        for server in servers:
            await server.stop(0.1)
        await network.close()


def test_workers_of_all_models_divide_the_cores_and_have_names_of_their_own() -> None:
    pools = [{"name": "all", "role": "mixed", "workers": 2}]
    config = ClusterConfig.model_validate(
        {"models": [{"name": name, "model": "demo", "pools": pools} for name in ("a", "b")]}
    )
    cells = [
        (cell.config, replace(SITE, coordinator_address=f"{cell.name}:1", prefix=f"{cell.name}-"))
        for cell in cells_of(config)
    ]
    a, b = plan_cells(cells)
    assert [launch.worker_id for launch in (*a, *b)] == ["a-all-0", "a-all-1", "b-all-0", "b-all-1"]
    assert sorted(core for launch in (*a, *b) for core in launch.cores) == [0, 1, 2, 3]
    assert {launch.coordinator_address for launch in b} == {"b:1"}
    stores = [plan_store(*cell) for cell in cells]
    assert [store and store.worker_id for store in stores] == ["a-store-here", "b-store-here"]


# --- following ------------------------------------------------------------------------------------------


class Agent:
    def __init__(self) -> None:
        self.found: list[WorkerStatus] = []
        self.changed = asyncio.Event()

    def workers(self) -> list[WorkerStatus]:
        return self.found


def status(name: str, state: State, *, role: MemberRole = "mixed", wanted: bool = True) -> WorkerStatus:
    return WorkerStatus(
        worker_id=WorkerId(name),
        role=role,
        state=state,
        incarnation=Incarnation(1),
        pid=None,
        address=None,
        loading=Loading(what="weights") if state is State.STARTING else None,
        problem="it died" if state is State.GIVEN_UP else None,
        is_wanted=wanted,
    )


def state_of(*cells: CellState) -> ClusterState:
    return ClusterState(
        pid=1,
        base_url="http://127.0.0.1:1",
        model_name="a",
        coordinator_address="a:1",
        cluster_token="secret",
        runtime_dir="/r",
        log_dir="/r/logs",
        ready=False,
        workers=(),
        cells=cells,
    )


def cell(name: str, served_as: str = "") -> CellState:
    names = tuple(WorkerId(f"{name}-{slot}") for slot in ("all-0", "store-here"))
    return CellState(name=name, model_name=served_as or name, coordinator_address=f"{name}:1", worker_ids=names)


async def followed(path: Path, *found: WorkerStatus) -> tuple[LocalCluster, list[str]]:
    agent, said = Agent(), list[str]()
    agent.found = list(found)
    cluster = LocalCluster(agent, state_of(cell("a"), cell("b")), [path], LiveClock(), said.append)  # type: ignore[arg-type]
    watch = asyncio.create_task(cluster.watch())
    for _ in range(3):
        agent.changed.set()
        await asyncio.sleep(0)
    watch.cancel()
    return cluster, said


async def test_a_model_that_sleeps_is_not_waited_for_nor_its_store(tmp_path: Path) -> None:
    sleeping = (status("b-all-0", State.NEW, wanted=False), status("b-store-here", State.STARTING, role="store"))
    cluster, _ = await followed(tmp_path / "s", status("a-all-0", State.STARTING), *sleeping)
    assert not cluster.ready.is_set()
    cluster, said = await followed(tmp_path / "s", status("a-all-0", State.READY), *sleeping)
    assert cluster.ready.is_set()
    assert read_state(tmp_path / "s").ready
    assert cluster.model_names == ["a", "b (asleep)"]
    assert said == ["b-store-here: loading weights"]


async def test_one_models_trouble_is_its_own(tmp_path: Path) -> None:
    cluster, said = await followed(tmp_path / "s", status("a-all-0", State.READY), status("b-all-0", State.GIVEN_UP))
    assert said == ["b: the remaining workers cannot serve; given up were b-all-0 (mixed): it died"]
    assert (cluster.hopeless.is_set(), cluster.ready.is_set()) == (False, True)
    assert read_state(tmp_path / "s").ready
    cluster, _ = await followed(tmp_path / "s", status("a-all-0", State.GIVEN_UP), status("b-all-0", State.GIVEN_UP))
    assert cluster.hopeless.is_set()
    assert cluster.problem is not None
    assert cluster.problem.startswith("a: the remaining workers cannot serve")


# --- commands -------------------------------------------------------------------------------------------


def test_a_command_finds_its_model_by_name_or_by_worker(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_state(path, state_of(cell("a"), cell("b", "org/b")))
    for found in (
        Cluster.of_state(path, "b"),
        Cluster.of_state(path, "org/b"),
        Cluster.of_state(path, worker="b-all-0"),
    ):
        assert (found.coordinator, found.model) == ("b:1", "org/b")
    assert [one.coordinator for one in Cluster.all_of_state(path)] == ["a:1", "b:1"]
    for ask, complaint in (
        ({}, r"which model\? Give --model; there are a, org/b"),
        ({"model": "c"}, "no model 'c' is served here"),
        ({"worker": "c-0"}, "no model has a worker 'c-0'"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            Cluster.of_state(path, **ask)


def test_of_one_model_alone_nothing_has_to_be_said(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_state(path, state_of())
    assert Cluster.of_state(path, worker="whatever-0") == Cluster.all_of_state(path)[0] == Cluster.of_state(path, "a")
    assert Cluster.of_state(path).model is None
    with pytest.raises(ConfigError, match="this cluster serves a"):
        Cluster.of_state(path, "b")
