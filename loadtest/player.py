"""Carries a plan out against one server.

Open loop: what arrives is sent at its time, whatever became of what was sent before, and every latency counts from
that time. Closed loop: so many clients, each of which sends its next request when its last one has ended.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from loadtest.http.reader import AnswerReader
from loadtest.record import Outcome
from workload.chats import Chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from loadtest.pacer import Pacer
    from loadtest.plan import Plan
    from loadtest.prompts.bodies import Answer
    from loadtest.record import RequestRecord
    from loadtest.settings import Limits


class Sending(Protocol):
    """One request on the wire."""

    def cancel(self, outcome: Outcome) -> None:
        """Ends it with this outcome, unless it has ended; the connection is closed."""
        ...


class Sender(Protocol):
    """What `http.HttpClient` does."""

    def send(self, path: str, body: bytes, reader: AnswerReader, on_end: Callable[[], None]) -> Sending: ...


class Bodies(Protocol):
    """Request bodies, by item of the plan."""

    path: str

    @property
    def num_lengthened(self) -> int:
        """Prompts that could not be as short as planned."""
        ...

    def lone(self, item: int) -> bytes:
        """Of a request without others before it; made before the run, so that this costs nothing."""
        ...

    def turn(self, item: int, turn: int, answers: Sequence[Answer]) -> bytes:
        """Of a chat's turn, after the answers to all turns before it."""
        ...

    def prompt_tokens(self, item: int, turn: int, answers: Sequence[Answer]) -> int:
        """Of the same turn's prompt."""
        ...


class RunClock:
    """Seconds since the start of a run; the start can be moved between its parts, so that a server's clock stands
    still while another server has its turn."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self.origin_s = now_s()

    def now_s(self) -> float:
        return self._now_s() - self.origin_s

    def start_at(self, run_s: float, *, in_s: float) -> None:
        """`in_s` seconds from now it will be `run_s` on this clock."""
        self.origin_s = self._now_s() + in_s - run_s


class Player:
    """One server's part of a run. `records` fills as requests become due, and is complete once `play` has returned."""

    def __init__(
        self,
        *,
        plan: Plan,
        sender: Sender,
        bodies: Bodies,
        pacer: Pacer,
        clock: RunClock,
        limits: Limits,
        concurrency: int | None = None,
    ) -> None:
        self._plan = plan
        self.sender = sender
        self.bodies = bodies
        self.pacer = pacer
        self.clock = clock
        self.limits = limits
        self._concurrency = concurrency
        self._waiting: Iterator[int] = iter(())
        self._shift_s = 0.0
        #: Requests on the wire, and those that wait for a `Retry-After`.
        self.exchanges: dict[int, _Exchange] = {}
        #: Items that were begun and have a turn to come.
        self._num_begun_items = 0
        self._all_begun = False
        self.is_stopped = False
        self._ended = asyncio.Event()
        #: A bug, or a machine without memory: what made the run impossible.
        self._error: BaseException | None = None
        self._part = 0
        self.records: list[RequestRecord] = []
        self.num_ended = 0
        self.num_failed = 0

    @property
    def num_open(self) -> int:
        return len(self.exchanges)

    def open_records(self) -> list[RequestRecord]:
        """Of requests that were sent and have not ended."""
        return [exchange.record for exchange in self.exchanges.values()]

    @property
    def all_sent(self) -> bool:
        """Whether nothing is left to become due."""
        return self._all_begun and self._num_begun_items == len(self.exchanges)

    async def play(self, items: range, *, start_s: float, part: int = 0) -> None:
        """Sends these items of the plan, the first of them at `start_s` of the clock, and waits until all have ended.
        They end: every request has a deadline. Raises what went wrong in making or sending a request."""
        if self.is_stopped:
            return
        self._part = part
        self._ended.clear()
        self._all_begun = False
        self._waiting = iter(items)
        first_arrival_s = self._plan.items[items.start].arrival_s
        if self._concurrency is None:
            self._shift_s = start_s - first_arrival_s
            self._schedule_next()
        else:
            self.pacer.at(self.clock.origin_s + start_s, self._begin_clients)
        await self._ended.wait()
        if self._error is not None:
            raise self._error

    def stop(self, outcome: Outcome = Outcome.INTERRUPTED) -> None:
        """Sends no more; what is on the wire ends with `outcome`. `play` returns."""
        if self.is_stopped:
            return
        self.is_stopped = self._all_begun = True
        for exchange in list(self.exchanges.values()):
            exchange.give_up(outcome)
        self.check_ended()

    def give_up_open(self) -> None:
        """Ends what is on the wire: a search knows enough. What comes later is sent all the same."""
        for exchange in list(self.exchanges.values()):
            exchange.give_up(Outcome.GIVEN_UP)

    # --- which item comes next ---------------------------------------------------------------------

    def _schedule_next(self) -> None:
        item = next(self._waiting, None)
        if item is None:
            self._all_begun = True
            self.check_ended()
            return
        due_s = self._plan.items[item].arrival_s + self._shift_s

        def begin() -> None:
            if not self.is_stopped:
                self._begin_item(item, due_s)
                self._schedule_next()

        self.pacer.at(self.clock.origin_s + due_s, begin)

    def _begin_clients(self) -> None:
        for _ in range(self._concurrency or 0):
            self._begin_next_item()

    def _begin_next_item(self) -> None:
        """Of a closed loop: due now."""
        item = None if self.is_stopped else next(self._waiting, None)
        if item is None:
            self._all_begun = True
            self.check_ended()
        else:
            self._begin_item(item, self.clock.now_s())

    def _begin_item(self, item: int, due_s: float) -> None:
        self._num_begun_items += 1
        self._send_turn(item, 0, due_s, [])

    def _end_item(self) -> None:
        self._num_begun_items -= 1
        if self._concurrency is not None:
            # From the loop: a server that refuses at once would otherwise be asked ever deeper in one stack.
            asyncio.get_running_loop().call_soon(self._begin_next_item)
        self.check_ended()

    def check_ended(self) -> None:
        """`play` returns when nothing is on the wire and nothing will be due."""
        if self._all_begun and not self.exchanges and (self.is_stopped or not self._num_begun_items):
            self._ended.set()

    # --- one request -------------------------------------------------------------------------------

    def _send_turn(self, item: int, turn: int, due_s: float, answers: list[Answer]) -> None:
        if self.is_stopped:
            return
        try:
            self._try_to_send(item, turn, due_s, answers)
        except BaseException as error:
            # In a callback of the event loop it would be logged, and the run would wait for ever.
            self._error = error
            self.stop()
            self._ended.set()

    def _try_to_send(self, item: int, turn: int, due_s: float, answers: list[Answer]) -> None:
        record = self._record(item, turn, due_s)
        record.taken_s = self.clock.now_s()
        asked = self._plan.items[item]
        if isinstance(asked, Chat):
            record.prompt_tokens = self.bodies.prompt_tokens(item, turn, answers)
            body = self.bodies.turn(item, turn, answers)
            last = turn + 1 == len(asked.turns)
        else:
            body = self.bodies.lone(item)
            last = True

        def ended(answer: Answer | None) -> None:
            self._count(record)
            went_well = record.outcome in (Outcome.FINISHED, Outcome.CANCELLED)
            if not (last or went_well or self.is_stopped):
                self._lose_turns(item, turn + 1, record)
            if last or not went_well or self.is_stopped:
                self._end_item()
                return
            assert isinstance(asked, Chat)
            assert answer is not None
            next_due_s = record.end_s + asked.turns[turn + 1].think_s
            so_far = [*answers, answer]
            self.pacer.at(self.clock.origin_s + next_due_s, lambda: self._send_turn(item, turn + 1, next_due_s, so_far))

        _Exchange(self, record, body, keep_text=not last, ended=ended).send()

    def _record(self, item: int, turn: int, due_s: float) -> RequestRecord:
        record = self._plan.record(item, turn)
        record.due_s = due_s
        record.part = self._part
        self.records.append(record)
        return record

    def _lose_turns(self, item: int, first: int, failed: RequestRecord) -> None:
        """A user whose answer failed does not get to ask the rest: a server that breaks chats early is no better."""
        chat = self._plan.items[item]
        assert isinstance(chat, Chat)
        outcome = Outcome.GIVEN_UP if failed.outcome is Outcome.GIVEN_UP else Outcome.TURN_LOST
        for turn in range(first, len(chat.turns)):
            record = self._record(item, turn, failed.end_s)
            record.end_s, record.outcome = failed.end_s, outcome
            record.detail = "an earlier turn of the chat failed"
            self._count(record)

    def _count(self, record: RequestRecord) -> None:
        self.num_ended += 1
        self.num_failed += record.outcome.is_failure


class _Exchange:
    """One request until it has really ended: also when the server asks for it to be sent again later."""

    def __init__(
        self,
        player: Player,
        record: RequestRecord,
        body: bytes,
        *,
        keep_text: bool,
        ended: Callable[[Answer | None], None],
    ) -> None:
        self.record = record
        self._player = player
        self._body = body
        self._keep_text = keep_text
        self._ended = ended
        self._reader: AnswerReader | None = None
        #: None while it waits to be sent again.
        self._sending: Sending | None = None
        player.exchanges[record.index] = self

    def send(self) -> None:
        player = self._player
        self._reader = AnswerReader(self.record, now_s=player.clock.now_s, keep_text=self._keep_text)
        self._sending = player.sender.send(player.bodies.path, self._body, self._reader, self._answered)

    def give_up(self, outcome: Outcome) -> None:
        if self._sending is not None:
            self._sending.cancel(outcome)
        else:
            self.record.outcome = outcome
            self._end()

    def _answered(self) -> None:
        record, limits = self.record, self._player.limits
        if (
            record.outcome.is_failure
            and record.retry_after_s is not None
            and record.num_retries < limits.max_retries
            and not self._player.is_stopped
        ):
            self._retry(min(record.retry_after_s, limits.max_retry_after_s))
        else:
            self._end()

    def _retry(self, delay_s: float) -> None:
        self._sending = None
        record, player = self.record, self._player
        record.num_retries += 1

        def again() -> None:
            # It may have been given up while it waited.
            if record.index in player.exchanges:
                record.outcome, record.detail = Outcome.UNSENT, ""
                record.status = record.retry_after_s = None
                self.send()

        player.pacer.at(player.clock.origin_s + player.clock.now_s() + delay_s, again)

    def _end(self) -> None:
        del self._player.exchanges[self.record.index]
        self._ended(None if self._reader is None else self._reader.answer)
        self._player.check_ended()
