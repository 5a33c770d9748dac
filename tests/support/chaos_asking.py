"""Asking a real cluster questions whose answers are known, and waiting for what happens in other processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import httpx

from benchmarks.chaos_books import audit_faults
from benchmarks.chaos_client import End, Outcome, Question, Try, ask, attempt

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence

    from benchmarks.chaos_client import Leaving
    from benchmarks.chaos_reference import Auditor
    from contracts.messages import AuditReply

#: A request ends, well or not, within this; longer than what any fault here may cost on a loaded machine.
BOUND_S = 60.0
LOOK_INTERVAL_S = 0.02
AUDIT_INTERVAL_S = 0.05

Audits = dict[str, "AuditReply"]


def prompt(number: int, num_tokens: int) -> tuple[int, ...]:
    """Some prompt; its own for each number."""
    return tuple(10 + (number * 7919 + at * 104729 + at * at * 31) % 940 for at in range(num_tokens))


def question(number: int, prompt_tokens: int, max_tokens: int, *, sampled: bool = False) -> Question:
    name = f"{number}: {prompt_tokens}+{max_tokens}{' sampled' if sampled else ''}"
    return Question(
        name=name,
        prompt=prompt(number, prompt_tokens),
        max_tokens=max_tokens,
        seed=1000 + number if sampled else None,
    )


class Asker:
    """Clients of one gateway, and the judge of what they are sent."""

    def __init__(self, client: httpx.AsyncClient, auditor: Auditor) -> None:
        self.client = client
        self._auditor = auditor

    async def learn(self, *questions: Question) -> None:
        """At peace: from here on their right answers are known. The reference has its say."""
        records = await asyncio.gather(*(attempt(self.client, one, stream=False, bound_s=BOUND_S) for one in questions))
        for one, record in zip(questions, records, strict=True):
            faults = await asyncio.to_thread(self._auditor.learn, one, record)
            assert not faults, faults

    async def attempt(
        self,
        question: Question,
        *,
        stream: bool = True,
        leaving: Leaving | None = None,
        on_start: Callable[[Try], None] | None = None,
        on_token: Callable[[Try], Awaitable[None]] | None = None,
    ) -> Try:
        """One try, of which every token is checked, whatever its end."""
        record = await attempt(
            self.client,
            question,
            stream=stream,
            bound_s=BOUND_S,
            leaving=leaving,
            on_start=on_start,
            on_token=on_token,
        )
        await self.check(question, record)
        return record

    async def whole(self, question: Question, *, stream: bool = True) -> Try:
        """The right answer, or the test fails. Refusals are asked again."""
        outcome: Outcome = await ask(self.client, question, stream=stream, bound_s=BOUND_S, patience_s=BOUND_S)
        await self.check(question, outcome.last)
        assert outcome.last.end is End.WHOLE, f"{question.name}: {outcome.last}"
        return outcome.last

    async def check(self, question: Question, record: Try) -> None:
        faults = await asyncio.to_thread(self._auditor.faults, question, record)
        assert not faults, faults


class Streams:
    """Several answers being streamed at once; `all_writing` tells when each has begun."""

    def __init__(self, asker: Asker, questions: Sequence[Question], tasks: asyncio.TaskGroup) -> None:
        self._records: list[Try] = []
        self._questions = questions
        self.tasks = [tasks.create_task(asker.attempt(one, on_start=self._records.append)) for one in questions]

    async def all_writing(self, num_tokens: int = 3) -> None:
        """Returns once every one has so many tokens. Fails where one ended before."""

        def begun() -> bool:
            assert not any(task.done() for task in self.tasks), "an answer was over too soon"
            return len(self._records) == len(self.tasks) and all(
                len(record.token_ids) >= num_tokens for record in self._records
            )

        await until(begun, "streams in mid-answer")

    async def some_writing(self, num_tokens: int = 3) -> None:
        """Returns once one of them has so many tokens."""
        await until(lambda: any(len(record.token_ids) >= num_tokens for record in self._records), "a stream has begun")

    async def results(self) -> list[Try]:
        return list(await asyncio.gather(*self.tasks))


@asynccontextmanager
async def asking(base_url: str, auditor: Auditor) -> AsyncGenerator[Asker]:
    # None is kept: the server may close one just as the next request is sent.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=base_url, timeout=None, limits=limits) as client:
        yield Asker(client, auditor)


async def until(holds: Callable[[], bool], what: str, within_s: float = BOUND_S) -> None:
    until_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until_s, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(LOOK_INTERVAL_S)


async def until_audit(
    audit: Callable[[], Awaitable[Mapping[str, AuditReply]]],
    holds: Callable[[Mapping[str, AuditReply]], bool],
    what: str,
    within_s: float = BOUND_S,
) -> float:
    """Asks for the workers' books until they are so; how long that took, in seconds."""
    started_s = time.monotonic()
    while True:
        audits = await audit()
        if holds(audits):
            return time.monotonic() - started_s
        assert time.monotonic() - started_s < within_s, f"not within {within_s:g} s: {what}: {dict(audits)}"
        await asyncio.sleep(AUDIT_INTERVAL_S)


def clean(audits: Mapping[str, AuditReply]) -> bool:
    """Every worker idle, with nothing in its books."""
    return not [line for worker_id, audit in audits.items() for line in audit_faults(worker_id, audit)]


@contextlib.contextmanager
def stopped(*pids: int) -> Generator[None]:
    """Those processes do not run inside the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
