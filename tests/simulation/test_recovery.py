"""The coordinator's knowledge is soft: killed, cut off or half deaf, it knows again who is there and what they hold.

Sixty-four workers without engines, on virtual time; and a small cluster with modelled ones under flapping partitions.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.ids import Incarnation, WorkerId
from contracts.messages import WorkerInfo
from coordinator import CoordinatorShell
from rpc import MemoryNetwork
from simulator import Program, run
from simulator.chaos.witness import Witness
from simulator.cluster import COORDINATOR_HOST, GATEWAY_HOST, ClusterSpec, SimulatedCluster
from simulator.engine import modelled_identity
from simulator.faults.clocks import MachineClock, ProcessClock
from simulator.faults.network import FaultyNetwork, SoundLink
from simulator.faults.rules import ANY, Between, Duplication, Link, Loss, Partition, Reordering
from tests.support.light_worker import LightWorker
from tests.support.workload import ask_for, check, check_books, serve, workload
from worker.watchdog import LifeOver

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from contracts.messages import Role
    from rpc.memory import MemoryProcess
    from simulator.faults.rules import Rule

NUM_WORKERS = 64
ADDRESS = f"{COORDINATOR_HOST}:1"
#: From when a new coordinator listens until it knows everything.
RECOVERY_S = 2.0
#: Of one prompt that workers hold in part or whole.
CHAIN_BLOCKS = 40


class Town:
    """A coordinator and light workers on one network. What workers hold changes all the time while they `bustle`."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._rng = program.rng("town")
        link = SoundLink()
        self.faults = FaultyNetwork(program, latency_s=link.message_delay_s, fate=link.pull_fate)
        self._network = MemoryNetwork(rng=program.rng("network"), latency_s=self.faults.message_fate, host="observer")
        self._chains = [[self._rng.randbytes(8) for _ in range(self._rng.randint(1, CHAIN_BLOCKS))] for _ in range(300)]
        self._clock = ProcessClock(MachineClock(), offset_s=7.0)
        self.workers: dict[str, LightWorker] = {}
        #: Lives that ended because the coordinator had given them up.
        self.fenced: list[str] = []
        self.shell: CoordinatorShell
        self._coordinator: tuple[MemoryProcess, asyncio.Task[None]] | None = None

    async def start_coordinator(self) -> None:
        process = self._network.process(COORDINATOR_HOST)
        server = process.server(ADDRESS)
        self.shell = CoordinatorShell(self._clock, log=self._program.trace.add)
        self.shell.register_on(server)
        self._coordinator = (process, asyncio.create_task(_keep_open(self.shell)))
        await server.start()

    async def crash_coordinator(self) -> None:
        assert self._coordinator is not None, "it is down"
        process, task = self._coordinator
        self._coordinator = None
        process.kill()
        task.cancel()
        await asyncio.wait([task])

    async def live(self, name: str) -> None:
        """One worker, life after life."""
        incarnation = 0
        while True:
            incarnation += 1
            info = WorkerInfo(
                worker_id=WorkerId(name),
                incarnation=Incarnation(incarnation),
                role=self._rng.choice(["prefill", "decode"]),
                address=f"{name}:1",
                model="m",
                identity=modelled_identity(),
                total_blocks=400,
                max_context_tokens=4096,
            )
            worker = LightWorker(
                info,
                self._network.process(name),
                ADDRESS,
                ProcessClock(MachineClock(drift=self._rng.uniform(-2e-4, 2e-4)), offset_s=1000.0 * incarnation),
                log=lambda line: None,
            )
            self.workers[name] = worker
            for _ in range(5):
                self._change(worker)
            try:
                await worker.run()
            except* LifeOver:
                self.fenced.append(f"{name}@{incarnation}")
            await asyncio.sleep(0.5)

    async def bustle(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(0.03)
            self._change(self._rng.choice([*self.workers.values()]))

    def _change(self, worker: LightWorker) -> None:
        worker.hold(self._rng.choice(self._chains))
        if self._rng.random() < 0.2:
            worker.forget(self._rng.randint(1, 400))

    # --- what the coordinator knows ---

    def suspects(self) -> set[str]:
        return {*self.shell.membership.standing(self._clock.now_s()).suspects}

    def complaints(self) -> list[str]:
        """Where it differs from the truth."""
        fleet = self.shell.fleet()
        known = {info.worker_id: info.incarnation for info in fleet.infos}
        there = {worker.info.worker_id: worker.info.incarnation for worker in self.workers.values()}
        if known != there:
            return [f"lives: {sorted(set(known.items()) ^ set(there.items()))}"]
        expected: dict[bytes, set[str]] = defaultdict(set)
        for name, worker in self.workers.items():
            for hint in worker.held():
                expected[hint].add(name)
        numbers = self.shell.conductor.fleet.numbers()
        found: list[str] = []
        for hint in {hint for chain in self._chains for hint in chain}:
            counts = self.shell.conductor.directory.match(np.frombuffer(hint, np.uint64)).counts
            holders = {str(info.worker_id) for info, number in zip(fleet.infos, numbers, strict=True) if counts[number]}
            if holders != expected[hint]:
                found.append(f"block {hint.hex()}: held by {expected[hint]}, said to be held by {holders}")
        return found


async def _keep_open(shell: CoordinatorShell) -> None:
    async with shell:
        await asyncio.Event().wait()


@asynccontextmanager
async def town(program: Program, num_workers: int = NUM_WORKERS) -> AsyncGenerator[Town]:
    """Its workers start within a second, and all hold something."""
    made = Town(program)
    rng = program.rng("starts")
    await made.start_coordinator()
    lives: list[asyncio.Task[None]] = []
    for number in range(num_workers):
        lives.append(asyncio.create_task(made.live(f"w{number:02d}")))
        await asyncio.sleep(rng.uniform(0.0, 2.0 / num_workers))
    try:
        yield made
    finally:
        for life in lives:
            life.cancel()
        await asyncio.wait(lives)
        await made.crash_coordinator()


@asynccontextmanager
async def bustling(place: Town) -> AsyncGenerator[None]:
    task = asyncio.create_task(place.bustle())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


@pytest.mark.parametrize("seed", range(2))
def test_a_new_coordinator_knows_64_workers_and_all_their_blocks_within_two_seconds(seed: int) -> None:
    async def main(program: Program) -> None:
        async with town(program) as place:
            for _ in range(2):
                async with bustling(place):
                    await asyncio.sleep(program.rng("when").uniform(1.0, 4.0))
                    await place.crash_coordinator()
                    await asyncio.sleep(program.rng("how long").uniform(0.1, 6.0))
                    await place.start_coordinator()
                await asyncio.sleep(RECOVERY_S)
                assert place.complaints() == []
                assert place.shell.directory_sync.snapshots_total == NUM_WORKERS
            assert place.fenced == []

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_what_is_held_is_known_however_messages_fare(seed: int) -> None:
    """Lost, repeated and overtaken, and the coordinator begins anew meanwhile."""
    everywhere = Link(ANY, ANY)
    rules: list[Rule] = [
        Loss(everywhere, 0.03),
        Duplication(everywhere, 0.2, within_s=1.0),
        Reordering(everywhere, 0.3, within_s=0.3),
    ]

    async def main(program: Program) -> None:
        async with town(program, 16) as place:
            for rule in rules:
                place.faults.add(rule)
            async with bustling(place):
                await asyncio.sleep(8.0)
                await place.crash_coordinator()
                await asyncio.sleep(1.0)
                await place.start_coordinator()
                await asyncio.sleep(8.0)
            place.faults.heal()
            # A call that was lost ends after 1 s; its repeat waits for up to 2 s.
            await asyncio.sleep(6.0)
            assert place.complaints() == []

    run(main, seed=seed)


def test_replies_that_are_lost_cost_nothing() -> None:
    """The other direction works: heartbeats are heard, events are applied once, however often they are told."""

    async def main(program: Program) -> None:
        async with town(program, 8) as place:
            await asyncio.sleep(2.0)
            cut = [Partition(Link(COORDINATOR_HOST, name)) for name in ("w00", "w01", "w02")]
            async with bustling(place):
                for rule in cut:
                    place.faults.add(rule)
                await asyncio.sleep(10.0)
                assert place.suspects() == set()
                for rule in cut:
                    place.faults.remove(rule)
                await asyncio.sleep(1.0)
            await asyncio.sleep(6.0)
            assert place.fenced == []
            assert place.complaints() == []

    run(main, seed=1)


def test_who_is_not_heard_is_suspect_then_gone_and_begins_anew() -> None:
    async def main(program: Program) -> None:
        async with town(program, 8) as place:
            await asyncio.sleep(2.0)
            cut = Partition(Link("w03", COORDINATOR_HOST))
            place.faults.add(cut)
            await asyncio.sleep(2.2)
            assert place.suspects() == {"w03"}
            assert len(place.shell.fleet().infos) == 8
            await asyncio.sleep(1.8)
            assert "w03" not in {info.worker_id for info in place.shell.fleet().infos}
            assert place.fenced == [], "it has not heard of it"
            await asyncio.sleep(3.0)
            place.faults.remove(cut)
            await asyncio.sleep(5.0)
            assert place.fenced == ["w03@1"]
            assert place.complaints() == []
            others = [worker for name, worker in place.workers.items() if name != "w03"]
            assert {life.worker_id for worker in others for life in worker.gone} == {"w03"}

    run(main, seed=1)


@pytest.mark.parametrize(("cut_s", "are_ended"), [(1.2, False), (4.5, True)])
@pytest.mark.parametrize("one_way", [True, False])
def test_flapping_links_leave_one_life_of_each_worker(cut_s: float, are_ended: bool, one_way: bool) -> None:
    """Short cuts make suspects and end nobody; long ones end lives, and each worker's next one takes its place."""

    async def main(program: Program) -> None:
        async with town(program, 12) as place:
            await asyncio.sleep(2.0)
            flapping = ["w01", "w05", "w09"]
            were_suspect: set[str] = set()
            async with bustling(place):
                for _ in range(4):
                    rules: list[Rule] = [
                        Partition(Link(name, COORDINATOR_HOST) if one_way else Between(name, COORDINATOR_HOST))
                        for name in flapping
                    ]
                    for rule in rules:
                        place.faults.add(rule)
                    for _ in range(round(cut_s / 0.1)):
                        await asyncio.sleep(0.1)
                        were_suspect |= place.suspects()
                        known = [info.worker_id for info in place.shell.fleet().infos]
                        assert len(known) == len(set(known))
                    for rule in rules:
                        place.faults.remove(rule)
                    await asyncio.sleep(5.0)
            await asyncio.sleep(5.0)
            assert place.complaints() == []
            assert {life.split("@")[0] for life in place.fenced} == (set(flapping) if are_ended else set())
            assert len(place.fenced) == len(set(place.fenced)), "a life ends once"
            assert (were_suspect == set(flapping)) or not are_ended

    run(main, seed=3)


# --- with engines and requests --------------------------------------------------------------------------

TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}

FLAPPING: dict[str, Link | Between] = {
    "coordinator hears no worker": Link("d0", COORDINATOR_HOST),
    "worker hears no coordinator": Link(COORDINATOR_HOST, "d0"),
    "gateway hears no coordinator": Link(COORDINATOR_HOST, GATEWAY_HOST),
    "gateway hears no worker": Link("d0", GATEWAY_HOST),
    "worker hears no gateway": Link(GATEWAY_HOST, "p0"),
    "coordinator and everybody": Between(COORDINATOR_HOST, ANY),
}


@pytest.mark.parametrize("what", FLAPPING)
@pytest.mark.parametrize("seed", range(2))
def test_no_token_is_owned_twice_under_flapping_partitions(what: str, seed: int) -> None:
    """Whoever believes itself alive meanwhile: each answer has each token once and right, or is an error."""

    async def main(program: Program) -> None:
        link = SoundLink()
        spec = ClusterSpec(
            roles=TWO_OF_EACH, latency_s=link.message_delay_s, fate=link.pull_fate, clock_drift=200e-6, lease_ttl_s=5.0
        )
        witness = Witness()
        async with SimulatedCluster(program, spec, witness) as cluster:
            asks = workload(program.rng("load"), count=40, over_s=16.0, output=60)
            asking = [asyncio.create_task(ask_for(cluster, ask)) for ask in asks]
            rng = program.rng("flaps")
            for _ in range(4):
                await asyncio.sleep(rng.uniform(0.3, 2.0))
                cut = Partition(FLAPPING[what])
                cluster.network.add(cut)
                await asyncio.sleep(rng.choice([0.7, 1.8, 4.0]))
                cluster.network.remove(cut)
            answers = await asyncio.gather(*asking)
            for answer in answers:
                check(answer)
            assert any(answer.finish == "length" for answer in answers)
            await asyncio.sleep(30.0)
            await check_books(cluster)
            assert witness.problems == []
            again = await serve(program, cluster, workload(program.rng("again"), count=5, over_s=1.0))
            assert all(answer.error is None for answer in again)

    run(main, seed=seed)


def test_recoveries_repeat() -> None:
    def digest() -> str:
        async def main(program: Program) -> str:
            async with town(program, 8) as place:
                await asyncio.sleep(1.0)
                await place.crash_coordinator()
                await asyncio.sleep(2.0)
                await place.start_coordinator()
                await asyncio.sleep(RECOVERY_S)
                return program.trace.digest()

        return run(main, seed=5)

    assert digest() == digest()
