"""Responses that are no answer: which kind of failure they are, and what they tell people."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

import msgspec

from loadtest.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Of the body of such a response; what comes beyond is not read.
MAX_BODY_BYTES = 64 * 1024
#: Of what is shown of it.
MAX_DETAIL_CHARS = 300

_SECONDS = re.compile(r"\d{1,9}(\.\d{1,9})?")


def outcome_of_status(status: int) -> Outcome:
    """Of a status other than 200."""
    if status == 429:
        return Outcome.REJECTED
    return {4: Outcome.HTTP_4XX, 5: Outcome.HTTP_5XX}.get(status // 100, Outcome.HTTP_OTHER)


def retry_after_s(status: int, headers: Mapping[str, str]) -> float | None:
    """Of a 429 or 503; a date counts from the response's own `Date`, so that no clocks are compared."""
    text = headers.get("retry-after", "").strip()
    if status not in (429, 503) or not text:
        return None
    if _SECONDS.fullmatch(text):
        return float(text)
    until, now = _date(text), _date(headers.get("date", ""))
    return None if until is None or now is None else max(0.0, (until - now).total_seconds())


def detail_of(status: int, headers: Mapping[str, str], body: bytes) -> str:
    """For people: the message of an OpenAI error object, else how the body begins; one line, safe to print."""
    message = _message(body) or body[: 4 * MAX_DETAIL_CHARS].decode(errors="replace").strip()
    if status // 100 == 3:
        message = f"redirected to {headers.get('location', 'nowhere')}"
    return printable(message)


def printable(text: str) -> str:
    """With control characters escaped, and cut."""
    shown = text[:MAX_DETAIL_CHARS]
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in shown)


def error_message(error: object) -> str:
    """Of an `error` field: an object with a message, or anything else as it stands."""
    try:
        message = msgspec.convert(error, _ErrorObject).message
    except msgspec.ValidationError:
        message = error if isinstance(error, str) else msgspec.json.encode(error).decode()
    return printable(message)


class _ErrorObject(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: Any = None


def _message(body: bytes) -> str | None:
    try:
        error = msgspec.json.decode(body, type=_ErrorBody).error
    except (msgspec.DecodeError, RecursionError):
        return None
    return error_message(error) if error else None


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    # "-0000" is UTC of an unknown place, and comes back without a zone.
    return date.replace(tzinfo=UTC) if date.tzinfo is None else date
