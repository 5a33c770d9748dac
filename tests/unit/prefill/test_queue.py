"""The prefill side: admission, chunks, the lease it drives, and every way a prompt can end."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from contracts.errors import BadRequest, Internal, NoCapacity
from contracts.ids import Incarnation, LeaseId
from contracts.messages import HandoffReply, Peer, PrefillRequest
from engine.plan import Sampled
from kvtransfer import LeaseOutcome, Ledger
from prefill import PrefillLimits, PrefillQueue
from tests.support.roles import EOS, READER, Deltas, Facts, RecordingHolder, generate, key

if TYPE_CHECKING:
    from contracts.messages import LeaseTerms
    from contracts.requests import GenerateRequest
    from engine.sequence import Sequence


@dataclass
class Side:
    """A prefill queue with what it stands on."""

    num_blocks: int = 16
    max_waiting: int = 8
    may_admit: bool = True
    handed_over: list[Sequence] = field(default_factory=list["Sequence"])

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.num_blocks)
        self.holder = RecordingHolder()
        self.deltas = Deltas()
        self.queue = PrefillQueue(
            engine=Facts(num_blocks=self.num_blocks),
            ledger=self.ledger,
            holder=cast("Any", self.holder),
            own_worker_id="p0",
            limits=PrefillLimits(max_waiting=self.max_waiting),
            emit=self.deltas,
            send_offer=self._send_offer,
            hand_over=lambda sequence, now_s: self.handed_over.append(sequence),
            may_admit=lambda: self.may_admit,
            on_blocks_freed=lambda: None,
            sequence_ids=itertools.count(),
        )

    async def _send_offer(
        self, reader: Peer, terms: LeaseTerms, request: GenerateRequest, timeout_s: float
    ) -> HandoffReply:
        raise AssertionError("the recording holder sends nothing")

    def submit(self, request: GenerateRequest, *, local: bool = False, now_s: float = 0.0) -> None:
        own = Peer(worker_id=cast("Any", "p0"), incarnation=Incarnation(1), address="p0:1")
        ask = PrefillRequest(target=Incarnation(1), request=request, decode=own if local else READER)
        self.queue.submit(ask, now_s)

    def step(self, num_tokens: int, token_id: int | None = None, now_s: float = 1.0) -> None:
        """One chunk of the oldest running prompt."""
        _, chunks = self.queue.candidates(now_s)
        sequence_id = chunks[0].sequence_id
        self.queue.build(sequence_id, num_tokens, now_s)
        sampled = Sampled(token_id=token_id) if token_id is not None else None
        self.queue.apply(sequence_id, num_tokens, sampled, now_s + 0.5)

    def assert_clean(self) -> None:
        self.ledger.check()
        assert self.ledger.load()["free_blocks"] == self.num_blocks
        assert self.queue.open_count == 0


def test_chunks_advance_the_lease_over_full_blocks_and_the_seal_takes_the_tail() -> None:
    side = Side()
    side.submit(generate(prompt=10))
    side.step(5)
    side.step(4)
    side.step(1, token_id=7)
    assert side.holder.calls == [
        ("open", 3, "d0"),
        ("advance", "lease-1", 1),
        ("advance", "lease-1", 2),
        ("seal", "lease-1", 3, 10),
    ]
    assert side.deltas.tokens == [7]
    assert side.deltas.seen[0].finish is None
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    side.assert_clean()


def test_phases_count_from_receipt_to_first_step_to_first_token() -> None:
    side = Side()
    side.submit(generate(prompt=4), now_s=1.0)
    side.step(4, token_id=7, now_s=3.0)
    phases = side.deltas.seen[0].phases
    assert phases is not None
    assert (phases.queue_s, phases.prefill_s) == (2.0, 0.5)


@pytest.mark.parametrize(("token_id", "max_tokens", "finish"), [(EOS, 5, "stop"), (7, 1, "length")])
def test_an_answer_of_one_token_withdraws_the_offer(token_id: int, max_tokens: int, finish: str) -> None:
    side = Side()
    side.submit(generate(prompt=4, max_tokens=max_tokens))
    side.step(4, token_id=token_id)
    assert side.deltas.seen[0].finish == finish
    assert side.holder.calls[-1][0] == "withdraw"
    side.assert_clean()


def test_a_mixed_worker_keeps_the_blocks() -> None:
    side = Side()
    side.submit(generate(prompt=6), local=True)
    side.step(6, token_id=7)
    assert side.holder.calls == []
    sequence = side.handed_over[0]
    assert sequence.token_ids[-1] == 7
    assert sequence.num_computed == 6
    assert side.ledger.blocks_of(sequence.owner) == sequence.block_ids
    assert side.queue.open_count == 0


def test_prompts_are_admitted_in_order_while_blocks_last() -> None:
    side = Side(num_blocks=4)
    for name, prompt in (("a", 8), ("b", 12), ("c", 4)):
        side.submit(generate(name, prompt=prompt))
    _, chunks = side.queue.candidates(0.0)
    assert len(chunks) == 1, "b does not fit beside a, and c must not overtake b"
    side.queue.cancel(key("a"), "test")
    _, chunks = side.queue.candidates(0.0)
    assert [chunk.num_tokens for chunk in chunks] == [12, 4]


def test_nothing_is_admitted_while_something_starves() -> None:
    side = Side(may_admit=False)
    side.submit(generate())
    assert side.queue.candidates(0.0) == ([], [])
    assert side.queue.waiting_count == 1


def test_a_full_queue_refuses() -> None:
    side = Side(max_waiting=1)
    side.submit(generate("a"))
    with pytest.raises(NoCapacity, match="p0 has 1 prompts waiting"):
        side.submit(generate("b"))


def test_what_never_fits_is_refused_with_numbers() -> None:
    side = Side(num_blocks=2)
    with pytest.raises(BadRequest, match="needs 3 KV blocks, p0 has 2"):
        side.submit(generate(prompt=9))
    with pytest.raises(BadRequest, match="64 prompt tokens leave no room"):
        side.submit(generate(prompt=64))


def test_an_unknown_token_fails_its_request_and_not_the_step_of_others() -> None:
    side = Side()
    with pytest.raises(BadRequest, match="token id 1000 is outside the model's vocabulary of 1000"):
        side.submit(msgspec.structs.replace(generate(), token_ids=(1, 1000)))
    side.assert_clean()


def test_a_repeat_changes_nothing() -> None:
    side = Side()
    side.submit(generate())
    side.submit(generate())
    assert side.queue.open_count == 1
    side.step(6, token_id=EOS)
    side.submit(generate())
    side.assert_clean()


def test_a_cancel_that_overtakes_its_request_wins() -> None:
    side = Side()
    side.queue.cancel(key(), "client gone")
    side.submit(generate())
    side.assert_clean()
    side.submit(generate(attempt=2))
    assert side.queue.open_count == 1


def test_cancel_in_a_step_frees_the_blocks_only_after_it() -> None:
    side = Side()
    side.submit(generate(prompt=8))
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 8, 0.0)
    side.queue.cancel(key(), "client gone")
    assert side.holder.calls[-1] == ("withdraw", "lease-1", "client gone")
    assert side.ledger.load()["owned_blocks"] == 2, "the engine still writes them"
    side.queue.apply(chunks[0].sequence_id, 8, Sampled(token_id=7), 1.0)
    assert side.deltas.seen == []
    side.assert_clean()


@pytest.mark.parametrize("stage", ["waiting", "running", "sealed"])
def test_cancel_at_each_stage(stage: str) -> None:
    side = Side()
    side.submit(generate(prompt=4))
    if stage == "running":
        side.step(2)
    elif stage == "sealed":
        side.step(4, token_id=7)
    side.queue.cancel(key(), "client gone")
    side.assert_clean()


@pytest.mark.parametrize("outcome", [LeaseOutcome.EXPIRED, LeaseOutcome.REFUSED])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_lost_reader_fails_the_request(outcome: LeaseOutcome, sealed: bool) -> None:
    side = Side()
    side.submit(generate(prompt=4))
    side.step(4 if sealed else 2, token_id=7 if sealed else None)
    side.holder.end(LeaseId("lease-1"), outcome, "gone")
    last = side.deltas.seen[-1]
    assert (last.finish, last.index) == ("error", 1 if sealed else 0)
    assert last.error is not None
    assert last.error.code == "transfer_aborted"
    side.assert_clean()


def test_a_failed_step_fails_the_request() -> None:
    side = Side()
    side.submit(generate(prompt=4))
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 4, 0.0)
    side.queue.fail(chunks[0].sequence_id, Internal("boom"))
    assert side.deltas.seen[-1].error is not None
    side.assert_clean()


def test_deadlines_end_prompts_but_not_sealed_ones() -> None:
    side = Side()
    side.submit(generate("late", prompt=4, deadline_s=5.0))
    side.submit(generate("sealed", prompt=4, deadline_s=5.0))
    side.queue.cancel(key("late"), "make room")
    side.step(4, token_id=7)
    side.submit(generate("waits", prompt=4, deadline_s=5.0))
    side.queue.expire(5.1)
    assert [delta.request_id for delta in side.deltas.seen if delta.finish == "error"] == ["waits"]
    assert side.queue.open_count == 1
