"""Conversations of real people with chat bots: the ShareGPT format, a JSON array or JSON lines.

    {"id": "…", "conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}, …]}

What it says becomes chats: the user's messages as they stand, and the lengths of the answers. It has no times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: A file is held in memory while it is read.
MAX_FILE_BYTES = 2 << 30

_USER = frozenset({"human", "user"})
_ASSISTANT = frozenset({"gpt", "chatgpt", "assistant", "bing", "bard"})
_SYSTEM = frozenset({"system"})

#: What ends or begins an object: strings are passed over whole, whatever they hold.
_MARKS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[{}]', re.DOTALL)
_BOM = b"\xef\xbb\xbf"
_BETWEEN = b" \t\r\n,[]"


class Message(NamedTuple):
    """What a user said, and how long the answer was. Tokens are > 0."""

    text: str
    new_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationSummary:
    """What stood in a file, up to where it was read, and what was made of it."""

    num_conversations: int
    #: Without any message that was answered, or with a speaker that is neither user, assistant nor system.
    num_left_out: int
    num_turns: int


class _Said(msgspec.Struct, frozen=True):
    speaker: str = msgspec.field(name="from")
    value: str | None = None


class _Conversation(msgspec.Struct, frozen=True):
    conversations: list[_Said]


def parse_conversations(
    name: str, text: bytes, count_tokens: Callable[[str], int], max_turns: int | None = None
) -> tuple[tuple[tuple[Message, ...], ...], ConversationSummary]:
    """The turns of each conversation of a file called `name`, in order; read until they are `max_turns`, at least.

    Turns are pairs of user and assistant. What comes before the user's first message is left out, but a system message:
    it stands before the user's first one, as a part of it. Messages of one side in a row count as one, blank ones as
    none; a last one without an answer is left out. Raises ConfigError that names file, conversation and byte for
    what is no such JSON, and where nothing is left.
    """
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(f"trace {name}: {len(text):,} bytes, at most {MAX_FILE_BYTES:,} are read; split the file")
    found: list[tuple[Message, ...]] = []
    num_conversations = num_turns = 0
    for conversation in _conversations(name, text):
        num_conversations += 1
        turns = tuple(_turns(conversation.conversations, count_tokens))
        if turns:
            found.append(turns)
            num_turns += len(turns)
        if max_turns is not None and num_turns >= max_turns:
            break
    if not found:
        raise ConfigError(f"trace {name}: no answered message in {num_conversations} conversations")
    summary = ConversationSummary(
        num_conversations=num_conversations, num_left_out=num_conversations - len(found), num_turns=num_turns
    )
    return tuple(found), summary


def _conversations(name: str, text: bytes) -> Iterator[_Conversation]:
    decode = msgspec.json.Decoder(_Conversation).decode
    for number, (start, end) in enumerate(_objects(name, text), start=1):
        try:
            yield decode(memoryview(text)[start:end])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConfigError(f"{name}: conversation {number}, from byte {start}: {error}") from error


def _objects(name: str, text: bytes) -> Iterator[tuple[int, int]]:
    """Where each outermost object begins and ends. What stands between them can only be an array's or nothing."""
    depth = start = number = 0
    end = len(_BOM) if text.startswith(_BOM) else 0
    for mark in _MARKS.finditer(text):
        if mark[0] == b"{":
            if depth == 0:
                number += 1
                start = mark.start()
                _require_nothing(name, text, end, start)
            depth += 1
        elif mark[0] == b"}":
            depth -= 1
            if depth < 0:
                raise ConfigError(f"{name}: byte {mark.start()}: a '}}' that closes nothing")
            if depth == 0:
                end = mark.end()
                yield start, end
    if depth:
        raise ConfigError(f"{name}: conversation {number}, from byte {start}: not closed before the file ends")
    _require_nothing(name, text, end, len(text))
    if text[:64].removeprefix(_BOM).lstrip().startswith(b"[") and b"]" not in text[end:]:
        raise ConfigError(f"{name}: the array is not closed before the file ends")


def _require_nothing(name: str, text: bytes, start: int, end: int) -> None:
    between = text[start:end].lstrip(_BETWEEN)
    if between:
        raise ConfigError(f"{name}: byte {end - len(between)}: {between[:40]!r} stands outside of conversations")


def _turns(said: Sequence[_Said], count_tokens: Callable[[str], int]) -> Iterator[Message]:
    """None where a speaker is unknown."""
    system: list[str] = []
    spoken: list[tuple[bool, str]] = []
    for each in said:
        value = each.value or ""
        if each.speaker not in _USER | _ASSISTANT | _SYSTEM:
            return
        is_user = each.speaker in _USER
        if not value.strip() or (not is_user and not spoken and each.speaker not in _SYSTEM):
            continue
        if each.speaker not in _SYSTEM:
            spoken.append((is_user, value))
        elif not spoken:
            system.append(value)
    sides = ["\n\n".join(text for _, text in run) for _, run in groupby(spoken, key=lambda each: each[0])]
    for turn, (question, answer) in enumerate(zip(sides[::2], sides[1::2], strict=False)):
        text = "\n\n".join((*system, question)) if turn == 0 else question
        yield Message(text, max(1, count_tokens(text)), max(1, count_tokens(answer)))
