"""Fills a request's record from what arrives: a pure state machine over status, body and end of one response."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from loadtest.http.chunks import decode_event, phases_ms, told_count
from loadtest.http.refusals import MAX_BODY_BYTES, detail_of, error_message, outcome_of_status, printable, retry_after_s
from loadtest.http.sse import EventParser, MalformedStream
from loadtest.prompts.bodies import Answer
from loadtest.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loadtest.http.chunks import Choice, Event, Usage
    from loadtest.record import RequestRecord

#: Of one streamed answer.
MAX_ANSWER_BYTES = 256 * 1024 * 1024

_DONE = b"[DONE]"
_WHOLE = (Outcome.FINISHED, Outcome.NO_OUTPUT, Outcome.ERROR_EVENT)


class AnswerReader:
    """Of one try of one request. Whoever moves the bytes calls the `on_` methods in order, and stops once `is_done`.

    All events of one `on_body` get one time: that of the call. With `keep_text`, what was answered can be sent back
    as a part of the next prompt.
    """

    __slots__ = (
        "_all_counted",
        "_counted_tokens",
        "_keep_text",
        "_now_s",
        "_num_bytes",
        "_parser",
        "_record",
        "_refused",
        "_refused_as",
        "_refused_headers",
        "_texts",
        "_token_ids",
        "is_done",
    )

    def __init__(self, record: RequestRecord, *, now_s: Callable[[], float], keep_text: bool) -> None:
        self._record = record
        self._now_s = now_s
        self._keep_text = keep_text
        self._parser = EventParser()
        self._num_bytes = 0
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        #: In token ids, and whether every chunk of tokens had them so far.
        self._counted_tokens = 0
        self._all_counted = True
        #: Of a response that is no answer: its kind, headers and body.
        self._refused_as: Outcome | None = None
        self._refused_headers: Mapping[str, str] = {}
        self._refused = b""
        #: The record is complete; nothing that comes later changes it.
        self.is_done = False

    @property
    def answer(self) -> Answer:
        """What came so far; without text unless it is kept."""
        ids = tuple(self._token_ids) if self._all_counted and self._token_ids else None
        return Answer("".join(self._texts), ids, self._record.usage_output_tokens)

    # --- sending -----------------------------------------------------------------------------------

    def on_connected(self, connect_s: float) -> None:
        """A new connection was opened for it, in so many seconds."""
        self._record.connect_s = connect_s

    def on_sent(self) -> None:
        """Its bytes were handed to the socket."""
        self._record.sent_s = self._now_s()

    def on_stale(self) -> None:
        """The kept connection that it was sent on turned out to be closed; it will be sent again."""
        self._record.num_stale_connections += 1

    @property
    def has_token(self) -> bool:
        return bool(self._record.chunk_s)

    @property
    def is_whole(self) -> bool:
        """Of one that is done: nothing but the end of the response is still to come."""
        return self._record.outcome in _WHOLE

    # --- what arrives ------------------------------------------------------------------------------

    def on_status(self, status: int, headers: Mapping[str, str]) -> None:
        """Status line and headers; names in lower case."""
        record = self._record
        record.headers_s = self._now_s()
        record.status = status
        if status != 200:
            self._refused_as = outcome_of_status(status)
            record.retry_after_s = retry_after_s(status, headers)
        elif not headers.get("content-type", "").lower().startswith("text/event-stream"):
            self._refused_as = Outcome.MALFORMED_SSE
        self._refused_headers = headers

    def on_body(self, data: bytes) -> None:
        now_s = self._now_s()
        if self._refused_as is not None:
            self._collect(data, now_s)
            return
        self._num_bytes += len(data)
        try:
            events = self._parser.feed(data)
        except MalformedStream as error:
            self._take_all(error.events, now_s)
            self._end(Outcome.MALFORMED_SSE, now_s, str(error))
            return
        self._take_all(events, now_s)
        if self._num_bytes > MAX_ANSWER_BYTES:
            self._end(Outcome.MALFORMED_SSE, now_s, f"an answer of more than {MAX_ANSWER_BYTES} bytes")

    def on_complete(self) -> None:
        """The response ended as HTTP says it should."""
        now_s = self._now_s()
        if self._refused_as is not None:
            self._end_refused(now_s)
        elif self._record.finish_reason is None:
            self._end(Outcome.TRUNCATED, now_s, "the body ended without finish_reason and [DONE]")
        else:
            self._end_well(now_s)

    def on_lost(self, outcome: Outcome, detail: str = "") -> None:
        """No more will come: the connection broke, or the client gave up."""
        now_s = self._now_s()
        # A status that was read says more than how its body broke off.
        if self._refused_as is not None and outcome.is_failure:
            self._end_refused(now_s)
        else:
            self._end(outcome, now_s, detail)

    # --- events ------------------------------------------------------------------------------------

    def _take_all(self, events: list[bytes], now_s: float) -> None:
        for data in events:
            if self.is_done:
                return
            if data == _DONE:
                self._end_well(now_s)
                return
            try:
                event = decode_event(data)
            except (msgspec.DecodeError, RecursionError) as error:
                shown = data[:200].decode(errors="replace")
                self._end(Outcome.MALFORMED_JSON, now_s, f"{error}: {shown}")
                return
            self._take(event, now_s)

    def _take(self, event: Event, now_s: float) -> None:
        if event.usage is not None:
            self._take_usage(event.usage)
        if event.timeline is not None or event.timings is not None:
            self._record.server_phases_ms = phases_ms(event)
            self._record.num_moves = told_count(event, "moves")
            self._record.num_replays = told_count(event, "replays")
        if event.choices:
            carries_tokens = False
            for choice in event.choices:
                carries_tokens |= self._take_choice(choice)
            if carries_tokens:
                self._record.chunk_s.append(now_s)
                if self._goes_away():
                    self._end(Outcome.CANCELLED, now_s)
        elif event.error is not None:
            self._end(Outcome.ERROR_EVENT, now_s, error_message(event.error))

    def _take_choice(self, choice: Choice) -> bool:
        """Whether it carries tokens."""
        if choice.finish_reason:
            self._record.finish_reason = choice.finish_reason
        delta, token_ids = choice.delta, choice.token_ids
        text = choice.text if delta is None else delta.text
        if not (text or token_ids or (delta is not None and delta.tool_calls)) and not _holds_text_back(choice):
            return False
        if token_ids is None:
            self._all_counted = False
        else:
            self._counted_tokens += len(token_ids)
        if self._keep_text:
            self._texts.append(text or "")
            self._token_ids += token_ids or ()
        return True

    def _take_usage(self, usage: Usage) -> None:
        record = self._record
        record.usage_prompt_tokens = usage.prompt_tokens
        record.usage_output_tokens = usage.completion_tokens
        details = usage.prompt_tokens_details
        record.usage_cached_tokens = None if details is None else details.cached_tokens

    def _goes_away(self) -> bool:
        """Whether the plan lets the client go after what came so far."""
        record = self._record
        if record.cancel_after_tokens is None:
            return False
        if self._all_counted:
            return self._counted_tokens >= record.cancel_after_tokens
        return max(record.usage_output_tokens or 0, len(record.chunk_s)) >= record.cancel_after_tokens

    # --- ends --------------------------------------------------------------------------------------

    def _collect(self, data: bytes, now_s: float) -> None:
        self._refused += data[: MAX_BODY_BYTES - len(self._refused)]
        if len(self._refused) == MAX_BODY_BYTES:
            self._end_refused(now_s)

    def _end_refused(self, now_s: float) -> None:
        assert self._refused_as is not None
        record = self._record
        detail = detail_of(record.status or 0, self._refused_headers, self._refused)
        if record.status == 200:
            detail = f"content-type {self._refused_headers.get('content-type', 'missing')}: {detail}"
        self._end(self._refused_as, now_s, detail)

    def _end_well(self, now_s: float) -> None:
        self._end(Outcome.FINISHED if self._record.chunk_s else Outcome.NO_OUTPUT, now_s)

    def _end(self, outcome: Outcome, now_s: float, detail: str = "") -> None:
        if self.is_done:
            return
        self.is_done = True
        record = self._record
        record.end_s = now_s
        record.outcome = outcome
        record.detail = printable(detail)
        if record.chunk_s and self._all_counted:
            record.counted_output_tokens = self._counted_tokens


def _holds_text_back(choice: Choice) -> bool:
    """Whether it stands for tokens whose text is not shown yet: not an opening, and not an end."""
    if choice.finish_reason or choice.token_ids is not None or choice.prompt_token_ids is not None:
        return False
    return choice.text is not None if choice.delta is None else choice.delta.role is None
