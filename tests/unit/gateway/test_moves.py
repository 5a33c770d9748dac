"""Claims on one request: exactly one worker has it, and the client's stream shows nothing of who that is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contracts.errors import DeadlineExceeded, NotReady
from contracts.ids import Attempt, GatewayId, Incarnation, OwnerEpoch, WorkerId
from contracts.messages import ClaimVerdict, Peer, RequestKey
from contracts.requests import Claim, ErrorInfo, GenerateRequest, SamplingParams
from gateway import events as ev
from gateway.claims import Outcome
from gateway.ownership import Phase, RequestMachine
from tests.unit.gateway.test_ownership import (
    DECODE,
    DECODE2,
    ID,
    OFF,
    ON,
    ONE,
    PREFILL,
    PREFILL2,
    TWO,
    cancels_of,
    delivered,
    delta,
    end_of,
    life,
    only,
    placement,
    received,
)

if TYPE_CHECKING:
    from gateway.limits import GatewayLimits

DECODE3 = Peer(worker_id=WorkerId("d3"), incarnation=Incarnation(1), address="d3:1")
FAILED = ErrorInfo(code="transfer_aborted", message="cut")


def machine(limits: GatewayLimits = ON, logprobs: int | None = None) -> RequestMachine:
    request = GenerateRequest(
        request_id=ID,
        gateway_id=GatewayId("g"),
        token_ids=(1, 2, 3),
        num_prompt_tokens=3,
        sampling=SamplingParams(max_tokens=100, logprobs=logprobs),
        deadline_s=10.0,
    )
    return RequestMachine(request, received_s=0.0, limits=limits)


def sent(
    prefill: Peer = PREFILL, decode: Peer = DECODE, limits: GatewayLimits = ON, logprobs: int | None = None
) -> RequestMachine:
    """Prefill is on its way."""
    request = machine(limits, logprobs)
    request.handle(ev.Placed(placement(prefill, decode)), 1.0)
    request.handle(ev.StreamsOpened(ONE), 1.0)
    return request


def running(
    num_tokens: int,
    prefill: Peer = PREFILL,
    decode: Peer = DECODE,
    limits: GatewayLimits = ON,
    logprobs: int | None = None,
) -> RequestMachine:
    """So many tokens were delivered, each its own index, the last at time `num_tokens`."""
    request = sent(prefill, decode, limits, logprobs)
    request.handle(ev.PrefillAccepted(ONE), 1.0)
    for index in range(num_tokens):
        request.handle(received(delta(index, index), decode if index else prefill), index + 1.0)
    return request


def claim(num_outputs: int, owner_epoch: int = 2, attempt: int = 1, *, reads: bool = False) -> Claim:
    return Claim(
        request_id=ID,
        attempt=Attempt(attempt),
        owner_epoch=OwnerEpoch(owner_epoch),
        num_outputs=num_outputs,
        reads=reads,
    )


def key(owner_epoch: int, attempt: int = 1) -> RequestKey:
    return RequestKey(ID, Attempt(attempt), OwnerEpoch(owner_epoch))


def granted(owner_epoch: int, next_index: int, attempt: int = 1) -> ClaimVerdict:
    return ClaimVerdict(key=key(owner_epoch, attempt), granted=True, next_index=next_index)


def verdicts_of(instructions: list[ev.Instruction]) -> list[tuple[Peer, str]]:
    return [(each.peer, each.outcome) for each in instructions if isinstance(each, ev.SendVerdict)]


# --- the grant --------------------------------------------------------------------------------------


def test_a_claim_is_the_commit() -> None:
    request = running(3)
    out = request.handle(ev.Claimed(DECODE2, claim(3)), 4.0)
    assert out == [
        ev.SendVerdict(DECODE2, granted(2, 3), "granted"),
        ev.SendCancel((DECODE,), key(1), "it has moved to d2"),
        ev.NoteMoved(WorkerId("d"), WorkerId("d2"), key(2), 3, 0),
    ]
    assert request.key == key(2)
    assert request.held is not None
    assert (request.held.decode, request.held.is_read) == ("d2", True)
    # Only the new owner is heard, under its epoch.
    assert delivered(request.handle(received(delta(3, 99), DECODE), 4.5)) == []
    assert delivered(request.handle(received(delta(3, 99, owner_epoch=2), DECODE), 4.5)) == []
    part = delta(3, 3, owner_epoch=2)
    assert request.handle(received(part, DECODE2), 5.0) == [ev.NoteMoveGap(2.0), ev.Deliver(part)]
    out = request.handle(received(delta(4, 4, owner_epoch=2, finish="length"), DECODE2), 6.0)
    assert delivered(out) == [4]
    timeline = end_of(out).timeline
    assert (timeline.num_moves, timeline.num_replays, timeline.decode_worker) == (1, 0, "d2")
    assert request.dropped == {"owner_epoch": 1, "worker": 1}


def test_a_request_moves_on_and_comes_back() -> None:
    request = running(2)
    for epoch, (source, destination) in enumerate([(DECODE, DECODE2), (DECODE2, DECODE3), (DECODE3, DECODE)], start=1):
        out = request.handle(ev.Claimed(destination, claim(epoch + 1, epoch + 1)), 4.0)
        assert verdicts_of(out) == [(destination, "granted")]
        assert only(out, ev.SendCancel) == ev.SendCancel(
            (source,), key(epoch), f"it has moved to {destination.worker_id}"
        )
        out = request.handle(received(delta(epoch + 1, epoch + 1, owner_epoch=epoch + 1), destination), 5.0)
        assert delivered(out) == [epoch + 1]
    end = end_of(request.handle(received(delta(5, 5, owner_epoch=4, finish="stop"), DECODE), 6.0))
    assert (end.timeline.num_moves, end.timeline.num_output_tokens) == (3, 6)


def test_a_repeated_claim_is_answered_the_same_though_the_answer_went_on() -> None:
    request = running(3)
    request.handle(ev.Claimed(DECODE2, claim(3)), 4.0)
    request.handle(received(delta(3, 3, owner_epoch=2), DECODE2), 5.0)
    assert request.handle(ev.Claimed(DECODE2, claim(3)), 5.0) == [ev.SendVerdict(DECODE2, granted(2, 3), "repeated")]
    assert request.key == key(2)


def test_the_first_claim_wins_whoever_makes_it() -> None:
    request = running(3)
    assert verdicts_of(request.handle(ev.Claimed(DECODE2, claim(3)), 4.0)) == [(DECODE2, "granted")]
    for late in (DECODE3, DECODE, life(DECODE2, 9)):
        (refused,) = request.handle(ev.Claimed(late, claim(3)), 4.0)
        assert isinstance(refused, ev.SendVerdict)
        assert refused.verdict == ClaimVerdict(key=key(2), granted=False, reason=Outcome.OWNER_EPOCH.text)
    assert request.held is not None
    assert request.held.decode == "d2"


def test_a_source_that_hears_nothing_claims_its_request_back() -> None:
    request = running(3)
    assert request.handle(ev.Claimed(DECODE, claim(3)), 4.0) == [
        ev.SendVerdict(DECODE, granted(2, 3), "claimed_back")
    ], "nobody has to forget it"
    assert verdicts_of(request.handle(ev.Claimed(DECODE2, claim(3)), 4.0)) == [(DECODE2, "owner_epoch")]
    assert delivered(request.handle(received(delta(3, 3, owner_epoch=2), DECODE), 5.0)) == [3]
    # And it may be moved again.
    assert verdicts_of(request.handle(ev.Claimed(DECODE2, claim(4, 3)), 5.0)) == [(DECODE2, "granted")]
    assert end_of(request.handle(ev.CancelAsked("gone"), 6.0)).timeline.num_moves == 1


RELATIONS = [
    ("at", "next", None),
    ("at", "same", "owner_epoch"),
    ("at", "old", "owner_epoch"),
    ("at", "far", "owner_epoch"),
    ("before", "next", "attempt"),
    ("after", "next", "attempt"),
]


@pytest.mark.parametrize(("attempt", "epoch", "refusal"), RELATIONS)
@pytest.mark.parametrize("phase", [Phase.SENDING, Phase.STREAMING])
def test_what_may_be_claimed_while_a_worker_has_it(phase: Phase, attempt: str, epoch: str, refusal: str | None) -> None:
    """On the second try, so that there is something before it."""
    request = running(3)
    request.handle(ev.WorkerLost(DECODE, "killed"), 4.0)
    request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 4.0)
    request.handle(ev.StreamsOpened(TWO), 4.0)
    if phase is Phase.STREAMING:
        request.handle(ev.PrefillAccepted(TWO), 4.0)
    assert request.phase is phase
    made = claim(3, {"next": 3, "same": 2, "old": 1, "far": 4}[epoch], {"at": 2, "before": 1, "after": 3}[attempt])
    out = request.handle(ev.Claimed(DECODE3, made), 5.0)
    assert verdicts_of(out) == [(DECODE3, refusal or "granted")]
    assert request.key == (key(3, 2) if refusal is None else key(2, 2))
    assert request.phase is (Phase.STREAMING if refusal is None else phase)


@pytest.mark.parametrize(("attempt", "epoch", "refusal"), RELATIONS)
@pytest.mark.parametrize("phase", [Phase.DISPATCHING, Phase.WAITING, Phase.OPENING, Phase.ENDED])
def test_nothing_may_be_claimed_while_nobody_has_it(phase: Phase, attempt: str, epoch: str, refusal: str) -> None:
    request = running(3)
    request.handle(ev.WorkerLost(DECODE, "killed"), 4.0)
    if phase is Phase.WAITING:
        request.handle(ev.Refused(NotReady("nobody")), 4.0)
    if phase in (Phase.OPENING, Phase.ENDED):
        request.handle(ev.Placed(placement(PREFILL2, DECODE2)), 4.0)
    if phase is Phase.ENDED:
        request.handle(ev.CancelAsked("gone"), 4.0)
    assert request.phase is phase
    present = request.request.attempt
    made_for = present + {"at": 0, "before": -1, "after": 1}[attempt]
    epochs = {"next": 1, "same": 0, "old": -1, "far": 2}
    before = request.key
    out = request.handle(ev.Claimed(DECODE3, claim(3, request.request.owner_epoch + epochs[epoch], made_for)), 5.0)
    expected = "over" if phase is Phase.ENDED else "attempt" if attempt != "at" else "nobody"
    assert verdicts_of(out) == [(DECODE3, expected)]
    assert request.key == before
    assert len(out) == 1


# --- prompts that nobody has read -------------------------------------------------------------------


def test_a_prompt_that_waits_moves_to_another_prefill_worker() -> None:
    request = sent()
    request.handle(ev.PrefillAccepted(ONE), 1.0)
    out = request.handle(ev.Claimed(PREFILL2, claim(0, reads=True)), 2.0)
    assert verdicts_of(out) == [(PREFILL2, "granted")]
    assert only(out, ev.SendCancel) == ev.SendCancel((PREFILL,), key(1), "it has moved to p2")
    held = request.held
    assert held is not None
    assert (held.prefill, held.decode, held.is_read) == ("p2", "d", False)
    # Both sides write under the new epoch.
    assert delivered(request.handle(received(delta(0, 0, owner_epoch=2), PREFILL2), 3.0)) == [0]
    assert delivered(request.handle(received(delta(1, 1, owner_epoch=2), DECODE), 4.0)) == [1]
    out = request.handle(ev.CancelAsked("gone"), 5.0)
    assert cancels_of(out) == [ev.SendCancel((PREFILL2, DECODE), key(2), "gone")]


def test_a_prompt_of_a_mixed_worker_is_decoded_where_it_is_read() -> None:
    request = sent(PREFILL, PREFILL)
    request.handle(ev.Claimed(DECODE2, claim(0, reads=True)), 2.0)
    held = request.held
    assert held is not None
    assert (held.prefill, held.decode) == ("d2", "d2")
    out = request.handle(received(delta(0, 0, 1, owner_epoch=2, finish="length"), DECODE2), 3.0)
    assert delivered(out) == [0, 1]


def test_a_prompt_that_was_read_cannot_be_claimed_unread() -> None:
    request = running(1)
    assert verdicts_of(request.handle(ev.Claimed(PREFILL2, claim(1, reads=True)), 2.0)) == [(PREFILL2, "read")]


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize(
    "answer",
    [
        ev.PrefillAccepted(ONE),
        ev.PrefillFailed(ONE, DeadlineExceeded("no answer")),
        ev.PrefillFailed(ONE, NotReady("draining")),
    ],
)
def test_what_moved_before_prefill_was_answered_has_been_taken(answer: ev.Event, reads: bool) -> None:
    request = sent()
    out = request.handle(ev.Claimed(DECODE2, claim(0, reads=reads)), 2.0)
    assert only(out, ev.Accept)
    assert cancels_of(out), "it overtakes nothing: who claims shows that Prefill was taken"
    assert request.handle(answer, 3.0) == []
    assert request.phase is Phase.STREAMING
    assert cancels_of(request.handle(ev.CancelAsked("gone"), 4.0))
    assert request.over


# --- the order of tokens ----------------------------------------------------------------------------


def test_a_claim_waits_for_the_tokens_that_were_written_before_it() -> None:
    request = running(2)
    assert request.handle(ev.Claimed(DECODE2, claim(4)), 3.0) == [ev.StartGapTimer()]
    assert delivered(request.handle(received(delta(2, 2)), 3.0)) == [2]
    assert request.key == key(1)
    out = request.handle(received(delta(3, 3)), 3.0)
    assert delivered(out) == [3]
    assert verdicts_of(out) == [(DECODE2, "granted")]
    assert out[-1] == ev.StopGapTimer()
    assert request.handle(ev.GapExpired(), 6.0) == []


def test_it_waits_for_the_first_token_of_the_prefill_worker_too() -> None:
    request = sent()
    request.handle(received(delta(1, 1)), 2.0)
    assert request.handle(ev.Claimed(DECODE2, claim(2)), 2.0) == [ev.StartGapTimer()]
    out = request.handle(received(delta(0, 0), PREFILL), 2.0)
    assert delivered(out) == [0, 1]
    assert verdicts_of(out) == [(DECODE2, "granted")]


def test_the_answers_end_comes_before_its_move() -> None:
    request = running(2)
    request.handle(ev.Claimed(DECODE2, claim(4)), 3.0)
    out = request.handle(received(delta(2, 2, finish="stop")), 3.0)
    assert end_of(out).error is None
    assert verdicts_of(out) == [(DECODE2, "over")]


LOSSES: list[ev.Event] = [
    ev.GapExpired(),
    ev.WorkerLost(DECODE, "killed"),
    received(delta(2, finish="error", error=FAILED)),
    received(delta(2, finish="cancelled")),
]


@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_that_never_come_are_written_again_by_the_claimer(loss: ev.Event) -> None:
    request = running(2, limits=OFF)
    request.handle(ev.Claimed(DECODE2, claim(4)), 3.0)
    request.handle(received(delta(3, 99)), 3.0)
    out = request.handle(loss, 4.0)
    assert only(out, ev.SendVerdict).verdict == granted(2, 2)
    assert only(out, ev.NoteMoved).num_missing == 2
    assert out[-1] == ev.StopGapTimer()
    assert not [each for each in out if isinstance(each, ev.NoteReplay | ev.End)]
    for index in (2, 3, 4):
        out = request.handle(received(delta(index, index, owner_epoch=2), DECODE2), 5.0)
        assert delivered(out) == [index], "nothing of the former owner is left"


@pytest.mark.parametrize("loss", LOSSES)
def test_with_log_probabilities_it_is_replayed(loss: ev.Event) -> None:
    """What the claimer would compute again differs in its last bits from what the client may have."""
    request = running(2, logprobs=0)
    request.handle(ev.Claimed(DECODE2, claim(4)), 3.0)
    out = request.handle(loss, 4.0)
    assert only(out, ev.NoteReplay)
    assert verdicts_of(out) == [(DECODE2, "attempt")]
    assert only(out, ev.StopGapTimer)
    assert verdicts_of(request.handle(ev.Claimed(DECODE2, claim(4)), 5.0)) == [(DECODE2, "attempt")]


def test_a_lost_prefill_worker_whose_token_is_missing_is_no_loss_either() -> None:
    request = sent(limits=OFF)
    request.handle(ev.Claimed(DECODE2, claim(2)), 2.0)
    out = request.handle(ev.WorkerLost(PREFILL, "killed"), 2.0)
    assert only(out, ev.SendVerdict).verdict == granted(2, 0)


def test_a_claimer_that_is_lost_claims_nothing() -> None:
    request = running(2)
    request.handle(ev.Claimed(DECODE2, claim(3)), 3.0)
    assert request.handle(ev.WorkerLost(DECODE2, "killed"), 3.0) == [ev.StopGapTimer()]
    assert delivered(request.handle(received(delta(2, 2)), 3.0)) == [2]
    assert request.key == key(1)
    assert verdicts_of(request.handle(ev.Claimed(DECODE, claim(3)), 3.0)) == [(DECODE, "claimed_back")]


def test_a_claimer_that_gives_up_claims_nothing() -> None:
    request = running(2)
    request.handle(ev.Claimed(DECODE2, claim(3)), 3.0)
    gave_up = delta(3, owner_epoch=2, finish="error", error=FAILED)
    assert request.handle(received(gave_up, DECODE2), 3.0) == [ev.StopGapTimer()]
    assert verdicts_of(request.handle(received(delta(2, 2)), 3.0)) == []
    assert request.key == key(1)


def test_rivals_wait_for_what_becomes_of_the_first() -> None:
    """The source claims back while the destination's claim waits: were it refused at once, and the destination lost,
    nobody would have the request."""
    request = running(2)
    request.handle(ev.Claimed(DECODE2, claim(3)), 3.0)
    assert request.handle(ev.Claimed(DECODE, claim(3)), 3.0) == [ev.StartGapTimer()]
    request.handle(ev.WorkerLost(DECODE2, "killed"), 3.0)
    out = request.handle(received(delta(2, 2)), 3.0)
    assert verdicts_of(out) == [(DECODE, "claimed_back")]

    request = running(2)
    for rival in (DECODE2, DECODE3, DECODE):
        request.handle(ev.Claimed(rival, claim(3)), 3.0)
    out = request.handle(received(delta(2, 2)), 3.0)
    assert verdicts_of(out) == [(DECODE2, "granted"), (DECODE3, "owner_epoch"), (DECODE, "owner_epoch")]


def test_a_source_that_fails_does_not_get_its_own_claim() -> None:
    request = sent()
    request.handle(received(delta(1, 1)), 2.0)
    request.handle(ev.Claimed(DECODE, claim(2)), 2.0)
    out = request.handle(received(delta(2, finish="error", error=FAILED)), 2.0)
    assert only(out, ev.NoteReplay)
    assert verdicts_of(out) == [], "who failed waits for nothing"


def test_a_claim_without_tokens_that_the_owner_wrote_is_refused() -> None:
    """Its move was given up, and the owner went on: nobody knows whether the claimer still has it."""
    request = running(4)
    assert verdicts_of(request.handle(ev.Claimed(DECODE2, claim(3)), 5.0)) == [(DECODE2, "behind")]
    assert delivered(request.handle(received(delta(4, 4)), 5.0)) == [4]


def test_a_claim_that_is_passed_while_it_waits_is_refused() -> None:
    request = running(2)
    request.handle(ev.Claimed(DECODE2, claim(3)), 3.0)
    out = request.handle(received(delta(2, 2, 3)), 3.0)
    assert verdicts_of(out) == [(DECODE2, "behind")]
    assert out[-1] == ev.StopGapTimer()


def test_the_owner_itself_may_claim_with_fewer() -> None:
    request = running(4)
    out = request.handle(ev.Claimed(DECODE, claim(3)), 5.0)
    assert only(out, ev.SendVerdict) == ev.SendVerdict(DECODE, granted(2, 4), "claimed_back")


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        (ev.CancelAsked("gone"), "over"),
        (ev.DeadlinePassed(10.0), "over"),
        (ev.Overflowed(9), "over"),
        (ev.WorkerLost(PREFILL, "killed"), None),
    ],
)
def test_every_end_answers_the_claims_that_wait(end: ev.Event, outcome: str | None) -> None:
    request = running(2)
    request.handle(ev.Claimed(DECODE2, claim(3)), 3.0)
    request.handle(ev.Claimed(DECODE3, claim(3)), 3.0)
    out = request.handle(end, 4.0)
    assert verdicts_of(out) == ([] if outcome is None else [(DECODE2, outcome), (DECODE3, outcome)])


# --- after the grant --------------------------------------------------------------------------------


def moved(limits: GatewayLimits = ON) -> RequestMachine:
    request = running(3, limits=limits)
    request.handle(ev.Claimed(DECODE2, claim(3)), 4.0)
    return request


def test_what_a_former_owner_still_says_is_dropped_and_answered() -> None:
    request = moved()
    assert request.handle(received(delta(3, 99)), 5.0) == [ev.AnswerStray(DECODE, key(1))]
    for last in (delta(3, finish="error", error=FAILED), delta(3, 99, finish="stop"), delta(3, finish="cancelled")):
        assert request.handle(received(last), 5.0) == [], "it has stopped"
    assert request.dropped == {"owner_epoch": 4}
    assert request.handle(received(delta(0, 0), PREFILL), 5.0) == [ev.AnswerStray(PREFILL, key(1))]


@pytest.mark.parametrize("lost", [PREFILL, DECODE])
def test_a_former_owner_may_be_lost(lost: Peer) -> None:
    assert moved().handle(ev.WorkerLost(lost, "killed"), 5.0) == []


@pytest.mark.parametrize(
    "loss",
    [
        ev.WorkerLost(DECODE2, "killed"),
        received(delta(3, owner_epoch=2, finish="error", error=FAILED), DECODE2),
        received(delta(3, owner_epoch=2, finish="cancelled"), DECODE2),
    ],
)
def test_the_new_owner_may_not(loss: ev.Event) -> None:
    request = moved()
    out = request.handle(loss, 5.0)
    assert only(out, ev.NoteReplay)
    assert request.key == key(3, attempt=2)
    assert [(each.peers, each.key) for each in cancels_of(out)] == [((PREFILL,), key(1)), ((DECODE2,), key(2))]


def test_each_worker_is_told_by_the_key_that_it_knows() -> None:
    """The prefill worker may still hold what it offered, under the first epoch."""
    out = moved().handle(ev.CancelAsked("gone"), 5.0)
    assert cancels_of(out) == [
        ev.SendCancel((PREFILL,), key(1), "gone"),
        ev.SendCancel((DECODE2,), key(2), "gone"),
    ]


def test_a_mixed_worker_that_got_its_request_back_is_told_by_both_keys() -> None:
    request = running(2, PREFILL, PREFILL)
    request.handle(ev.Claimed(DECODE2, claim(2)), 3.0)
    request.handle(ev.Claimed(PREFILL, claim(2, 3)), 3.0)
    out = request.handle(ev.CancelAsked("gone"), 4.0)
    assert [(each.peers, each.key) for each in cancels_of(out)] == [((PREFILL,), key(1)), ((PREFILL,), key(3))]


def test_a_try_after_a_move_starts_anew() -> None:
    request = moved()
    request.handle(ev.WorkerLost(DECODE2, "killed"), 5.0)
    request.handle(ev.Placed(placement(PREFILL2, DECODE3)), 5.0)
    sent_again = only(request.handle(ev.StreamsOpened(TWO), 5.0), ev.SendPrefill).request
    assert (sent_again.attempt, sent_again.owner_epoch, sent_again.token_ids) == (2, 3, (1, 2, 3, 0, 1, 2))
    assert request.handle(ev.PrefillAccepted(TWO), 5.0) == []
    assert verdicts_of(request.handle(ev.Claimed(DECODE2, claim(3)), 5.0)) == [(DECODE2, "attempt")]
    part = delta(3, 3, attempt=2, owner_epoch=3)
    assert request.handle(received(part, PREFILL2), 7.0) == [ev.NoteResumed(2.0), ev.Deliver(part)]
    out = request.handle(ev.CancelAsked("gone"), 8.0)
    assert cancels_of(out) == [ev.SendCancel((PREFILL2, DECODE3), key(3, attempt=2), "gone")]
