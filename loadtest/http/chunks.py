"""One event of a streamed answer, decoded: the fields of the OpenAI API that a measurement needs, and no others."""

from __future__ import annotations

from typing import Any

import msgspec


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
    token_ids: list[int] | None = None
    prompt_token_ids: Any = None


class PromptDetails(msgspec.Struct, gc=False):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Event(msgspec.Struct, gc=False):
    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: Any = None
    #: What some servers tell of their own phases.
    timeline: dict[str, Any] | None = None
    timings: dict[str, Any] | None = None


#: Raises msgspec.DecodeError or RecursionError of what is no JSON, and of fields of other types than these.
decode_event = msgspec.json.Decoder(Event).decode


def phases_ms(event: Event) -> dict[str, float] | None:
    """Every number whose name ends in `_ms`, by its name without that; None where there are none."""
    told = event.timeline or event.timings or {}
    phases = {
        name.removesuffix("_ms"): float(value)
        for name, value in told.items()
        if name.endswith("_ms") and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return phases or None
