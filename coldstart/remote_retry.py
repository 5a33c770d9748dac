"""When a request to an object store is asked again, and when it is given up. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Fault(Enum):
    """How a request for a range failed."""

    BROKEN = "the connection broke"
    TIMEOUT = "it did not answer in time"
    THROTTLED = "it asks to be asked less (HTTP 429 or 503)"
    SERVER = "it failed (HTTP 5xx)"
    SHORT = "it sent fewer bytes than it announced"
    WRONG_RANGE = "it answered with another range than was asked for"
    NO_RANGES = "it answers a range with the whole file (HTTP 200)"
    GONE = "it is gone (HTTP 404)"
    CHANGED = "it was changed since it was opened"
    DENIED = "it denied access; look at the credentials in the environment"
    REFUSED = "it refused the request"


#: What may be otherwise a moment later.
_PASSING = frozenset({Fault.BROKEN, Fault.TIMEOUT, Fault.THROTTLED, Fault.SERVER, Fault.SHORT, Fault.WRONG_RANGE})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrySettings:
    #: Failures in a row that brought no byte; one that brought some begins the count anew.
    max_fruitless: int = 6
    first_backoff_s: float = 0.1
    #: Instead of `first_backoff_s` where the store asks to be asked less.
    throttled_backoff_s: float = 1.0
    max_backoff_s: float = 15.0


@dataclass(frozen=True, slots=True, kw_only=True)
class NextStep:
    #: None: give up.
    retry_after_s: float | None
    reason: str


def next_step(
    fault: Fault, *, num_fruitless: int, left_s: float, chance: float, settings: RetrySettings = RetrySettings()
) -> NextStep:
    """What follows a failure.

    `num_fruitless` counts failures in a row without a new byte, this one included (0: this one brought some); `left_s`
    is the time until the read's deadline; `chance` in [0, 1) spreads the waits of many readers over their upper half
    ("equal jitter", AWS architecture blog 2015).
    """
    if fault not in _PASSING:
        return NextStep(retry_after_s=None, reason=fault.value)
    if num_fruitless >= settings.max_fruitless:
        return NextStep(retry_after_s=None, reason=f"{fault.value}, {num_fruitless} times in a row")
    first_s = settings.throttled_backoff_s if fault is Fault.THROTTLED else settings.first_backoff_s
    backoff_s = min(settings.max_backoff_s, first_s * 2.0 ** max(0, num_fruitless - 1))
    wait_s = backoff_s * (0.5 + 0.5 * chance)
    if wait_s >= left_s:
        return NextStep(retry_after_s=None, reason=f"{fault.value}, and the read's time is over")
    return NextStep(retry_after_s=wait_s, reason=fault.value)
