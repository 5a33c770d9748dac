"""Bodies of the REST API: the types of their fields, and parsing with errors that name the field.

JSON is parsed by orjson, which refuses what is no JSON (NaN, lone surrogates, depth over 1,024); types and
ranges are msgspec's. What needs the model or several fields at once is checked in `gateway.planning`.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, TypeVar

import msgspec
import orjson
from msgspec import Meta

from contracts.errors import BadRequest

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIAS = 1024
MAX_TOP_LOGPROBS = 20
MAX_N = 128
MAX_SALT_CHARS = 256

Count = Annotated[int, Meta(ge=1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class GenerationBody(msgspec.Struct, frozen=True, kw_only=True):
    """Fields of both generation endpoints. None: the default that the text beside it says."""

    model: str | None = None
    #: At most what the context leaves.
    max_tokens: Count | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    #: 0 and -1: all tokens.
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    #: None: a new one for each request.
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    #: Token id (as text) to bias.
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    include_stop_str_in_output: bool | None = None
    #: Default: true.
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    include_timeline: bool | None = None
    #: Name of its SLO class.
    slo_class: str | None = None
    #: As vLLM means it: lower is handled earlier. Default: 0.
    priority: Priority | None = None
    #: Prompts share cached KV only where it is equal.
    cache_salt: Annotated[str, Meta(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    #: True: answered from KV as the model computed it, also where others may go on from KV of a lossy codec.
    #: Default: as the server is set; false asks for nothing that it would not do.
    exact_kv: bool | None = None
    #: Accepted for other servers' sake; without effect.
    user: str | None = None


class CompletionBody(GenerationBody, frozen=True, kw_only=True):
    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: Count | None = None
    suffix: str | None = None


class ContentPart(msgspec.Struct, frozen=True):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    type: str


class ChatBody(GenerationBody, frozen=True, kw_only=True):
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None


class TokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    #: Default: true for a prompt; chat templates write their own.
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeBody(msgspec.Struct, frozen=True, kw_only=True):
    model: str | None = None
    tokens: list[TokenId]


BodyT = TypeVar("BodyT", bound=msgspec.Struct)

_PATH = re.compile(r" - at `\$\.?(.*)`$")


def parse(raw: bytes, kind: type[BodyT]) -> tuple[BodyT, tuple[str, ...]]:
    """The body, and the names of its fields that `kind` does not know. Raises BadRequest."""
    try:
        data = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from error
    try:
        fields = msgspec.convert(data, dict[str, Any])
        body = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise _explained(str(error)) from error
    known = set(kind.__struct_fields__)
    return body, tuple(name for name in fields if name not in known)


def refuse_unknown(names: tuple[str, ...], kind: type[msgspec.Struct]) -> None:
    """Raises BadRequest for the first of `names`, with the known field that is spelled most like it."""
    for name in names:
        close = difflib.get_close_matches(name[:64], kind.__struct_fields__, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise BadRequest(f"unknown field {name[:64]!r}{hint}", param=name[:64])


def _explained(message: str) -> BadRequest:
    """msgspec says "Expected `int`, got `str` - at `$.n`"; clients look for the field in `param`."""
    found = _PATH.search(message)
    if found is not None and found[1]:
        return BadRequest(f"{found[1]}: {message[: found.start()]}", param=found[1])
    missing = re.search(r"missing required field `(\w+)`", message)
    return BadRequest(message, param=missing[1] if missing else None)
