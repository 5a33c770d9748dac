"""The source's side of a move: a machine from events to instructions.

    OFFERED --taken--> COPYING --yield asked--> STOPPING --out of the step--> PAUSED --told to stop--> ended LEFT
    PAUSED --outcome unknown for a while--> CLAIMING --granted--> ended STAYED    --refused--> ended LEFT
    OFFERED, COPYING, STOPPING --refused / outgrown / too slow / the answer ended--> ended STAYED (or with the answer)
    any but CLAIMING --the reader let the lease, or the tokens, go and never claims it--> ended STAYED

The answer is written on until the destination asks for the rest, and that is little: of much it is told, and asks again
when it has read that. From then on the answer stands still, and who goes on is for the gateway to say: it grants the
first claim. A source that is not told to stop claims its own request back; so whatever is lost on the way, exactly one
side goes on. Where the gateway does not answer either, the source gives the answer up, and the gateway takes the
request up again elsewhere when it hears of that.

(Llumnix, OSDI'24, section 4.2: migration in stages. There the source commits, and an acknowledgement that comes too
late leaves two owners.)
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from contracts.failpoints import RarePath

#: What the copy may take while the answer is written on.
COPY_LIMIT_S = 60.0
#: After its last tokens left, or after the reader confirmed, a source waits so long to be told to stop.
CLAIM_BACK_AFTER_S = 1.0
#: Between two claims for the same, and how long they are repeated: longer than a gateway lets one wait for tokens that
#: are on their way.
CLAIM_INTERVAL_S = 0.25
CLAIM_PATIENCE_S = 5.0

_CLAIMED_BACK = RarePath("decode.claimed_back", "a source that heard nothing of its move claims its request back")
_STAYED = RarePath("decode.move_stayed", "a move ended with the request where it was")
_LEFT = RarePath("decode.move_left", "a request left for another worker")


class SourceState(Enum):
    OFFERED = "offered"
    COPYING = "copying"
    #: The rest was asked for; a step may still write it.
    STOPPING = "stopping"
    PAUSED = "paused"
    CLAIMING = "claiming"
    ENDED = "ended"


class Outcome(Enum):
    """The values are metric labels."""

    #: It is another worker's, or nobody's.
    LEFT = "left"
    STAYED = "stayed"
    #: Nobody could say.
    LOST = "lost"


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Taken:
    """The destination has it on its way."""


@dataclass(frozen=True, slots=True)
class NotTaken:
    reason: str


@dataclass(frozen=True, slots=True)
class YieldAsked:
    """The destination has all but the rest."""

    #: Tokens that it lacks.
    num_lacking: int = 0
    #: It is worth to stop for so many; None: for any number.
    at_most: int | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """No step computes it any more."""


@dataclass(frozen=True, slots=True)
class LeaseOver:
    """The lease that its KV moves under has ended; with `confirmed` the destination has all of it."""

    confirmed: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Declined:
    """The destination has let it go, and did not claim it."""

    reason: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The answer ended here, was cancelled, or lost its blocks: there is nothing to move."""

    reason: str


@dataclass(frozen=True, slots=True)
class Outgrown:
    """It needs more blocks than were offered."""


@dataclass(frozen=True, slots=True)
class ClaimAnswered:
    granted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """Time passed."""


SourceEvent = Taken | NotTaken | YieldAsked | Stopped | LeaseOver | Declined | Gone | Outgrown | ClaimAnswered | Look

# --- instructions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stop:
    """No further step computes it; answer with Stopped, at once where none does."""


@dataclass(frozen=True, slots=True)
class GiveMore:
    """Its tokens so far, to whoever asked; it is written on."""


@dataclass(frozen=True, slots=True)
class GiveRest:
    """The rest of its tokens, and of its KV, to the destination: also to whoever asks for it again."""


@dataclass(frozen=True, slots=True)
class GoOn:
    """It is written on here; with `claimed` under the epoch that was claimed."""

    claimed: bool = False


@dataclass(frozen=True, slots=True)
class TakeBack:
    """What was offered is withdrawn, as far as it stands."""

    reason: str


@dataclass(frozen=True, slots=True)
class ClaimBack:
    """Ask the gateway; answer with ClaimAnswered."""


@dataclass(frozen=True, slots=True)
class Discard:
    """The answer ends here, and nobody is told."""


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The answer fails here."""

    reason: str


@dataclass(frozen=True, slots=True)
class MoveOver:
    """The last instruction."""

    outcome: Outcome
    reason: str


SourceInstruction = Stop | GiveMore | GiveRest | GoOn | TakeBack | ClaimBack | Discard | GiveUp | MoveOver


class SourceMove:
    """One request on its way from here."""

    def __init__(self, now_s: float, *, stands_still: bool = False) -> None:
        """`stands_still`: it is not written anyway (it waits, or was stopped); there is nothing to yield."""
        self.state = SourceState.OFFERED
        self._stands_still = stands_still
        #: When `Look` is wanted; None exactly when it is over.
        self.due_s: float | None = now_s + COPY_LIMIT_S
        self._claims_end_s = 0.0

    def __repr__(self) -> str:
        return f"<SourceMove {self.state.value}>"

    @property
    def stopped(self) -> bool:
        """Nothing is written here any more, for now."""
        return self._stands_still or self.state in (SourceState.PAUSED, SourceState.CLAIMING)

    def handle(self, event: SourceEvent, now_s: float) -> list[SourceInstruction]:
        """The only thing that changes it."""
        if self.state is SourceState.ENDED:
            return []
        match event:
            case Gone(reason):
                # Once it has stopped here, it may be that it is gone because it is the destination's.
                taken_back = [] if self.stopped else [TakeBack(reason)]
                return [*taken_back, *self._end(Outcome.LEFT, reason)]
            case Look():
                return self._look(now_s)
            case ClaimAnswered():
                return self._claim_answered(event) if self.state is SourceState.CLAIMING else []
            case LeaseOver():
                return self._lease_over(event, now_s)
            case Taken():
                return self._taken(now_s)
            case NotTaken(reason):
                return self._stay(reason) if self.state is SourceState.OFFERED else []
            case YieldAsked():
                return self._yield_asked(event)
            case Declined(reason):
                # What it claims back may be granted by now; that it hears in any case.
                return [] if self.state is SourceState.CLAIMING else self._stay(reason)
            case Stopped():
                return self._stopped(now_s)
            case Outgrown():
                if self.stopped:
                    return []
                return [TakeBack("it outgrew what was offered"), *self._stay("it outgrew what was offered")]
            case _:
                assert_never(event)

    def _taken(self, now_s: float) -> list[SourceInstruction]:
        if self.state is not SourceState.OFFERED:
            return []
        if self._stands_still:
            self.state = SourceState.PAUSED
            self.due_s = now_s + CLAIM_BACK_AFTER_S
        else:
            self.state = SourceState.COPYING
        return []

    def _yield_asked(self, asked: YieldAsked) -> list[SourceInstruction]:
        match self.state:
            case SourceState.OFFERED | SourceState.COPYING if not self._stands_still:
                # The question may overtake the answer to the offer.
                if asked.at_most is not None and asked.num_lacking > asked.at_most:
                    return [GiveMore()]
                self.state = SourceState.STOPPING
                return [Stop()]
            case SourceState.PAUSED | SourceState.CLAIMING if not self._stands_still:
                return [GiveRest()]
            case _:
                return []

    def _stopped(self, now_s: float) -> list[SourceInstruction]:
        if self.state is not SourceState.STOPPING:
            return []
        self.state = SourceState.PAUSED
        self.due_s = now_s + CLAIM_BACK_AFTER_S
        return [GiveRest()]

    def _lease_over(self, over: LeaseOver, now_s: float) -> list[SourceInstruction]:
        if self.state is SourceState.CLAIMING:
            return []
        if over.confirmed and self.stopped:
            self.state = SourceState.PAUSED
            self.due_s = now_s + CLAIM_BACK_AFTER_S
            return []
        # It was never confirmed, so it will not be claimed.
        return self._stay(over.reason)

    def _look(self, now_s: float) -> list[SourceInstruction]:
        if self.due_s is None or now_s < self.due_s:
            return []
        match self.state:
            case SourceState.PAUSED:
                _CLAIMED_BACK.reached()
                self.state = SourceState.CLAIMING
                self._claims_end_s = now_s + CLAIM_PATIENCE_S
            case SourceState.CLAIMING if now_s >= self._claims_end_s:
                reason = f"no gateway said within {CLAIM_PATIENCE_S:g} s who goes on"
                return [TakeBack(reason), GiveUp(reason), *self._end(Outcome.LOST, reason)]
            case SourceState.CLAIMING:
                pass
            case _:
                reason = f"it was not copied within {COPY_LIMIT_S:g} s"
                return [TakeBack(reason), *self._stay(reason)]
        self.due_s = now_s + CLAIM_INTERVAL_S
        return [ClaimBack()]

    def _claim_answered(self, answer: ClaimAnswered) -> list[SourceInstruction]:
        if answer.granted:
            return [TakeBack("claimed back"), GoOn(claimed=True), *self._end(Outcome.STAYED, "claimed back")]
        return [Discard(), *self._end(Outcome.LEFT, answer.reason)]

    def _stay(self, reason: str) -> list[SourceInstruction]:
        stands = self.stopped or self.state is SourceState.STOPPING
        return [*([GoOn()] if stands else []), *self._end(Outcome.STAYED, reason)]

    def _end(self, outcome: Outcome, reason: str) -> list[SourceInstruction]:
        (_STAYED if outcome is Outcome.STAYED else _LEFT).reached()
        self.state = SourceState.ENDED
        self.due_s = None
        return [MoveOver(outcome, reason)]
