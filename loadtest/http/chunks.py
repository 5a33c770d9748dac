"""One event of a streamed answer, decoded: the fields of the OpenAI API that a measurement needs, and no others."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

#: Numbers of tokens, and tokens: others are an answer that cannot be.
_Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_MAX_COUNT = 2**31
#: More than the phases of any request.
_MAX_PHASE_MS = 1e12


class Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | None = None
    #: Two names for what a model thinks before it answers.
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def text(self) -> str:
        return (self.reasoning_content or self.reasoning or "") + (self.content or "")


class Choice(msgspec.Struct, gc=False):
    #: Of completions.
    text: str | None = None
    #: Of chats.
    delta: Delta | None = None
    finish_reason: str | None = None
    #: Where the server was asked for them.
    token_ids: list[_Count] | None = None
    prompt_token_ids: Any = None


class PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: _Count | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: _Count | None = None
    completion_tokens: _Count | None = None
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct, gc=False):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    #: What some servers tell of their own phases.
    timeline: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None


#: Raises msgspec.DecodeError or RecursionError of what is no JSON, and of fields that are none of these.
decode_event = msgspec.json.Decoder(Event).decode


def phases_ms(event: Event) -> dict[str, float] | None:
    """Every number whose name ends in `_ms`, by its name without that; None where there are none."""
    told = event.timeline or event.timings or {}
    phases = {
        name.removesuffix("_ms"): float(value)
        for name, value in told.items()
        if name.endswith("_ms") and _is_phase(value)
    }
    return phases or None


def told_count(event: Event, name: str) -> int | None:
    """A whole number of the server's timeline; None where it does not say it."""
    value = (event.timeline or {}).get(name)
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_COUNT
    return value if is_count else None


def _is_phase(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_PHASE_MS
