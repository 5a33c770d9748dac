"""What became of one request, as the client saw it. The hot path only notes times; figures are computed afterwards."""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, field
from enum import StrEnum


class Outcome(StrEnum):
    """How a request ended. All but the first four are failures, and the values are the kinds that reports count."""

    FINISHED = "finished"
    #: By the plan: the client went away in the middle of the answer.
    CANCELLED = "cancelled"
    #: The run was stopped (Ctrl-C) before it had ended.
    INTERRUPTED = "interrupted"
    #: In the plan, and never sent: the run was stopped before it was due.
    UNSENT = "unsent"

    #: Nobody listens at the address.
    REFUSED = "refused"
    CONNECT_TIMEOUT = "connect_timeout"
    #: Name not found, no route, TLS handshake failed.
    CONNECT_FAILED = "connect_failed"
    #: The connection was reset, or ended, before the status line.
    RESET_BEFORE_ANSWER = "reset_before_answer"
    #: The connection was reset, or ended, in mid-answer.
    RESET_MID_STREAM = "reset_mid_stream"
    #: The body ended properly, but the answer did not: no finish_reason and no [DONE].
    TRUNCATED = "truncated"
    #: No token within the limit.
    FIRST_TOKEN_TIMEOUT = "first_token_timeout"
    #: Not ended within the limit.
    TIMEOUT = "timeout"
    #: Status 429.
    REJECTED = "rejected"
    HTTP_4XX = "http_4xx"
    HTTP_5XX = "http_5xx"
    #: Redirects and other statuses that are no answer.
    HTTP_OTHER = "http_other"
    MALFORMED_HTTP = "malformed_http"
    #: A 200 that is no event stream, or lines that are none.
    MALFORMED_SSE = "malformed_sse"
    #: An event whose data is no JSON, or not the object that it should be.
    MALFORMED_JSON = "malformed_json"
    #: An `error` object in an event after status 200.
    ERROR_EVENT = "error_event"
    #: Ended well, with no token.
    NO_OUTPUT = "no_output"
    #: A turn of a chat that could not be: the one before it had failed.
    TURN_LOST = "turn_lost"
    #: A search for goodput did not wait for it: it had missed its target already.
    GIVEN_UP = "given_up"
    #: This machine has no file descriptor, port or memory left: the client is the bottleneck.
    CLIENT_LIMIT = "client_limit"

    @property
    def is_failure(self) -> bool:
        return self not in _NOT_FAILURES


_NOT_FAILURES = frozenset({Outcome.FINISHED, Outcome.CANCELLED, Outcome.INTERRUPTED, Outcome.UNSENT})


def _times() -> array[float]:
    return array("d")


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """Times are seconds since the start of the run on one monotonic clock; NaN: it did not come so far.

    Written by whoever carries the request out; `due_s` is the time that every latency counts from.
    """

    #: In the plan, over all turns of all items; the same in every run of one plan.
    index: int
    #: Item of the plan (a lone request, or a chat), and which of its turns.
    item: int
    turn: int
    slo_class: str
    #: As planned; of a later turn, with what was really answered before where that is known.
    prompt_tokens: int
    output_tokens: int
    #: The plan lets the client go after so many tokens; None: never.
    cancel_after_tokens: int | None = None
    #: Before the measured part: left out of every figure.
    is_warmup: bool = False

    #: Which part of a run it belongs to, where several servers have their turns; between parts nothing is offered.
    part: int = 0

    due_s: float = math.nan
    #: The client turned to it, for the first time.
    taken_s: float = math.nan
    #: The request's bytes were handed to the socket; of a retry, the last time.
    sent_s: float = math.nan
    #: Whether a new connection was opened for it, and how long that took.
    connect_s: float = math.nan
    #: Status line and headers were read.
    headers_s: float = math.nan
    #: Arrival of each chunk that carries at least one token, ascending.
    chunk_s: array[float] = field(default_factory=_times)
    #: The end of the answer was read, or it failed, or was given up.
    end_s: float = math.nan

    outcome: Outcome = Outcome.UNSENT
    #: For people, of a failure: what the server or the system said.
    detail: str = ""
    status: int | None = None
    #: Of a 429 or 503, where the server said it.
    retry_after_s: float | None = None
    #: How often it was sent again because the server had asked for it (`Retry-After`), and because a kept
    #: connection turned out to be closed.
    num_retries: int = 0
    num_stale_connections: int = 0
    finish_reason: str | None = None
    #: Token counts that the server reported; None: it did not.
    usage_prompt_tokens: int | None = None
    usage_output_tokens: int | None = None
    usage_cached_tokens: int | None = None
    #: Tokens in the chunks, where the chunks say it (token ids); None: unknown.
    counted_output_tokens: int | None = None
    #: The server's own account of its phases in milliseconds, where it gives one.
    server_phases_ms: dict[str, float] | None = None
    #: How often another worker went on with it, and how often it was taken up again after a failure; None: the server
    #: does not say it.
    num_moves: int | None = None
    num_replays: int | None = None

    @property
    def answered_tokens(self) -> int:
        """As the server reported, else as counted in the chunks, else one for each chunk."""
        for known in (self.usage_output_tokens, self.counted_output_tokens):
            if known is not None:
                return known
        return len(self.chunk_s)
