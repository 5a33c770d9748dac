"""The shell of `coordinator.replanning`: hears of decisions, looks on a timer, asks a planner, tells the operator."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self

from coordinator.replan_terms import Answered, Apply, Arrived, Ask, Looked, Planned, Split
from coordinator.replanning import Replanning
from coordinator.shell_figures import ReplanFigures
from coordinator.split_question import NoSplit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from types import TracebackType

    from contracts.clock import Clock
    from contracts.messages import DispatchItem
    from coordinator.answer_lengths import AnswerLengths
    from coordinator.replan_terms import Expected, Instruction, PartlyExpected, ReplanRules
    from coordinator.split_question import SplitAnswer, SplitQuestion

#: Of so many requests the classes are kept, and told apart by their ids.
_MAX_RECENT = 4096
#: No prompt is longer.
_MAX_PROMPT_TOKENS = 1 << 40


class Planner(Protocol):
    """Finds better splits."""

    async def __call__(self, question: SplitQuestion) -> SplitAnswer:
        """May take minutes, but not of this loop. Raises NoSplit that says why there is no answer."""
        ...


class Replanner:
    """Use as `async with replanner:` for as long as it should look. A planner that is missing, fails or takes too long
    is a line in the log, and so is every lasting change of the workload, whoever can say what would be better."""

    def __init__(
        self,
        clock: Clock,
        rules: ReplanRules,
        expected: Expected | PartlyExpected,
        *,
        answers: AnswerLengths,
        class_of: Callable[[str], str | None],
        question: Callable[[Ask, Sequence[str | None]], SplitQuestion],
        planner: Planner,
        tell: Callable[[str], None],
        apply: Callable[[Split], None] | None = None,
    ) -> None:
        """`class_of` a request's SLO class the one that it is judged by, None for none. `question` makes what the
        planner is asked of what was observed and the classes of recent requests; it may raise NoSplit too. `apply`
        begins to carry a split out; None where nobody can: what was to be applied is then told as a proposal."""
        self.figures = ReplanFigures()
        self._clock = clock
        self._machine = Replanning(rules, expected, started_s=clock.now_s())
        self._answers = answers
        self._told_answers = (answers.num_answers, answers.num_tokens)
        self._class_of = class_of
        self._question = question
        self._planner = planner
        self._tell = tell
        self._apply = apply
        #: Newest last, by request id: a request that is placed anew has come once.
        self._recent: dict[str, str | None] = {}
        self._oldest: deque[str] = deque()
        #: Present between entering and leaving.
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._start(self._look(), "replanning-looks")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        for task in self._tasks:
            task.cancel()
        if not isinstance(error, asyncio.CancelledError):
            # The body's own error leaves as it is, not as part of a group.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    def decided(self, item: DispatchItem, now_s: float) -> None:
        """A decision was made about this request, whichever."""
        if item.was_accepted or item.request_id in self._recent or item.prompt_tokens <= 0:
            return
        self._recent[item.request_id] = self._class_of(item.slo_class)
        self._oldest.append(item.request_id)
        if len(self._oldest) > _MAX_RECENT:
            del self._recent[self._oldest.popleft()]
        self._machine.handle(Arrived(now_s, min(item.prompt_tokens, _MAX_PROMPT_TOKENS)))

    async def _look(self) -> None:
        while True:
            await self._clock.sleep(self._machine.look_every_s)
            now_s = self._clock.now_s()
            before, self._told_answers = self._told_answers, (self._answers.num_answers, self._answers.num_tokens)
            num_answers, num_tokens = self._told_answers[0] - before[0], self._told_answers[1] - before[1]
            if num_answers:
                self._machine.handle(Answered(now_s, num_answers, num_tokens))
            for instruction in self._machine.handle(Looked(now_s)):
                self._carry_out(instruction)

    def _carry_out(self, instruction: Instruction) -> None:
        if isinstance(instruction, Ask):
            self.figures.shifts_total += 1
            self._tell(f"the workload is not what was planned for: {instruction.reason}")
            self._start(self._ask(instruction), "replanning-asks")
            return
        self.figures.proposals_total += 1
        self.figures.proposed = instruction.split.text
        words = _in_words(instruction.split, instruction.reason)
        if not isinstance(instruction, Apply):
            self._tell(f"a better split: {words}")
        elif self._apply is None:
            self._tell(f"a better split, not applied for nobody gives workers orders here: {words}")
        else:
            self._tell(f"applying a better split: {words}")
            self._apply(instruction.split)

    async def _ask(self, ask: Ask) -> None:
        split = None
        try:
            classes = list(self._recent.values())[-len(ask.prompt_tokens) :]
            answer = await self._planner(self._question(ask, classes))
            split = Split(
                text=answer.best,
                gain=answer.gain,
                instead_of=answer.present,
                workers=tuple(sorted(answer.best_workers.items())),
            )
        except NoSplit as error:
            self._tell(f"no better split of the workers was looked for: {error}")
        except Exception as error:
            # Whatever a planner does, requests are placed.
            self._tell(f"the planner failed: {type(error).__name__}: {error}")
        found = self._machine.handle(Planned(self._clock.now_s(), split))
        if split is not None and not found:
            self._tell(f"no other split would serve notably more than {split.instead_of}")
        for instruction in found:
            self._carry_out(instruction)

    def _start(self, what: Coroutine[None, None, None], name: str) -> None:
        assert self._group is not None, "only while entered"
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(self._group.create_task(what, name=name))


def _in_words(split: Split, reason: str) -> str:
    if split.gain == math.inf:
        return f"{split.text} would serve requests within their targets, {split.instead_of} serve none; {reason}"
    return f"{split.text} instead of {split.instead_of} would serve {split.gain:+.0%} within the targets; {reason}"
