"""Reads requests as an OpenAI-compatible server does, and says what is wrong with them."""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import orjson

from tests.support.scripted_server.script import Fault

if TYPE_CHECKING:
    from tests.support.scripted_server.script import Behaviour

#: As the OpenAI API has it, of a completion that does not say.
_DEFAULT_MAX_TOKENS = 16


class BadRequest(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A generation request that is in order."""

    number: int
    is_chat: bool
    is_stream: bool
    wants_usage: bool
    #: Usage so far in every event.
    wants_continuous_usage: bool
    wants_token_ids: bool
    prompt_tokens: int
    output_tokens: int
    finish_reason: str
    fault: Fault | None

    @property
    def id(self) -> str:
        return f"{'chatcmpl' if self.is_chat else 'cmpl'}-{self.number}"


def read_object(body: bytes) -> dict[str, Any]:
    try:
        document: object = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(400, f"the body is no JSON: {error}") from None
    if not isinstance(document, dict):
        raise BadRequest(400, "the body is no JSON object")
    return cast("dict[str, Any]", document)


def read_ask(body: bytes, behaviour: Behaviour, *, is_chat: bool, number: int, fault: Fault | None) -> Ask:
    """`fault` is what the script has for this number; the request's own field `script` goes before it."""
    document = read_object(body)
    if (model := document.get("model", behaviour.model)) != behaviour.model:
        raise BadRequest(404, f"The model {model!r} does not exist.")
    for name in ("ignore_eos", "min_tokens", "stream_options", "return_token_ids"):
        if name in document and name in behaviour.refused_fields:
            raise BadRequest(400, f"Unrecognized request argument supplied: {name}")
    if document.get("n", 1) != 1:
        raise BadRequest(400, "only n=1 is served here")
    if is_chat:
        prompt_tokens = count_messages(document.get("messages")) + behaviour.chat_overhead_tokens
    else:
        prompt_tokens = _count_prompt(document.get("prompt"), takes_ids="prompt_ids" not in behaviour.refused_fields)
    output_tokens, finish_reason = _length(document, behaviour)
    if prompt_tokens + output_tokens > behaviour.max_model_len:
        raise BadRequest(
            400, f"{prompt_tokens} prompt and {output_tokens} output tokens, {behaviour.max_model_len} is the most"
        )
    stream_options = _options(document)
    return Ask(
        number=number,
        is_chat=is_chat,
        is_stream=bool(document.get("stream", False)),
        wants_usage=bool(stream_options.get("include_usage", False)),
        wants_continuous_usage=bool(stream_options.get("continuous_usage_stats", False)),
        wants_token_ids=bool(document.get("return_token_ids", False)),
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        finish_reason=finish_reason,
        fault=_fault(document, fault),
    )


def token_ids(text: str) -> list[int]:
    """One for each word, a function of the word alone. Two words in some thousands share one."""
    return [zlib.crc32(word.encode()) % 50_000 + 1_000 for word in text.split()]


def message_texts(messages: object) -> list[str]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest(400, "messages must be a list that is not empty")
    return [_content(message) for message in cast("list[object]", messages)]


def count_messages(messages: object) -> int:
    return sum(len(text.split()) for text in message_texts(messages))


def _content(message: object) -> str:
    content = cast("dict[str, object]", message).get("content") if isinstance(message, dict) else None
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = cast("list[dict[str, object]]", content)
        return " ".join(str(part.get("text", "")) for part in parts)
    raise BadRequest(400, "a message has no content")


def _count_prompt(prompt: object, *, takes_ids: bool) -> int:
    if isinstance(prompt, str):
        count = len(prompt.split())
    elif isinstance(prompt, list) and takes_ids:
        ids = cast("list[int]", prompt)
        try:
            array("I", ids)
        except (TypeError, OverflowError):
            raise BadRequest(400, "prompt must be a text or a list of token ids") from None
        count = len(ids)
    else:
        raise BadRequest(400, "prompt must be a string" if not takes_ids else "prompt is missing")
    if not count:
        raise BadRequest(400, "prompt is empty")
    return count


def _options(document: dict[str, Any]) -> dict[str, Any]:
    options: object = document.get("stream_options") or {}
    if not isinstance(options, dict):
        raise BadRequest(400, "stream_options must be an object")
    return cast("dict[str, Any]", options)


def _length(document: dict[str, Any], behaviour: Behaviour) -> tuple[int, str]:
    limit = document.get("max_completion_tokens") or document.get("max_tokens", _DEFAULT_MAX_TOKENS)
    if type(limit) is not int or limit < 1:
        raise BadRequest(400, f"max_tokens must be an integer of at least 1, not {limit!r}")
    natural = behaviour.natural_tokens
    if natural is None or document.get("ignore_eos"):
        return limit, "length"
    natural = max(natural, int(document.get("min_tokens") or 0))
    return (natural, "stop") if natural < limit else (limit, "length")


def _fault(document: dict[str, Any], chosen: Fault | None) -> Fault | None:
    if "script" not in document:
        return chosen
    try:
        return Fault(document["script"])
    except ValueError:
        raise BadRequest(400, f"script names no fault: {document['script']!r}") from None
