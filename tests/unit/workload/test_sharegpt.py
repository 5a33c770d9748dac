"""Conversations are read whatever their shape, and a bad file says where it is bad."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import ConfigError
from workload.sharegpt import Message, parse_conversations
from workload.trace_rows import detect
from workload.traces import parse_trace

Said = tuple[str, str]


def conversation(*said: Said) -> dict[str, Any]:
    return {"id": "x{", "conversations": [{"from": speaker, "value": value} for speaker, value in said]}


def words(text: str) -> int:
    return len(text.split())


def turns(*said: Said) -> tuple[Message, ...]:
    """Of one conversation, beside one that has a turn."""
    text = json.dumps([conversation(*said), conversation(("human", "a"), ("gpt", "b"))]).encode()
    found, summary = parse_conversations("f", text, words)
    assert (summary.num_conversations, summary.num_left_out) == (2, 2 - len(found))
    return found[0] if len(found) == 2 else ()


def test_pairs_are_turns() -> None:
    assert turns(("human", "how are you"), ("gpt", "well"), ("user", "good"), ("assistant", "is it")) == (
        Message("how are you", 3, 1),
        Message("good", 1, 2),
    )


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([("gpt", "no question"), ("human", "a b"), ("gpt", "c")], (Message("a b", 2, 1),)),
        ([("system", "be brief"), ("human", "a"), ("gpt", "c")], (Message("be brief\n\na", 3, 1),)),
        ([("system", "s"), ("gpt", "x"), ("human", "a"), ("gpt", "c")], (Message("s\n\na", 2, 1),)),
        ([("human", "a"), ("gpt", "c"), ("system", "s"), ("human", "b"), ("gpt", "d")], (("a", 1, 1), ("b", 1, 1))),
        ([("human", "a"), ("human", "b"), ("gpt", "c d"), ("gpt", "e")], (Message("a\n\nb", 2, 3),)),
        ([("human", "a"), ("gpt", "c"), ("human", "unanswered")], (Message("a", 1, 1),)),
        ([("human", "a"), ("gpt", " \n"), ("human", "b"), ("gpt", "c")], (Message("a\n\nb", 2, 1),)),
        ([("human", "unanswered")], ()),
        ([("human", "a"), ("gpt", "c"), ("tool", "t")], ()),
        ([], ()),
    ],
)
def test_what_is_no_plain_pair(said: list[Said], expected: tuple[Message, ...]) -> None:
    assert turns(*said) == expected


TEXTS = st.text(min_size=1, max_size=30).filter(str.strip)


@given(st.lists(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), min_size=1, max_size=5), st.data())
def test_arrays_and_lines_say_the_same_whatever_the_texts_hold(
    chats: list[list[tuple[str, str]]], data: st.DataObject
) -> None:
    rows = [
        conversation(*(said for question, answer in chat for said in (("human", question), ("gpt", answer))))
        for chat in chats
    ]
    ensure_ascii, indent = data.draw(st.booleans()), data.draw(st.sampled_from([None, 2]))
    array = json.dumps(rows, ensure_ascii=ensure_ascii, indent=indent).encode()
    lines = "\n".join(json.dumps(row, ensure_ascii=ensure_ascii) for row in rows).encode()
    found, summary = parse_conversations("f", array, len)
    assert found == tuple(tuple(Message(q, len(q), len(a)) for q, a in chat) for chat in chats)
    assert summary.num_turns == sum(map(len, chats))
    assert parse_conversations("f", b"\xef\xbb\xbf" + lines, len) == (found, summary)
    assert detect("f", array) == detect("f", lines) == "sharegpt"


def test_no_more_is_read_than_asked_for() -> None:
    rows = [json.dumps(conversation(("human", "a"), ("gpt", "b"))) for _ in range(5)]
    text = ("[" + ",".join(rows) + ", {broken").encode()
    found, summary = parse_conversations("f", text, words, max_turns=5)
    assert len(found) == summary.num_conversations == 5
    with pytest.raises(ConfigError, match=r"^f: conversation 6, from byte \d+: not closed before the file ends"):
        parse_conversations("f", text, words)


GOOD = b'{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"[" + GOOD + b', {"id": 3}]', r"f: conversation 2, from byte 86: .*missing required field `conversations`"),
        (b"[" + GOOD + b', {"conversations": 3}]', r"conversation 2, from byte 86: Expected `array`, got `int`"),
        (b"[" + GOOD + b', {"conversations": [}]', r"conversation 2, from byte 86: JSON is malformed"),
        (b"[" + GOOD.replace(b"a", b"\xff") + b"]", r"conversation 1, from byte 1: "),
        (b"[" + GOOD + b", 3]", r"f: byte 86: b'3\]' stands outside of conversations"),
        (b"[" + GOOD + b",", r"f: the array is not closed before the file ends"),
        (b"[" + GOOD + b"}]", r"f: byte 84: a '}' that closes nothing"),
        (b"[" + GOOD[:-9], r"conversation 1, from byte 1: not closed before the file ends"),
        (b"[]", r"trace f: no answered message in 0 conversations"),
        (b'[{"conversations": []}]', r"trace f: no answered message in 1 conversations"),
    ],
)
def test_a_bad_file_says_where(text: bytes, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_conversations("f", text, words)


def test_conversations_are_no_trace_of_requests() -> None:
    with pytest.raises(ConfigError, match="trace f: holds conversations without times, not requests"):
        parse_trace("f", b"[" + GOOD + b"]")
