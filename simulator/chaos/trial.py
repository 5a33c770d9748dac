"""One chaos trial: a scenario played on a simulated cluster, and the verdict."""

from __future__ import annotations

import asyncio
import math
import random
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import NotReady
from contracts.failpoints import Failpoints, armed
from contracts.requests import SamplingParams
from simulator.chaos.audit import DEADLINE_SLACK_S, Auditor
from simulator.chaos.scenario import Weather, draw
from simulator.chaos.witness import Witness
from simulator.clients import Answer, Ask, ask_into
from simulator.cluster import SimulatedCluster
from simulator.loop import describe_tasks
from simulator.program import run

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from simulator.chaos.faults import Fault
    from simulator.chaos.scenario import Scenario
    from simulator.cluster import ClusterSpec
    from simulator.program import Program

#: Virtual seconds that a trial may take before it is called stuck.
LIMIT_S = 600.0
#: Turns of the loop: some twenty times what the busiest trial takes.
LIMIT_TURNS = 5_000_000
#: What a Cancel may take to be heeded where no message is lost: one that came too early is sent again after 1 s.
STRAY_LIMIT_S = 1.5
#: Asked after recovery, so often by as many clients at once as there are workers of the larger role: each is given
#: some. All must be answered.
NUM_LAST_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of one trial. Two runs of a seed give equal verdicts."""

    seed: int
    scenario: str
    #: Empty when everything held.
    problems: tuple[str, ...]
    #: SHA-256 over the event log.
    digest: str
    #: Last lines of the event log.
    log_tail: str
    #: Requests by how they ended: "finished", "cancelled", or an error's code.
    outcomes: dict[str, int]
    #: Firings of failpoints and passings of rare paths.
    counts: dict[str, int]
    virtual_s: float


def try_seed(seed: int, *, sink: Callable[[str], None] | None = None) -> Verdict:
    """Draws and plays the scenario of a seed; `sink` is given every line of the event log."""
    return play(draw(seed), sink=sink)


def play(scenario: Scenario, *, sink: Callable[[str], None] | None = None) -> Verdict:
    """Never raises for what the cluster does: whatever comes out of it is a problem of the verdict."""
    firing = Failpoints(random.Random(f"{scenario.seed}/firing"), dict(scenario.failpoints))
    trial = _Trial(scenario, firing)
    with armed(firing):
        try:
            run(trial.main, seed=scenario.seed, limit_s=LIMIT_S, limit_turns=LIMIT_TURNS, sink=sink)
        except Exception as error:
            # Anything at all: a bug's exception, a stuck program, a task that failed unheard.
            trial.problems.append("".join(traceback.format_exception(error)).rstrip())
    return Verdict(
        seed=scenario.seed,
        scenario=scenario.describe(),
        problems=tuple(trial.problems),
        digest=trial.program.trace.digest(),
        log_tail=trial.program.trace.tail(),
        outcomes=dict(sorted(Counter(_outcome(answer) for answer in trial.answers).items())),
        counts=dict(sorted(firing.counts.items())),
        virtual_s=trial.virtual_s,
    )


class _Trial:
    """The program of one trial."""

    def __init__(self, scenario: Scenario, firing: Failpoints) -> None:
        self._scenario = scenario
        self._firing = firing
        self.problems: list[str] = []
        self.answers: list[Answer] = []
        self.virtual_s = 0.0
        self.program: Program

    async def main(self, program: Program) -> None:
        self.program = program
        program.trace.add(f"{'scenario':14s} {self._scenario.describe()}")
        witness = Witness(STRAY_LIMIT_S if self._scenario.weather is Weather.CALM else math.inf)
        async with SimulatedCluster(program, self._scenario.cluster, witness) as cluster:
            auditor = Auditor(self._scenario, cluster, witness)
            watch = asyncio.create_task(auditor.watch(), name="auditor")
            try:
                await self._play(cluster, auditor)
            finally:
                self.problems.extend([*auditor.problems, *witness.problems, *cluster.broken_handlers])
                watch.cancel()
        self.virtual_s = asyncio.get_running_loop().time()
        self.problems.extend(f"left running: {line}" for line in _left_running())

    async def _play(self, cluster: SimulatedCluster, auditor: Auditor) -> None:
        strikes = [
            asyncio.create_task(self._strike(cluster, fault), name=f"fault {number}")
            for number, fault in enumerate(self._scenario.faults)
        ]
        await self._ask_all(cluster, self._scenario.asks)
        # A fault that could not end would be a bug of the trial: the limit of virtual time says so.
        await asyncio.gather(*strikes)
        self._firing.rest()
        await auditor.until_recovered()
        auditor.compare_copies()
        last = await self._ask_all(cluster, _last_asks(self.program.rng("last asks"), self._scenario.cluster))
        auditor.judge(self.answers)
        auditor.problems.extend(
            f"asked after recovery: {answer.error!r}" for answer in last if answer.error is not None
        )
        await auditor.until_recovered()
        auditor.compare_copies()

    async def _strike(self, cluster: SimulatedCluster, fault: Fault) -> None:
        await asyncio.sleep(fault.at_s)
        self._note(f"begins: {fault.describe()}")
        await fault.strike(cluster)
        self._note(f"is over: {fault.describe()}")

    async def _ask_all(self, cluster: SimulatedCluster, asks: Sequence[Ask]) -> list[Answer]:
        """Until all have ended, or have had all the time they may take."""
        answers = [Answer(ask=ask) for ask in asks]
        first = len(self.answers)
        self.answers.extend(answers)
        tasks = [
            asyncio.create_task(self._ask(cluster, number, answer), name=f"client {number}")
            for number, answer in enumerate(answers, first)
        ]
        longest_s = max(ask.at_s + ask.deadline_s for ask in asks) + 2 * DEADLINE_SLACK_S
        _, late = await asyncio.wait(tasks, timeout=longest_s)
        for task in tasks:
            if task in late:
                task.cancel()
        for task in tasks:
            if task not in late:
                task.result()
        return answers

    async def _ask(self, cluster: SimulatedCluster, number: int, answer: Answer) -> None:
        await asyncio.sleep(answer.ask.at_s)
        ask = answer.ask
        self.program.trace.add(
            f"{'client':14s} asks       request {number}: {len(ask.token_ids)} + {ask.sampling.max_tokens} tokens"
        )
        if not cluster.gateway_is_up:
            answer.asked_s = answer.ended_s = asyncio.get_running_loop().time()
            answer.error = NotReady("nobody listens at the gateway's address")
        else:
            await ask_into(cluster.core, answer)
        self.program.trace.add(
            f"{'client':14s} has        request {number}: {len(answer.token_ids)} tokens, {_outcome(answer)}"
        )

    def _note(self, text: str) -> None:
        self.program.trace.add(f"{'fault':14s} {text}")


def _last_asks(rng: random.Random, cluster: ClusterSpec) -> list[Ask]:
    roles = list(cluster.roles.values())
    num_at_once = len(roles) - min(roles.count("prefill"), roles.count("decode"))
    if cluster.elastic is not None:
        # Of pools at rest one worker each may be up, or none.
        num_at_once = 1
    return [
        Ask(
            at_s=1.0 * number,
            token_ids=tuple(rng.choices(range(1000), k=rng.randint(1, 60))),
            sampling=SamplingParams(temperature=0.0, max_tokens=rng.randint(2, 12)),
        )
        for number in range(NUM_LAST_ROUNDS)
        for _ in range(num_at_once)
    ]


def _outcome(answer: Answer) -> str:
    if answer.error is not None:
        return answer.error.code
    return "finished" if answer.finish is not None else "cancelled"


def _left_running() -> list[str]:
    """Tasks that outlive the cluster they belong to."""
    here = asyncio.current_task()
    assert here is not None, "called by a task"
    lines = describe_tasks(asyncio.get_running_loop()).splitlines()
    return [line.strip() for line in lines if not line.startswith(f"  {here.get_name()} ")]
