"""The shell of replanning on virtual time: what it hears, asks and tells, and what a planner cannot break."""

from __future__ import annotations

import asyncio
import math
import random
from typing import TYPE_CHECKING, Self

import msgspec
import pytest

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.latency_models import CostCurve, FittedLatency
from contracts.messages import AnswerTally, DispatchItem, WorkerInfo
from contracts.transfer_models import LinkTransfer
from coordinator.answer_lengths import AnswerLengths
from coordinator.costs import WorkerCosts
from coordinator.replan_terms import Ask, Expected, ReplanRules, Split
from coordinator.replanner import Replanner
from coordinator.split_question import NoSplit, SplitAnswer, SplitQuestion, split_question
from simulator import Program, VirtualClock, run
from simulator.engine import modelled_identity
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

    from contracts.messages import LatencyFit, MemberRole, Role

CHAT = SloClass("chat", 500, 50)
PLANNED_FOR = Expected(rate_rps=5.0, mean_prompt_tokens=500, p95_prompt_tokens=900, mean_output_tokens=100)
ANSWER = SplitAnswer(best="3 prefill + 1 decode", best_rps=7.0, present="2 prefill + 2 decode", present_rps=5.0)
READS = WorkerCosts(
    latency=FittedLatency(
        prefill=CostCurve.line(0.01, 1e-4), pair_s=1e-9, decode=CostCurve.line(0.0, 0.0), context_token_s=0.0
    ),
    max_batch_tokens=2048,
    between_steps_s=0.001,
)
WRITES = WorkerCosts(
    latency=FittedLatency(
        prefill=CostCurve.line(0.0, 0.0), pair_s=0.0, decode=CostCurve.line(0.02, 2e-4), context_token_s=1e-7
    ),
    max_batch_tokens=512,
)


class KnownCosts:
    """A cost source that was told before."""

    transfer = LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=math.inf)
    kv_token_bytes = 1000
    pairs = None

    def __init__(self, known: dict[Role, WorkerCosts]) -> None:
        self.known = known

    def of(self, info: WorkerInfo) -> WorkerCosts | None:
        return None if info.role == "store" else self.known.get(info.role)

    def observe(self, info: WorkerInfo, fit: LatencyFit) -> bool:
        return False


COSTS = KnownCosts({"prefill": READS, "decode": WRITES})


def worker(name: str, role: MemberRole, max_batch_tokens: int = 0, total_blocks: int = 100) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(1),
        role=role,
        address=f"{name}:1",
        model="m",
        identity=modelled_identity(),
        total_blocks=total_blocks,
        max_context_tokens=4096,
        max_batch_tokens=max_batch_tokens,
    )


WORKERS = (worker("p0", "prefill", 2048), worker("p1", "prefill", 1024), worker("d0", "decode", total_blocks=80))


def ask_of(*prompt_tokens: int) -> Ask:
    return Ask(observed=PLANNED_FOR, prompt_tokens=prompt_tokens, reason="rate")


def question_of(
    ask: Ask,
    classes: Sequence[str | None],
    infos: Sequence[WorkerInfo] = WORKERS,
    costs: KnownCosts = COSTS,
) -> SplitQuestion:
    return split_question(ask, infos, costs, slos=(CHAT,), classes=classes, max_sequences=64, max_batch_tokens=512)


class Desk:
    """A replanner, what it told, and requests for it."""

    def __init__(
        self,
        planner: Callable[[SplitQuestion], SplitAnswer],
        *,
        mode: Literal["off", "propose", "apply"] = "propose",
        apply: Callable[[Split], None] | None = None,
        takes_s: float = 0.0,
    ) -> None:
        self._mode: Literal["off", "propose", "apply"] = mode
        self._apply = apply
        self.told: list[str] = []
        self.asked: list[SplitQuestion] = []
        self.answers = AnswerLengths()
        self._planner = planner
        self._takes_s = takes_s
        self._rng = random.Random(3)
        self._num_items = 0
        self._tallies = (AnswerTally(1, 100),)
        self.answers.ended(self._tallies, ())

    async def __aenter__(self) -> Self:
        self.clock = VirtualClock()
        self.replanner = Replanner(
            self.clock,
            ReplanRules(window_s=100.0, mode=self._mode),
            PLANNED_FOR,
            answers=self.answers,
            class_of=lambda name: name or None,
            question=question_of,
            planner=self._plan,
            tell=self.told.append,
            apply=self._apply,
        )
        await self.replanner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.replanner.__aexit__(None, None, None)

    async def _plan(self, question: SplitQuestion) -> SplitAnswer:
        self.asked.append(question)
        await asyncio.sleep(self._takes_s)
        return self._planner(question)

    async def serve(self, for_s: float, *, prompt_tokens: int, slo_class: str = "chat", repeats: int = 1) -> None:
        """Five requests a second, each answered at once, and decided about so often."""
        until_s = self.clock.now_s() + for_s
        while self.clock.now_s() < until_s:
            await asyncio.sleep(self._rng.expovariate(5.0))
            self._num_items += 1
            item = DispatchItem(
                request_id=RequestId(f"r{self._num_items}"),
                prompt_tokens=round(prompt_tokens * self._rng.uniform(0.1, 1.9)),
                max_tokens=500,
                slo_class=slo_class,
            )
            for _ in range(repeats):
                self.replanner.decided(item, self.clock.now_s())
            self.replanner.decided(msgspec.structs.replace(item, was_accepted=True), self.clock.now_s())
            before, (tally,) = self._tallies, self._tallies
            self._tallies = (AnswerTally(tally.answers + 1, tally.output_tokens + 100),)
            self.answers.ended(self._tallies, before)


def shifted(desk: Desk) -> None:
    """Prompts as planned for, and then three times as long."""

    async def main(program: Program) -> None:
        async with desk:
            await desk.serve(500.0, prompt_tokens=500)
            assert desk.told == []
            await desk.serve(1000.0, prompt_tokens=1500)

    run(main, seed=1)


def test_a_shift_is_told_and_a_better_split_proposed_once() -> None:
    desk = Desk(lambda _: ANSWER, takes_s=30.0)
    shifted(desk)
    drift, proposal = desk.told
    assert drift.startswith("the workload is not what was planned for: ")
    assert "mean prompt" in drift
    assert proposal.startswith(
        "a better split: 3 prefill + 1 decode instead of 2 prefill + 2 decode would serve +40% within the targets; "
    )
    assert "mean prompt" in proposal
    (question,) = desk.asked
    assert question.mix == {"chat": len(question.prompt_tokens)}
    assert sum(question.prompt_tokens) / len(question.prompt_tokens) == pytest.approx(1500, rel=0.1)
    assert question.mean_answer_tokens == pytest.approx(100)
    figures = desk.replanner.figures
    assert (figures.shifts_total, figures.proposals_total, figures.proposed) == (1, 1, "3 prefill + 1 decode")


def test_a_request_that_is_placed_again_came_once() -> None:
    desk = Desk(lambda _: ANSWER)

    async def main(program: Program) -> None:
        async with desk:
            await desk.serve(800.0, prompt_tokens=500, repeats=3)

    run(main, seed=1)
    assert desk.told == []


def no_split(_: SplitQuestion) -> SplitAnswer:
    raise NoSplit("nobody is here")


def hardly_better(_: SplitQuestion) -> SplitAnswer:
    return msgspec.structs.replace(ANSWER, best_rps=5.1)


def broken(_: SplitQuestion) -> SplitAnswer:
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(
    ("planner", "line"),
    [
        (no_split, "no better split of the workers was looked for: nobody is here"),
        (broken, "the planner failed: ZeroDivisionError: a bug"),
        (
            hardly_better,
            "no other split would serve notably more than 2 prefill + 2 decode",
        ),
    ],
)
def test_without_a_split_the_shift_is_told_all_the_same(
    planner: Callable[[SplitQuestion], SplitAnswer], line: str
) -> None:
    desk = Desk(planner)
    shifted(desk)
    assert desk.told[0].startswith("the workload is not what was planned for: ")
    assert desk.told[1:] == [line]
    assert (desk.replanner.figures.shifts_total, desk.replanner.figures.proposals_total) == (1, 0)


def test_workers_that_serve_nothing_are_told_so() -> None:
    desk = Desk(lambda _: msgspec.structs.replace(ANSWER, present_rps=0.0))
    shifted(desk)
    assert "would serve requests within their targets, 2 prefill + 2 decode serve none; " in desk.told[1]


def test_apply_applies_and_says_when_it_cannot() -> None:
    applied: list[Split] = []
    desk = Desk(lambda _: ANSWER, mode="apply", apply=applied.append)
    shifted(desk)
    assert desk.told[1].startswith("applying a better split: ")
    assert [split.text for split in applied] == ["3 prefill + 1 decode"]
    desk = Desk(lambda _: ANSWER, mode="apply")
    shifted(desk)
    assert desk.told[1].startswith("a better split, not applied for nobody gives workers orders here: ")


def test_leaving_ends_a_question_that_is_open() -> None:
    desk = Desk(lambda _: ANSWER, takes_s=1e6)
    shifted(desk)
    assert len(desk.asked) == 1
    assert len(desk.told) == 1


# --- the question -----------------------------------------------------------------------------------


def test_the_question_tells_of_typical_workers_and_survives_the_way() -> None:
    question = question_of(ask_of(10, 20, 30), ["chat", None, "chat"])
    pools = [(pool.role, pool.num_workers, pool.max_batch_tokens) for pool in question.pools]
    assert pools == [("prefill", 2, 1024), ("decode", 1, 512)]
    assert question.latency.prefill == READS.latency.prefill  # type: ignore[attr-defined]
    assert question.latency.decode == WRITES.latency.decode  # type: ignore[attr-defined]
    assert (question.num_blocks, question.between_steps_s) == (80, 0.001)
    assert question.mix == {"chat": 2, "no targets": 1}
    assert [slo.name for slo in question.slos] == ["chat", "no targets"]
    sent = msgspec.msgpack.encode(question)
    assert msgspec.msgpack.decode(sent, type=SplitQuestion) == question


@pytest.mark.parametrize(
    ("ask", "classes", "infos", "known", "why"),
    [
        (ask_of(), ["chat"], WORKERS, COSTS.known, "no requests come"),
        (ask_of(1), ["chat"], WORKERS[:1], COSTS.known, "no two workers"),
        (ask_of(1), [None], WORKERS, COSTS.known, "no request has targets"),
        (ask_of(1), ["chat"], WORKERS, {"prefill": READS}, "what steps that write answers take is not known"),
        (ask_of(1), ["chat"], WORKERS, {"decode": WRITES}, "what steps that read prompts take is not known"),
        (ask_of(1), ["chat"], WORKERS[:2], COSTS.known, "what steps that write answers take is not known"),
    ],
)
def test_without_something_to_plan_with_nothing_is_asked(
    ask: Ask, classes: list[str | None], infos: tuple[WorkerInfo, ...], known: dict[Role, WorkerCosts], why: str
) -> None:
    with pytest.raises(NoSplit, match=why):
        question_of(ask, classes, infos, KnownCosts(known))


def test_stores_take_no_part_in_a_split() -> None:
    asked = question_of(ask_of(10), ["chat"], (*WORKERS, worker("s0", "store", total_blocks=1)))
    assert asked == question_of(ask_of(10), ["chat"])
    with pytest.raises(NoSplit, match="no two workers"):
        question_of(ask_of(10), ["chat"], (WORKERS[0], worker("s0", "store")))


def test_first_tallies_of_a_life_are_no_news() -> None:
    lengths = AnswerLengths()
    lengths.ended((AnswerTally(100, 5000),), ())
    assert (lengths.num_answers, lengths.num_tokens) == (0, 0)
    lengths.ended((AnswerTally(102, 5030),), (AnswerTally(100, 5000),))
    assert (lengths.num_answers, lengths.num_tokens) == (2, 30)
