"""Moves by tokens between two decode batches: in rounds until little is left, and with one owner whatever is lost,
late, out of order or dead."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from hypothesis import event, given
from hypothesis import strategies as st

from contracts.errors import DeadlineExceeded, TandemError, WorkerUnavailable
from contracts.ids import Attempt, Incarnation, OwnerEpoch, RequestId, WorkerId
from contracts.messages import ClaimVerdict, Peer, RequestKey
from decode.moves.destination import FEW_TOKENS
from tests.support.decode_side import OWN, Side
from tests.support.roles import generate

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.messages import DeclineRequest, TakeOverRequest, YieldRequest
    from contracts.requests import Claim, TokenDelta
    from decode.answers import Answer

OTHER = Peer(worker_id=WorkerId("d1"), incarnation=Incarnation(1), address="d1:1")
PROMPT, MAX_TOKENS = 6, 1000
#: The first output token is the prefill side's.
FIRST = 7


def token_at(index: int) -> int:
    """What the model writes, whoever runs it."""
    return FIRST if index == 0 else 100 + index


def write(side: Side) -> int:
    return side.step(token_at)


def running(side: Side, num_outputs: int) -> Answer:
    side.adopt(generate("r", prompt=PROMPT, max_tokens=MAX_TOKENS))
    (answer,) = side.batch.answers()
    while answer.sequence.output_count < num_outputs:
        write(side)
    return answer


# --- in rounds ------------------------------------------------------------------------------------


def test_a_source_writes_on_until_little_is_left() -> None:
    source, destination = Side(num_blocks=64), Side(num_blocks=64, own=OTHER)
    answer = running(source, 3)
    source.batch.moves_out.send_tokens(answer, OTHER)
    ask, on_taken = source.calls.taken_over.pop()
    destination.batch.moves_in.take_over(ask, 0.0)
    on_taken(None)
    for num_meanwhile in (20, 6, FEW_TOKENS):
        # The destination reads what it knows, while the source goes on.
        for _ in range(num_meanwhile):
            assert write(source) == 1
        assert write(destination) == 1
        yield_ask, on_answer = destination.calls.yields.pop()
        assert yield_ask.num_known == answer.sequence.output_count - num_meanwhile
        assert yield_ask.at_most == FEW_TOKENS
        source.batch.moves_out.yield_asked(
            yield_ask.key, on_answer, num_known=yield_ask.num_known, at_most=yield_ask.at_most
        )
    # It has stopped for the last few, and only for these; the claim does not wait until they are read.
    assert write(source) == 0
    (claim,) = destination.calls.claims
    assert claim.num_outputs == answer.sequence.output_count == 3 + 20 + 6 + FEW_TOKENS
    assert write(destination) == 1
    assert destination.deltas.seen == []
    verdict = ClaimVerdict(key=claim_key(claim), granted=True, next_index=claim.num_outputs)
    assert destination.batch.moves_in.claim_answered(verdict)
    # One step writes the next token: all before it was read meanwhile.
    assert write(destination) == 1
    assert [(delta.index, delta.token_ids) for delta in destination.deltas.seen] == [(33, (token_at(33),))]


def test_a_destination_without_room_for_more_says_so_and_the_source_goes_on() -> None:
    source, destination = Side(num_blocks=64), Side(num_blocks=4, growth_tokens=1, own=OTHER)
    answer = running(source, 3)
    source.batch.moves_out.send_tokens(answer, OTHER)
    ask, on_taken = source.calls.taken_over.pop()
    destination.batch.moves_in.take_over(ask, 0.0)
    on_taken(None)
    for _ in range(40):
        write(source)
    write(destination)
    yield_ask, on_answer = destination.calls.yields.pop()
    source.batch.moves_out.yield_asked(
        yield_ask.key, on_answer, num_known=yield_ask.num_known, at_most=yield_ask.at_most
    )
    destination.assert_clean()
    (decline,) = destination.calls.declined
    assert (decline.destination, decline.target) == (OTHER, OWN.incarnation)
    # Somebody else's word does not count.
    source.batch.moves_out.declined(decline.key, OWN, "not asked")
    assert len(source.batch.moves_out) == 1
    source.batch.moves_out.declined(decline.key, decline.destination, decline.reason)
    assert (len(source.batch.moves_out), source.batch.move_outcomes["stayed"]) == (0, 1)
    assert write(source) == 1
    # It had let it go already.
    assert source.calls.cancelled == []


def test_a_source_that_stood_still_goes_on_when_the_destination_declines() -> None:
    source = Side(num_blocks=64)
    answer = running(source, 3)
    source.batch.moves_out.send_tokens(answer, OTHER)
    source.batch.moves_out.yield_asked(answer.sequence.key, lambda _: None, num_known=3, at_most=FEW_TOKENS)
    assert write(source) == 0
    source.batch.moves_out.declined(answer.sequence.key, OTHER, "its deadline")
    assert write(source) == 1
    assert len(source.batch.moves_out) == 0


# --- whatever is lost -----------------------------------------------------------------------------


@dataclass
class Message:
    deliver: Callable[[], object]
    #: Whoever sent it hears that, or nothing.
    lose: Callable[[TandemError], None]


@dataclass
class World:
    """One request, two workers, its gateway, and a network that loses, delays and reorders what it is drawn to."""

    data: st.DataObject
    source: Side = field(default_factory=lambda: Side(num_blocks=512))
    destination: Side = field(default_factory=lambda: Side(num_blocks=512, own=OTHER))
    now_s: float = 2.0
    wire: list[Message] = field(default_factory=list["Message"])
    dead: list[Side] = field(default_factory=list[Side])
    #: The gateway's: the epoch and worker that own the request, its tokens as the client has them.
    epoch: int = 1
    owner: Side = field(init=False)
    tokens: list[int] = field(default_factory=list[int])
    #: The owner said that it has lost it, or died: the gateway takes it up again elsewhere.
    is_replayed: bool = False
    #: The answer is as long as it may be.
    is_over: bool = False

    def __post_init__(self) -> None:
        self.owner = self.source
        self.tokens.append(FIRST)
        answer = running(self.source, 3)
        self.collect()
        self.source.batch.moves_out.send_tokens(answer, OTHER)
        self.collect()

    # --- the wire ---------------------------------------------------------------------------------

    def collect(self) -> None:
        """What both have said since is on its way; tokens are with the gateway at once."""
        for side, other in ((self.source, self.destination), (self.destination, self.source)):
            calls = side.calls
            for delta in side.deltas.seen:
                self.hear(side, delta)
            side.deltas.seen.clear()
            for ask, on_taken in calls.taken_over:
                self.call(side, other, partial(self.taken_over, ask), on_taken)
            calls.taken_over.clear()
            for yield_ask, on_rest in calls.yields:
                self.call(side, other, partial(self.yield_asked, yield_ask), on_rest)
            calls.yields.clear()
            for decline in calls.declined:
                self.tell(other, partial(self.declined, decline))
            calls.declined.clear()
            for key in calls.cancelled:
                self.tell(other, partial(other.batch.cancel, key, "taken back"))
            calls.cancelled.clear()
            for claim in calls.claims:
                self.wire.append(Message(partial(self.claimed, side, claim), lambda _: None))
            calls.claims.clear()

    def tell(self, to: Side, act: Callable[[], object]) -> None:
        self.wire.append(Message(lambda: None if to in self.dead else act(), lambda _: None))

    def call(
        self, by: Side, to: Side, act: Callable[[Callable[..., None]], None], on_answer: Callable[..., None]
    ) -> None:
        """`act` answers, now or later; the answer is on its way, too. A dead caller hears none."""
        told: list[bool] = []

        def hear(reply: object) -> None:
            if not told and by not in self.dead:
                told.append(True)
                on_answer(reply)

        def answer(reply: object) -> None:
            self.wire.append(Message(lambda: hear(reply), hear))

        self.wire.append(
            Message(lambda: answer(WorkerUnavailable("it is dead")) if to in self.dead else act(answer), hear)
        )

    def taken_over(self, ask: TakeOverRequest, answer: Callable[..., None]) -> None:
        try:
            self.destination.batch.moves_in.take_over(ask, self.now_s)
        except TandemError as error:
            answer(error)
        else:
            answer(None)

    def yield_asked(self, ask: YieldRequest, answer: Callable[..., None]) -> None:
        self.source.batch.moves_out.yield_asked(ask.key, answer, num_known=ask.num_known, at_most=ask.at_most)

    def declined(self, ask: DeclineRequest) -> None:
        self.source.batch.moves_out.declined(ask.key, ask.destination, ask.reason)

    # --- the gateway ------------------------------------------------------------------------------

    def hear(self, side: Side, delta: TokenDelta) -> None:
        if delta.owner_epoch != self.epoch or self.is_replayed:
            return
        assert side is self.owner, "two write under one epoch"
        if delta.error is not None:
            self.is_replayed = True
            return
        assert delta.index <= len(self.tokens), "a gap"
        for index, token in enumerate(delta.token_ids, delta.index):
            assert token == token_at(index)
            if index == len(self.tokens):
                self.tokens.append(token)
        if delta.finish is not None:
            self.is_over = True
            for worker in (self.source, self.destination):
                self.tell(worker, partial(worker.batch.cancel, key_under(self.epoch), "it is over"))

    def claimed(self, side: Side, claim: Claim) -> None:
        """`gateway.claims`, where all tokens have come."""
        if side in self.dead:
            return
        key = claim_key(claim)
        if self.is_replayed or self.is_over or (claim.num_outputs < len(self.tokens) and side is not self.owner):
            verdict = ClaimVerdict(key=key, granted=False, reason="behind")
        elif claim.owner_epoch == self.epoch + 1 or (claim.owner_epoch == self.epoch and side is self.owner):
            if claim.owner_epoch > self.epoch:
                former, former_key = self.owner, key_under(self.epoch)
                self.epoch, self.owner = claim.owner_epoch, side
                if former is not side:
                    self.tell(former, partial(former.batch.cancel, former_key, "it has moved"))
            verdict = ClaimVerdict(key=key, granted=True, next_index=len(self.tokens))
        else:
            verdict = ClaimVerdict(key=key, granted=False, reason="owner_epoch")
        self.tell(side, lambda: self.answered(side, verdict))

    def answered(self, side: Side, verdict: ClaimVerdict) -> None:
        for half in (side.batch.moves_in, side.batch.moves_out):
            if half.claim_answered(verdict):
                return
        if verdict.granted and not side.batch.has(verdict.key) and self.owner is side:
            # As `worker.moves` says it: what was granted is not here any more.
            self.is_replayed = True

    # --- what happens -----------------------------------------------------------------------------

    @property
    def living(self) -> list[Side]:
        return [side for side in (self.source, self.destination) if side not in self.dead]

    def pass_time(self, by_s: float) -> None:
        self.now_s += by_s
        for side in self.living:
            side.clock.time_s = self.now_s
            side.batch.moves_out.look(self.now_s)
            side.batch.moves_in.look(self.now_s)

    def kill(self, side: Side) -> None:
        self.dead.append(side)
        if self.owner is side:
            self.is_replayed = True

    def happen(self) -> None:
        what = self.data.draw(st.sampled_from(["write", "write", "read", "deliver", "deliver", "lose", "time", "die"]))
        if what == "die" and not self.dead and self.data.draw(st.integers(0, 4)) == 0:
            self.kill(self.data.draw(st.sampled_from([self.source, self.destination])))
        elif what in ("write", "read"):
            side = self.source if what == "write" else self.destination
            if side not in self.dead:
                write(side)
        elif what in ("deliver", "lose") and self.wire:
            message = self.wire.pop(self.data.draw(st.integers(0, len(self.wire) - 1)))
            if what == "deliver":
                message.deliver()
            else:
                message.lose(DeadlineExceeded("silence"))
        elif what == "time":
            self.pass_time(self.data.draw(st.sampled_from([0.05, 0.3, 1.0])))
        self.collect()

    def calm_down(self) -> None:
        """Nothing is lost any more: all that was begun ends, by its limits at the latest."""
        for number in range(600):
            while self.wire:
                self.wire.pop(0).deliver()
                self.collect()
            if not any(len(side.batch.moves_out) + len(side.batch.moves_in) for side in self.living):
                return
            # Then it is time that ends what is still open: the answer is not to be over by then.
            for side in self.living if number < 10 else ():
                write(side)
            self.collect()
            self.pass_time(0.25)
            self.collect()
        raise AssertionError(f"moves do not end: {self.living}")


def key_under(epoch: int) -> RequestKey:
    return RequestKey(RequestId("r"), Attempt(1), OwnerEpoch(epoch))


def claim_key(claim: Claim) -> RequestKey:
    return RequestKey(claim.request_id, claim.attempt, claim.owner_epoch)


@given(st.data())
def test_one_goes_on_and_the_client_has_each_token_once(data: st.DataObject) -> None:
    world = World(data)
    for _ in range(data.draw(st.integers(5, 60))):
        world.happen()
    world.calm_down()
    owner = world.owner
    event("replayed" if world.is_replayed else "over" if world.is_over else "still here")
    event("moved" if owner is world.destination else "stayed")
    assert world.tokens == [token_at(index) for index in range(len(world.tokens))]
    if world.is_replayed:
        return
    if world.is_over:
        for side in world.living:
            side.assert_clean()
        return
    # It writes on, and nobody else does.
    before = len(world.tokens)
    for _ in range(3):
        for side in world.living:
            write(side)
        world.collect()
    assert world.is_over or len(world.tokens) == before + 3
    assert world.tokens == [token_at(index) for index in range(len(world.tokens))]
    for side in world.living:
        if side is not owner:
            side.assert_clean()
