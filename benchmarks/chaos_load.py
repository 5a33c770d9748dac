"""The clients of a chaos run, and what a run is: its plan, its questions, its outcome."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.chaos_client import Leaving, Outcome, Question, Try, ask

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import httpx

    from benchmarks.chaos_faults import Tally
    from benchmarks.chaos_reference import Auditor

#: A try of a request ends, well or not, within its deadline at the gateway and this much more.
BOUND_MARGIN_S = 10.0
#: Share of clients that leave before the end.
SHARE_LEAVING = 0.15

TALE = (
    "once upon a time there was a small dog who lived near the river and every morning he walked to the old mill "
    "where a girl named Anna gave him bread because she knew that the winter had been long and cold for all"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One run."""

    seed: int
    num_requests: int
    num_faults: int
    num_questions: int
    #: Requests open at once.
    concurrency: int
    longest_prompt: int
    longest_answer: int
    request_timeout_s: float
    cluster: str
    transport: str
    checksum: bool
    allow_slow: bool

    @property
    def roles(self) -> tuple[str, ...]:
        return ("mixed",) if self.cluster == "mixed" else ("prefill", "decode")

    def config(self, log_dir: Path) -> dict[str, Any]:
        """Pools are small, so that there is never room for all."""
        blocks = {"prefill": 72, "decode": 112, "mixed": 160}
        return {
            "model": "demo",
            "dtype": "float32",
            "transport": self.transport,
            "transfer": {"checksum": self.checksum, "allow_slow": self.allow_slow},
            "pools": [
                {"name": role, "role": role, "workers": 2, "kv_blocks": blocks[role], "max_batch_tokens": 96}
                for role in self.roles
            ],
            "gateway": {"host": "127.0.0.1", "port": 0, "request_timeout_s": self.request_timeout_s},
            # A crash loop is what happens here: waiting for long would only lengthen the run.
            "supervisor": {"restart_delay_max_s": "500ms"},
            "log_dir": str(log_dir),
        }


def questions(rng: random.Random, plan: Plan) -> list[Question]:
    """Prompts of one token to the longest, as text and as tokens; answers short and long; half of them sampled."""
    made: list[Question] = []
    for index in range(plan.num_questions):
        # Evenly over magnitudes: as many of 1 to 20 tokens as of 20 to 400.
        length = min(plan.longest_prompt, round(math.exp(rng.uniform(0, math.log(plan.longest_prompt)))))
        answer = min(plan.longest_answer, round(math.exp(rng.uniform(0, math.log(plan.longest_answer)))) + 1)
        in_words = index % 3 == 0
        made.append(
            Question(
                name=f"question {index}",
                prompt=" ".join(rng.choices(TALE.split(), k=max(1, length // 2)))
                if in_words
                else tuple(rng.randrange(10, 950) for _ in range(length)),
                max_tokens=answer,
                seed=rng.randrange(2**31) if index % 2 else None,
                ignore_eos=index % 5 != 0,
            )
        )
    return made


@dataclass(slots=True, kw_only=True)
class Load:
    """The clients: asks until enough was asked and `enough` is set, never more than `concurrency` at once."""

    client: httpx.AsyncClient
    plan: Plan
    questions: Sequence[Question]
    auditor: Auditor
    rng: random.Random
    outcomes: list[Outcome] = field(default_factory=list[Outcome])
    wrong: list[str] = field(default_factory=list[str])
    #: Tries that are under way.
    open: dict[int, Try] = field(default_factory=dict[int, Try])
    num_asked: int = 0
    #: No more than the wanted number is asked once this is set.
    enough: asyncio.Event = field(default_factory=asyncio.Event)
    #: For the one that waits in `reached`.
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    def num_writing(self) -> int:
        return sum(record.writing for record in self.open.values())

    async def reached(self, share: float) -> None:
        """Returns once this share of the wanted number was asked."""
        while self.num_asked < share * self.plan.num_requests:
            self._moved.clear()
            await self._moved.wait()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self.plan.concurrency):
                tasks.create_task(self._client())

    async def _client(self) -> None:
        while self.num_asked < self.plan.num_requests or not self.enough.is_set():
            number = self.num_asked
            self.num_asked += 1
            self._moved.set()
            await self._ask(number)

    async def _ask(self, number: int) -> None:
        rng = random.Random(f"{self.plan.seed} {number}")
        question = rng.choice(self.questions)
        stream = rng.random() < 0.7
        outcome = await ask(
            self.client,
            question,
            stream=stream,
            bound_s=self.plan.request_timeout_s + BOUND_MARGIN_S,
            patience_s=self.plan.request_timeout_s,
            leaving=_leaving(rng, question, stream) if rng.random() < SHARE_LEAVING else None,
            on_start=lambda record: self.open.__setitem__(number, record),
        )
        del self.open[number]
        self.outcomes.append(outcome)
        for record in outcome.tries:
            # Checking may ask the reference: not on the loop that takes everybody's tokens.
            self.wrong += await asyncio.to_thread(self.auditor.faults, question, record)


def _leaving(rng: random.Random, question: Question, stream: bool) -> Leaving:
    """Half of those who stream leave in mid-answer, the others at any moment from the first on."""
    if stream and rng.random() < 0.5:
        return Leaving(after_tokens=rng.randint(1, question.max_tokens))
    return Leaving(after_s=rng.choice([0.001, rng.uniform(0, 0.1), rng.uniform(0, 1.5)]))


@dataclass(slots=True, kw_only=True)
class Result:
    load: Load
    tally: Tally
    problems: list[str]
    leaked_blocks: int
    idle_s: float | None
    peace_s: float
    chaos_s: float
