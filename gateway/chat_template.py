"""Renders a model's chat template (Jinja) in a sandbox with a work limit.

The dialect is that of Hugging Face checkpoints: `trim_blocks` and `lstrip_blocks` on, Python's string and
dict methods, `raise_exception`, `strftime_now`, `tojson` without HTML escaping, and the special tokens by
name. The template comes with the model; the messages come from anybody.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

import minijinja

from contracts.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: Instructions one rendering may take; a conversation of 1,000 messages takes about 100,000.
FUEL = 5_000_000

#: Marks what a training tool masks; renders as its content.
_GENERATION_TAG = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

_NAME = "chat_template"

#: What a template is always given; `chat_template_kwargs` may not replace them.
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatTemplate:
    """A compiled template. `render` is pure but for `strftime_now`, which asks `wall_s`."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str], wall_s: Callable[[], float]) -> None:
        """`special_tokens`: "bos_token" and the like. Raises ConfigError for a syntax error."""
        self._special_tokens = dict(special_tokens)
        self._environment = minijinja.Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            fuel=FUEL,
            auto_escape_callback=_never_escape,
        )
        self._environment.add_filter("tojson", _to_json)
        self._environment.add_global("raise_exception", _raise_exception)
        self._environment.add_global("strftime_now", _strftime(wall_s))
        try:
            self._environment.add_template(_NAME, _without_generation_tags(source))
        except minijinja.TemplateError as error:
            raise ConfigError(f"the chat template cannot be used: {_first_line(error)}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text, special tokens included. Raises BadRequest where the template refuses."""
        context = {
            **self._special_tokens,
            **(variables or {}),
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._environment.render_template(_NAME, **context)
        except _TemplateRefusal as refusal:
            raise BadRequest(f"the chat template refused: {refusal}", param="messages") from refusal
        except minijinja.TemplateError as error:
            raise BadRequest(f"the chat template failed: {_first_line(error)}", param="messages") from error


class _TemplateRefusal(Exception):
    """Raised by the template itself."""


def _raise_exception(message: str) -> None:
    raise _TemplateRefusal(message)


def _strftime(wall_s: Callable[[], float]) -> Callable[[str], str]:
    def strftime_now(pattern: str) -> str:
        return datetime.fromtimestamp(wall_s()).astimezone().strftime(pattern)

    return strftime_now


def _to_json(
    value: Any,
    indent: int | None = None,
    ensure_ascii: bool = False,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    pair = None if separators is None else (separators[0], separators[1])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _never_escape(name: str) -> bool:
    return False


def _without_generation_tags(source: str) -> str:
    return _GENERATION_TAG.sub(_keep_trimming, source)


def _keep_trimming(tag: re.Match[str]) -> str:
    """A block that renders nothing, but eats the white space around it as the original does."""
    text = tag.group()
    left, right = "-" if text.startswith("{%-") else "", "-" if text.endswith("-%}") else ""
    return f"{{%{left} if false %}}{{% endif {right}%}}"


def _first_line(error: minijinja.TemplateError) -> str:
    return str(error).partition("\n")[0]
