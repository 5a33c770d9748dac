"""What the scripted server does: its delays, what it does not know, and whom it treats badly."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What is done to one request. The mid-answer ones come after half of the tokens."""

    #: No byte of an answer, or one that is no stream.
    #: The connection is reset at accept, before the request was read: chosen by connection, not by request.
    CLOSE_AT_ACCEPT = "close_at_accept"
    RESET_BEFORE_STATUS = "reset_before_status"
    NEVER_ANSWERS = "never_answers"
    #: Bytes that are no HTTP.
    MALFORMED_HTTP = "malformed_http"
    #: 429 with `Retry-After` in seconds, or as a date.
    REJECT_SECONDS = "reject_seconds"
    REJECT_DATE = "reject_date"
    #: 503 and 500 with an OpenAI error object; 404 with plain text.
    UNAVAILABLE = "unavailable"
    SERVER_ERROR = "server_error"
    NOT_FOUND = "not_found"
    #: 200, and a page for people.
    HTML = "html"

    #: Answers that go wrong.
    RESET_MID_STREAM = "reset_mid_stream"
    #: Nothing more comes, and the connection stays open.
    STALLS = "stalls"
    #: The body ends properly, without finish_reason and [DONE].
    TRUNCATED = "truncated"
    #: A line that is no SSE field.
    MALFORMED_SSE = "malformed_sse"
    #: An event whose data is cut JSON.
    MALFORMED_JSON = "malformed_json"
    #: An `error` object in mid-answer, then [DONE].
    ERROR_EVENT = "error_event"
    #: Ends properly, without a token.
    EMPTY_ANSWER = "empty_answer"

    #: Odd, and whole all the same.
    #: The header lines come one by one, spread over the time to the first token.
    SLOW_HEADERS = "slow_headers"
    NO_USAGE = "no_usage"
    #: Ends with a finish_reason and the end of the body.
    NO_DONE = "no_done"
    #: [DONE], then the connection closes without the body's terminating chunk.
    NO_LAST_CHUNK = "no_last_chunk"
    #: Comment lines between the events, as proxies send to keep connections open.
    COMMENTS = "comments"
    CRLF = "crlf"
    USAGE_IN_EVERY_CHUNK = "usage_in_every_chunk"
    #: Every byte is a write of its own.
    BYTE_BY_BYTE = "byte_by_byte"


#: Request fields that a server may not know; `prompt_ids` is a prompt given as token ids.
REFUSABLE = ("ignore_eos", "min_tokens", "stream_options", "return_token_ids", "prompt_ids")


@dataclass(frozen=True, slots=True)
class FaultRule:
    """Whom a fault meets: requests (connections) by number, counted from 0 as they come, or a share of them."""

    fault: Fault
    numbers: frozenset[int] = frozenset()
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> FaultRule:
        """Reads `NAME=SHARE` or `NAME@3,5-9`. Raises ValueError."""
        name, sign, rest = text.partition("=" if "=" in text else "@")
        if name not in set(Fault) or not rest:
            raise ValueError(f"a fault is NAME=SHARE or NAME@NUMBERS, with a name of {', '.join(Fault)}; not {text!r}")
        if sign == "=":
            share = float(rest)
            if not 0 <= share <= 1:
                raise ValueError(f"a share lies between 0 and 1, {text!r} says {share}")
            return cls(Fault(name), share=share)
        numbers: set[int] = set()
        for part in rest.split(","):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
        return cls(Fault(name), numbers=frozenset(numbers))


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    model: str = "scripted"
    #: From the start of service to the first token, and from each chunk of tokens to the next.
    ttft_ms: float = 50.0
    itl_ms: float = 10.0
    tokens_per_chunk: int = 1
    #: Requests in service at a time; others wait, first come first served. None: any number.
    max_running: int | None = None
    #: Where an answer ends by itself; `ignore_eos` and `min_tokens` go beyond. None: at `max_tokens` only.
    natural_tokens: int | None = None
    max_model_len: int = 131_072
    #: What the chat template adds to the words of the messages.
    chat_overhead_tokens: int = 0
    #: Of `REFUSABLE`: a request that has one of these is answered with 400.
    refused_fields: frozenset[str] = frozenset()
    #: Kept connections are closed after so long without a request; None: never.
    idle_close_ms: float | None = None
    retry_after_s: int = 1
    faults: tuple[FaultRule, ...] = ()
    #: Of the draws of faults by share.
    seed: int = 0
    #: How many requests the log remembers: the last ones.
    max_log_entries: int = 50_000


class FaultChooser:
    """One draw for each number, in order: the same numbers meet the same faults in every run of a seed."""

    def __init__(self, rules: tuple[FaultRule, ...], seed: int) -> None:
        self._by_number = {number: rule.fault for rule in rules for number in rule.numbers}
        self._shares = [(rule.share, rule.fault) for rule in rules if rule.share]
        self._rng = random.Random(seed)

    def choose(self, number: int) -> Fault | None:
        if number in self._by_number:
            return self._by_number[number]
        if not self._shares:
            return None
        drawn = self._rng.random()
        for share, fault in self._shares:
            if drawn < share:
                return fault
            drawn -= share
        return None
