"""The player, against a server that is a few lines of this file: what is sent when, and what ends how."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from loadtest import machine
from loadtest.pacer import Pacer
from loadtest.plan import Plan
from loadtest.player import Player, RunClock
from loadtest.record import Outcome
from loadtest.settings import Limits
from workload.chats import Chat, ChatTurn
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from loadtest.http.reader import AnswerReader
    from loadtest.prompts.bodies import Answer

WAIT_S = 20.0


@dataclass(slots=True)
class Asked:
    """One request as the server got it."""

    body: bytes
    reader: AnswerReader
    on_end: Callable[[], None]
    num: int

    def answer(self, *texts: str) -> None:
        self.reader.on_status(200, {"content-type": "text/event-stream"})
        for text in texts:
            self.reader.on_body(_event({"choices": [{"text": text, "finish_reason": None}]}))
        self.reader.on_body(_event({"choices": [{"text": "", "finish_reason": "length"}]}) + b"data: [DONE]\n\n")
        self.on_end()

    def refuse(self, status: int, headers: dict[str, str]) -> None:
        self.reader.on_status(status, headers)
        self.reader.on_complete()
        self.on_end()

    def cancel(self, outcome: Outcome) -> None:
        self.reader.on_lost(outcome)
        self.on_end()


def _event(content: object) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


@dataclass
class FakeServer:
    """Answers with `serve`, from the loop, as the real client does."""

    serve: Callable[[Asked], None]
    asked: list[Asked] = field(default_factory=list[Asked])

    def send(self, path: str, body: bytes, reader: AnswerReader, on_end: Callable[[], None]) -> Asked:
        assert path == "/v1/completions"
        asked = Asked(body, reader, on_end, len(self.asked))
        self.asked.append(asked)
        reader.on_sent()
        asyncio.get_running_loop().call_soon(self.serve, asked)
        return asked


@dataclass
class FakeBodies:
    path: str = "/v1/completions"
    num_lengthened: int = 0

    def lone(self, item: int) -> bytes:
        return b"lone %d" % item

    def turn(self, item: int, turn: int, answers: Sequence[Answer]) -> bytes:
        said = "".join(answer.text for answer in answers)
        return f"chat {item} turn {turn} after {said}".encode()

    def prompt_tokens(self, item: int, turn: int, answers: Sequence[Answer]) -> int:
        return 100 + len(answers)


@contextmanager
def player(
    plan: Plan, server: FakeServer, *, concurrency: int | None = None, limits: Limits | None = None
) -> Generator[Player]:
    timer = machine.TimerFd()
    pacer = Pacer(timer, machine.now_s)
    try:
        yield Player(
            plan=plan,
            sender=server,
            bodies=FakeBodies(),
            pacer=pacer,
            clock=RunClock(machine.now_s),
            limits=limits or Limits(),
            concurrency=concurrency,
        )
    finally:
        pacer.close()
        timer.close()


def lone(*arrivals_s: float) -> list[WorkloadRequest | Chat]:
    return [WorkloadRequest(arrival_s, 5, 2) for arrival_s in arrivals_s]


async def play(playing: Player, plan: Plan, start_s: float = 0.0) -> None:
    async with asyncio.timeout(WAIT_S):
        await playing.play(range(len(plan.items)), start_s=start_s)


async def test_an_open_loop_never_waits_for_answers() -> None:
    plan = Plan.of(lone(0.0, 0.01, 0.02, 0.03))
    held: list[Asked] = []

    def hold(asked: Asked) -> None:
        """Answers nobody until all have asked."""
        held.append(asked)
        if len(held) == 4:
            for each in held:
                each.answer("a", "b")

    with player(plan, FakeServer(hold)) as playing:
        await play(playing, plan)
    assert [record.outcome for record in playing.records] == [Outcome.FINISHED] * 4
    assert [record.due_s for record in playing.records] == pytest.approx([0.0, 0.01, 0.02, 0.03])
    assert all(record.sent_s >= record.due_s for record in playing.records)
    # Answered together, and each counts from when it was due.
    waits_s = [record.chunk_s[0] - record.due_s for record in playing.records]
    assert waits_s == sorted(waits_s, reverse=True)
    assert (playing.num_ended, playing.num_failed, playing.num_open) == (4, 0, 0)


async def test_latencies_count_from_the_schedule_also_when_the_client_is_late() -> None:
    plan = Plan.of(lone(0.0, 0.0))

    with player(plan, FakeServer(lambda asked: asked.answer("a"))) as playing:
        # The whole run begins 50 ms after the first was due.
        await play(playing, plan, start_s=-0.05)
    for record in playing.records:
        assert record.due_s == pytest.approx(-0.05)
        assert record.chunk_s[0] >= record.sent_s >= record.due_s + 0.05


async def test_a_closed_loop_keeps_so_many_open_and_no_more() -> None:
    plan = Plan.of(lone(*([0.0] * 10)))
    most_open: list[int] = []

    def serve(asked: Asked) -> None:
        most_open.append(playing.num_open)
        asyncio.get_running_loop().call_later(0.002, asked.answer, "a")

    with player(plan, FakeServer(serve), concurrency=3) as playing:
        await play(playing, plan)
    assert max(most_open) == 3
    assert sorted(record.item for record in playing.records) == list(range(10))
    assert {record.outcome for record in playing.records} == {Outcome.FINISHED}


async def test_a_closed_loop_with_more_clients_than_requests_ends() -> None:
    plan = Plan.of(lone(0.0))
    with player(plan, FakeServer(lambda asked: asked.answer("a")), concurrency=8) as playing:
        await play(playing, plan)
    assert len(playing.records) == 1


async def test_a_chat_waits_for_the_answer_and_thinks_and_sends_the_answer_back() -> None:
    chat = Chat(0.0, (ChatTurn(4, 2), ChatTurn(3, 2, 0.03), ChatTurn(3, 2, 0.0)))
    plan = Plan.of([chat])
    server = FakeServer(lambda asked: asked.answer(f"<{asked.num}", ">"))
    with player(plan, server) as playing:
        await play(playing, plan)
    assert [asked.body for asked in server.asked] == [
        b"chat 0 turn 0 after ",
        b"chat 0 turn 1 after <0>",
        b"chat 0 turn 2 after <0><1>",
    ]
    first, second, third = playing.records
    assert second.due_s == pytest.approx(first.end_s + 0.03)
    assert third.due_s == pytest.approx(second.end_s)
    assert [record.index for record in playing.records] == [0, 1, 2]
    assert [record.prompt_tokens for record in playing.records] == [100, 101, 102]


async def test_a_chat_goes_on_after_an_answer_that_was_given_up_with_what_came_of_it() -> None:
    plan = Plan.of(
        [Chat(0.0, (ChatTurn(4, 3), ChatTurn(3, 2)))], cancel_after=lambda index, _: 1 if index == 0 else None
    )
    server = FakeServer(lambda asked: asked.answer("a", "b", "c"))
    with player(plan, server) as playing:
        await play(playing, plan)
    assert [record.outcome for record in playing.records] == [Outcome.CANCELLED, Outcome.FINISHED]
    assert server.asked[1].body == b"chat 0 turn 1 after a"


async def test_a_chat_ends_with_a_turn_that_fails_and_its_later_turns_are_lost() -> None:
    plan = Plan.of([Chat(0.0, (ChatTurn(4, 2), ChatTurn(3, 2), ChatTurn(3, 2, 60.0)))])
    with player(plan, FakeServer(lambda asked: asked.refuse(500, {}))) as playing:
        await play(playing, plan)
    assert [record.outcome for record in playing.records] == [Outcome.HTTP_5XX, Outcome.TURN_LOST, Outcome.TURN_LOST]
    assert [record.index for record in playing.records] == [0, 1, 2]
    assert playing.records[2].due_s == playing.records[0].end_s
    assert (playing.num_ended, playing.num_failed) == (3, 3)


async def test_what_cannot_be_made_ends_the_run_and_is_told() -> None:
    plan = Plan.of(lone(0.0, 0.0, 60.0))

    def send_nothing(asked: Asked) -> None:
        """The first waits for ever; the second cannot be made."""

    class BrokenBodies(FakeBodies):
        def lone(self, item: int) -> bytes:
            if item:
                raise ValueError("no body")
            return b""

    with player(plan, FakeServer(send_nothing)) as playing:
        playing.bodies = BrokenBodies()
        with pytest.raises(ValueError, match="no body"):
            await play(playing, plan)


async def test_giving_up_what_is_open_ends_it_and_nothing_else() -> None:
    plan = Plan.of(lone(0.0, 0.02))

    def serve(asked: Asked) -> None:
        if asked.num == 0:
            asyncio.get_running_loop().call_soon(playing.give_up_open)
        else:
            asked.answer("a")

    with player(plan, FakeServer(serve)) as playing:
        await play(playing, plan)
    assert [record.outcome for record in playing.records] == [Outcome.GIVEN_UP, Outcome.FINISHED]


async def test_retry_after_is_honoured_as_often_as_allowed_and_counts_from_the_first_time() -> None:
    plan = Plan.of(lone(0.0, 0.0))

    def serve(asked: Asked) -> None:
        if asked.body == b"lone 0" and asked.num > 2:
            asked.answer("a")
        else:
            asked.refuse(429, {"retry-after": "0.02"})

    with player(plan, FakeServer(serve), limits=Limits(max_retries=2)) as playing:
        await play(playing, plan)
    served, rejected = playing.records
    assert served.outcome is Outcome.FINISHED
    assert 1 <= served.num_retries <= 2
    assert served.chunk_s[0] - served.due_s >= 0.02
    assert (rejected.outcome, rejected.num_retries, rejected.status) == (Outcome.REJECTED, 2, 429)


async def test_without_leave_to_retry_a_rejection_is_the_end() -> None:
    plan = Plan.of(lone(0.0))
    server = FakeServer(lambda asked: asked.refuse(429, {"retry-after": "1"}))
    with player(plan, server) as playing:
        await play(playing, plan)
    assert (playing.records[0].outcome, playing.records[0].retry_after_s) == (Outcome.REJECTED, 1.0)
    assert len(server.asked) == 1


async def test_stop_ends_what_is_on_the_wire_waiting_thinking_and_due_later() -> None:
    chat = Chat(0.0, (ChatTurn(4, 2), ChatTurn(3, 2, 60.0)))
    plan = Plan.of([chat, *lone(0.0, 0.0, 60.0)])

    def serve(asked: Asked) -> None:
        match asked.body:
            case b"lone 1":
                asked.refuse(429, {"retry-after": "60"})
            case b"lone 2":
                asyncio.get_running_loop().call_soon(playing.stop)
            case _:
                asked.answer("a")

    with player(plan, FakeServer(serve), limits=Limits(max_retries=1)) as playing:
        await play(playing, plan)
    by_item = {record.item: record.outcome for record in playing.records}
    assert by_item == {0: Outcome.FINISHED, 1: Outcome.INTERRUPTED, 2: Outcome.INTERRUPTED}
    # What is played after a stop is nothing.
    await play(playing, plan)
    assert len(playing.records) == 3


async def test_parts_go_on_where_the_last_one_ended() -> None:
    plan = Plan.of(lone(0.0, 10.0, 500.0, 500.01))
    with player(plan, FakeServer(lambda asked: asked.answer("a"))) as playing:
        async with asyncio.timeout(WAIT_S):
            await playing.play(range(0, 1), start_s=0.0)
            await playing.play(range(2, 4), start_s=0.02, part=1)
    assert [record.part for record in playing.records] == [0, 1, 1]
    assert [record.due_s for record in playing.records] == pytest.approx([0.0, 0.02, 0.03])


def test_a_clock_stands_still_while_others_have_their_turn() -> None:
    now_s = 100.0
    clock = RunClock(lambda: now_s)
    now_s = 103.0
    assert clock.now_s() == 3.0
    now_s = 150.0
    clock.start_at(3.0, in_s=0.5)
    assert clock.now_s() == 2.5
