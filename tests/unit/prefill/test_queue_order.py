"""Whose prompt a worker reads next: orders, tenants, and how far ahead of the steps prompts are admitted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec

from contracts.ids import Incarnation, WorkerId
from contracts.messages import Peer, PrefillRequest
from engine.compose import StepBudget, compose
from engine.plan import Sampled
from engine.room import Demand
from kvstore.prefix_cache import PrefixCache
from kvtransfer import LeaseOutcome, Ledger
from prefill import PrefillLimits, PrefillQueue
from prefill.ordering import QueueRules
from tests.support.roles import IDENTITY, READER, Deltas, Facts, RecordingHolder, generate, key, room_over

if TYPE_CHECKING:
    from contracts.requests import GenerateRequest

STEP_TOKENS = 8
OWN = Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(1), address="p0:1")


@dataclass
class Reading:
    """A prefill queue whose steps are composed as a worker's loop does it."""

    rules: QueueRules = field(default_factory=QueueRules)
    num_blocks: int = 64
    also_writes: bool = False
    token_s: float = 0.0
    prefix_cache: bool = False
    num_freed: int = 0

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.num_blocks)
        self.room = room_over(self.ledger, growth_tokens=8)
        self.holder = RecordingHolder()
        self.read: list[str] = []
        self.queue = PrefillQueue(
            engine=Facts(num_blocks=self.num_blocks),
            ledger=self.ledger,
            prefixes=PrefixCache(self.ledger, IDENTITY, enabled=self.prefix_cache),
            holder=cast("Any", self.holder),
            own_worker_id="p0",
            room=self.room,
            limits=PrefillLimits(queue=self.rules),
            emit=Deltas(),
            send_offer=cast("Any", None),
            start_fetch=cast("Any", None),
            hand_over=lambda sequence, now_s: None,
            also_writes=self.also_writes,
            on_blocks_freed=self._freed,
            sequence_ids=itertools.count(),
            ahead_tokens=STEP_TOKENS,
            reading_s=lambda num_tokens, num_computed: self.token_s * num_tokens,
        )

    def _freed(self) -> None:
        self.num_freed += 1

    def submit(self, name: str, now_s: float = 0.0, *, prompt: int = 8, local: bool = False, **terms: Any) -> None:
        request: GenerateRequest = msgspec.structs.replace(generate(name, prompt=prompt), **terms)
        ask = PrefillRequest(target=Incarnation(1), request=request, decode=OWN if local else READER)
        self.queue.submit(ask, now_s)

    def step(self, now_s: float = 0.0) -> list[int]:
        """One step, and its readers take what is sealed; the tokens of its chunks."""
        _, chunks = self.queue.candidates(now_s)
        grants = compose((), chunks, StepBudget(max_tokens=STEP_TOKENS, max_sequences=64))
        remaining = {chunk.sequence_id: chunk.num_tokens for chunk in chunks}
        for grant in grants:
            self.queue.build(grant.sequence_id, grant.num_tokens, now_s)
        for grant in grants:
            ended = remaining[grant.sequence_id] == grant.num_tokens
            sampled = Sampled(token_id=7) if ended else None
            self.queue.apply(grant.sequence_id, grant.num_tokens, sampled, now_s)
            if ended:
                self._taken()
        return [grant.num_tokens for grant in grants]

    def _taken(self) -> None:
        sealed = [call[1] for call in self.holder.calls if call[0] == "seal"]
        for lease_id in sealed:
            if lease_id in self.holder.on_ended:
                self.holder.end(cast("Any", lease_id), LeaseOutcome.RELEASED)

    def order(self, now_s: float = 0.0) -> list[str]:
        """Requests in the order in which they leave this side, all others of theirs read to the end."""
        left: list[str] = []
        while before := {each.request_id for each in self.queue.keys_of(generate().gateway_id)}:
            self.step(now_s)
            left += sorted(before - {each.request_id for each in self.queue.keys_of(generate().gateway_id)})
        self.ledger.check()
        assert self.queue.pending_tokens == 0
        assert self.queue.waiting_count == 0
        return left


def test_without_targets_and_tenants_first_come_is_first_served() -> None:
    reading = Reading()
    for name in ("a", "b", "c", "d"):
        reading.submit(name)
    assert reading.order() == ["a", "b", "c", "d"]


def test_the_prompt_that_is_due_next_is_read_next() -> None:
    reading = Reading()
    reading.submit("no-target")
    reading.submit("loose", ttft_due_s=50.0)
    reading.submit("tight", ttft_due_s=1.0)
    assert reading.order() == ["tight", "loose", "no-target"]


def test_what_cannot_be_read_in_time_any_more_goes_last() -> None:
    reading = Reading(token_s=0.1)
    reading.submit("hopeless", ttft_due_s=0.7, prompt=8)
    reading.submit("tight", ttft_due_s=0.9, prompt=8)
    assert reading.order() == ["tight", "hopeless"]


def test_what_is_due_counts_from_receipt() -> None:
    reading = Reading()
    reading.submit("early", 10.0, ttft_due_s=5.0)
    reading.submit("late", 12.0, ttft_due_s=2.0)
    assert reading.order(12.5) == ["late", "early"]


def test_short_prompts_and_priorities_go_first() -> None:
    reading = Reading(QueueRules(order="shortest", ageing_s=1.0))
    reading.submit("long", prompt=40)
    reading.submit("short", prompt=8)
    reading.submit("first", prompt=40, priority=5)
    assert reading.order() == ["first", "short", "long"]


def test_what_comes_while_others_wait_can_still_go_first() -> None:
    """Of four prompts only as much as fills a step is admitted, though there are blocks for all."""
    reading = Reading()
    for name in ("a", "b", "c", "d"):
        reading.submit(name)
    reading.queue.candidates(0.0)
    assert (reading.queue.running_count, reading.queue.waiting_count) == (1, 3)
    assert len([call for call in reading.holder.calls if call[0] == "open"]) == 1
    reading.submit("urgent", ttft_due_s=1.0)
    assert reading.order() == ["a", "urgent", "b", "c", "d"]


def test_a_step_is_filled_from_several_prompts() -> None:
    reading = Reading()
    for name in ("a", "b", "c"):
        reading.submit(name, prompt=5)
    assert reading.step() == [5, 3]
    assert (reading.queue.running_count, reading.queue.waiting_count) == (1, 1)
    assert reading.step() == [2, 5]


def test_tenants_take_turns_by_what_is_computed_for_them() -> None:
    reading = Reading()
    for number in range(4):
        reading.submit(f"a{number}", tenant="a")
    reading.step()
    for number in range(2):
        reading.submit(f"b{number}", tenant="b")
    assert reading.order() == ["a1", "b0", "a2", "b1", "a3"]


def test_weights_are_shares_of_the_reading() -> None:
    reading = Reading(QueueRules(tenant_weights={"a": 2.0}))
    for number in range(4):
        reading.submit(f"a{number}", tenant="a")
        reading.submit(f"b{number}", tenant="b")
    first = [name[0] for name in reading.order()[:6]]
    assert (first.count("a"), first.count("b")) == (4, 2)


def test_cached_tokens_are_not_charged() -> None:
    """Tenant a asks for the same prompt again and again: it costs four tokens, b's own ones eight."""
    reading = Reading(prefix_cache=True)
    reading.submit("warm", tenant="a")
    reading.step()
    for number in range(4):
        own = tuple(range(100 * number + 100, 100 * number + 108))
        reading.submit(f"a{number}", tenant="a")
        reading.submit(f"b{number}", tenant="b", token_ids=own)
    first = [name[0] for name in reading.order()[:6]]
    assert (first.count("a"), first.count("b")) == (4, 2)


def test_unfair_queues_know_no_tenants() -> None:
    reading = Reading(QueueRules(fair=False))
    for number in range(3):
        reading.submit(f"a{number}", tenant="a")
    reading.submit("b", tenant="b")
    assert reading.order() == ["a0", "a1", "a2", "b"]


def test_who_ends_while_waiting_leaves_no_trace() -> None:
    reading = Reading()
    for name in ("a", "b", "c"):
        reading.submit(name, tenant=name, deadline_s=5.0 if name == "c" else 100.0)
    reading.queue.cancel(key("a"), "test")
    reading.queue.expire(6.0)
    assert (reading.queue.waiting_count, reading.queue.open_count) == (1, 1)
    assert reading.order(7.0) == ["b"]


def test_a_prompt_that_waits_for_its_turn_waits_for_no_blocks() -> None:
    """Answers of this worker may take them meanwhile."""
    reading = Reading(also_writes=True)
    reading.submit("a", prompt=16, local=True)
    reading.submit("b", prompt=8, local=True)
    reading.queue.candidates(0.0)
    assert (reading.queue.running_count, reading.room.prompt) == (1, None)
    reading.room.starving = True
    for _ in range(2):
        reading.step()
    assert reading.room.prompt is not None, "its turn has come, and an answer is in its way"


def test_the_head_is_told_anew_when_a_better_one_comes() -> None:
    reading = Reading(also_writes=True)
    reading.room.starving = True
    reading.submit("a", 1.0, local=True)
    assert reading.room.prompt is not None
    assert reading.room.prompt.arrival_s == 1.0
    reading.submit("b", 2.0, ttft_due_s=1.0, local=True)
    assert reading.room.prompt.arrival_s == 2.0
    reading.queue.cancel(key("b"), "test")
    assert reading.room.prompt.arrival_s == 1.0


def test_an_offer_hears_that_the_prompt_it_waited_behind_is_late() -> None:
    """The prompt with the target came before the offer, the one without after it: once the former is late, the offer
    is the oldest that waits, and nothing else would tell it."""
    reading = Reading(also_writes=True)
    reading.room.starving = True
    reading.submit("tight", 1.0, ttft_due_s=5.0, local=True)
    reading.submit("loose", 3.0, ttft_due_s=20.0, local=True)
    reading.room.offer = Demand(arrival_s=2.0, num_blocks=1)
    assert reading.queue.candidates(3.5) == ([], [])
    assert reading.room.prompt is not None
    assert (reading.room.prompt.arrival_s, reading.num_freed) == (1.0, 0)
    assert reading.queue.candidates(6.5) == ([], [])
    assert (reading.room.prompt.arrival_s, reading.num_freed) == (3.0, 1)
    assert reading.queue.candidates(6.6) == ([], [])
    assert reading.num_freed == 1, "said once"
