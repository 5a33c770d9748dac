"""The destination's side of a move: a machine from events to instructions.

    COMING --all but the rest is here--> ASKING --rest told--> REST --rest is here--> CLAIMING --granted--> OWNER
    ASKING --too much to stop for: more told, the source writes on--> COMING
    any --refused / lost / cancelled--> ENDED

While it comes, the request is another worker's, and nothing of it is written here. It is this worker's once the gateway
has granted the claim. A claim that is not answered is repeated; in the end the request is given up under the claimed
epoch: had the claim been granted, the gateway takes the request up again elsewhere, else it never hears of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, assert_never

from contracts.errors import DeadlineExceeded, NotReady, TandemError, WorkerUnavailable
from contracts.failpoints import RarePath
from decode.moves.source import CLAIM_INTERVAL_S, CLAIM_PATIENCE_S, COPY_LIMIT_S

if TYPE_CHECKING:
    from contracts.requests import TokenDelta

#: The source is asked for the rest so often, and so long after a failure again.
MOST_YIELD_ASKS = 3
YIELD_AGAIN_AFTER_S = 0.1
#: From the answer to that until the rest is here.
REST_LIMIT_S = 10.0
#: What is read here comes in rounds: each reads what the source wrote during the last one. The source stops for so few
#: tokens: a step that reads these takes about as long as one that writes one (both read all weights once), and it runs
#: while the claim is on its way. In fewer rounds than the limit the rest of an answer of any length shrinks to that, or
#: it does not shrink any more.
FEW_TOKENS = 4
MOST_ROUNDS = 8

_REFUSED = RarePath("decode.claim_refused", "a claim was refused: the request is another's, or over")
_CLAIMED_AGAIN = RarePath("decode.claimed_again", "a claim was not answered and is repeated")
_NOT_COME = RarePath("decode.move_not_come", "a request that was on its way did not come")

#: After these the source may still have it.
_RETRIED = (DeadlineExceeded, WorkerUnavailable, NotReady)


class DestinationState(Enum):
    COMING = "coming"
    ASKING = "asking"
    #: The source has stopped; the rest is on its way.
    REST = "rest"
    CLAIMING = "claiming"
    OWNER = "owner"
    ENDED = "ended"


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All that was told of so far is here."""


@dataclass(frozen=True, slots=True)
class Yielded:
    """The source has stopped. `rest`: the tokens that it wrote since it offered the request."""

    rest: TokenDelta | None


@dataclass(frozen=True, slots=True)
class GoesOn:
    """The source has too much more to stop for it, and writes on."""

    #: What it wrote since it offered the request.
    more: TokenDelta
    #: Tokens of these that are new here.
    num_new: int


@dataclass(frozen=True, slots=True)
class NotYielded:
    error: TandemError


@dataclass(frozen=True, slots=True)
class Complete:
    """All tokens are known, and their KV is here or can be computed."""


@dataclass(frozen=True, slots=True)
class Gone:
    """It was cancelled by who knows whose it is, or its KV will not come."""

    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """It cannot be written here, of which nobody knows yet: its deadline, a step that failed, this worker's end."""

    reason: str


@dataclass(frozen=True, slots=True)
class ClaimAnswered:
    granted: bool
    next_index: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Look:
    """Time passed."""


DestinationEvent = CaughtUp | Yielded | GoesOn | NotYielded | Complete | Gone | Lost | ClaimAnswered | Look

# --- instructions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskYield:
    """Answer with Yielded, GoesOn or NotYielded."""

    #: The source is to go on if it has more tokens than these; None: to stop in any case.
    at_most: int | None = None


@dataclass(frozen=True, slots=True)
class TakeRest:
    """Note these tokens, if they do not come with the KV; answer with Complete when nothing else lacks."""

    rest: TokenDelta | None


@dataclass(frozen=True, slots=True)
class TakeMore:
    """Note these tokens, and read them; answer with CaughtUp."""

    more: TokenDelta


@dataclass(frozen=True, slots=True)
class ClaimIt:
    """Ask the gateway; answer with ClaimAnswered."""


@dataclass(frozen=True, slots=True)
class Own:
    """Write it from now on. Its client has the output tokens before `next_index`."""

    next_index: int


@dataclass(frozen=True, slots=True)
class Drop:
    """It is not this worker's, and what came of it is let go."""

    reason: str
    was_claimed: bool = False
    #: The source does not know, and waits for it.
    tell_source: bool = False


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Tell the gateway that this worker, should it be the owner, has lost it; and drop it."""

    reason: str


DestinationInstruction = AskYield | TakeRest | TakeMore | ClaimIt | Own | Drop | GiveUp


class DestinationMove:
    """One request on its way to here."""

    def __init__(self, now_s: float, *, in_rounds: bool = False) -> None:
        """`in_rounds`: its tokens are read here before the source is asked for more; else its KV comes."""
        self.state = DestinationState.COMING
        #: When `Look` is wanted; None once it is over.
        self.due_s: float | None = now_s + COPY_LIMIT_S
        self._copy_end_s = now_s + COPY_LIMIT_S
        self._in_rounds = in_rounds
        self._num_rounds = 0
        #: Tokens that the last round brought; None: there was none.
        self._num_last: int | None = None
        #: In this round.
        self._num_asks = 0
        #: The last question failed; the next is due at `due_s`.
        self._asks_again = False
        self._claims_end_s = 0.0

    def __repr__(self) -> str:
        return f"<DestinationMove {self.state.value}>"

    @property
    def is_over(self) -> bool:
        return self.state in (DestinationState.OWNER, DestinationState.ENDED)

    def handle(self, event: DestinationEvent, now_s: float) -> list[DestinationInstruction]:
        """The only thing that changes it."""
        if self.is_over:
            return []
        match event:
            case Gone(reason):
                return self._drop(reason)
            case Lost(reason):
                if self.state is not DestinationState.CLAIMING:
                    return self._drop(reason, tell_source=True)
                # It may have been granted: nobody else would go on with it then.
                self._end()
                return [GiveUp(reason)]
            case CaughtUp():
                return self._ask(now_s) if self.state is DestinationState.COMING else []
            case Yielded(rest):
                if self.state is not DestinationState.ASKING:
                    return []
                self.state, self.due_s = DestinationState.REST, now_s + REST_LIMIT_S
                return [TakeRest(rest)]
            case GoesOn():
                return self._goes_on(event) if self.state is DestinationState.ASKING else []
            case NotYielded(error):
                return self._not_yielded(error, now_s) if self.state is DestinationState.ASKING else []
            case Complete():
                if self.state is DestinationState.CLAIMING:
                    return []
                self.state = DestinationState.CLAIMING
                self._claims_end_s = now_s + CLAIM_PATIENCE_S
                self.due_s = now_s + CLAIM_INTERVAL_S
                return [ClaimIt()]
            case ClaimAnswered():
                return self._claim_answered(event) if self.state is DestinationState.CLAIMING else []
            case Look():
                return self._look(now_s)
            case _:
                assert_never(event)

    def _ask(self, now_s: float) -> list[DestinationInstruction]:
        self.state = DestinationState.ASKING
        self._num_asks += 1
        self._asks_again = False
        self.due_s = now_s + COPY_LIMIT_S
        return [AskYield(FEW_TOKENS if self._in_rounds else None)]

    def _goes_on(self, told: GoesOn) -> list[DestinationInstruction]:
        self.state, self.due_s = DestinationState.COMING, self._copy_end_s
        self._num_asks = 0
        self._num_rounds += 1
        shrinks = self._num_last is None or told.num_new < self._num_last
        self._num_last = told.num_new
        if not shrinks or self._num_rounds >= MOST_ROUNDS:
            # Further rounds would not bring it down: what is written during this one is waited for.
            self._in_rounds = False
        return [TakeMore(told.more)]

    def _not_yielded(self, error: TandemError, now_s: float) -> list[DestinationInstruction]:
        may_have_it = isinstance(error, _RETRIED)
        if not may_have_it or self._num_asks >= MOST_YIELD_ASKS:
            return self._drop(f"its source does not yield it: {error.message}", tell_source=may_have_it)
        self._asks_again = True
        self.due_s = now_s + YIELD_AGAIN_AFTER_S
        return []

    def _claim_answered(self, answer: ClaimAnswered) -> list[DestinationInstruction]:
        if not answer.granted:
            _REFUSED.reached()
            return self._drop(f"the gateway refused the claim: {answer.reason}")
        self.state, self.due_s = DestinationState.OWNER, None
        return [Own(answer.next_index)]

    def _look(self, now_s: float) -> list[DestinationInstruction]:
        if self.due_s is None or now_s < self.due_s:
            return []
        match self.state:
            case DestinationState.CLAIMING if now_s < self._claims_end_s:
                _CLAIMED_AGAIN.reached()
                self.due_s = now_s + CLAIM_INTERVAL_S
                return [ClaimIt()]
            case DestinationState.CLAIMING:
                self._end()
                return [GiveUp(f"no gateway answered its claim within {CLAIM_PATIENCE_S:g} s")]
            case DestinationState.ASKING if self._asks_again:
                return self._ask(now_s)
            case _:
                return self._drop(f"it did not come in time: {self.state.value}", tell_source=True)

    def _drop(self, reason: str, *, tell_source: bool = False) -> list[DestinationInstruction]:
        was_claimed = self.state is DestinationState.CLAIMING
        self._end()
        return [Drop(reason, was_claimed, tell_source)]

    def _end(self) -> None:
        _NOT_COME.reached()
        self.state, self.due_s = DestinationState.ENDED, None
