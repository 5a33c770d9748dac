"""Incremental detokenising equals decoding at once, and never shows half a character."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import ConfigError, NoCapacity
from gateway.tokenizer import TextTokenizer, TokenizingPool
from tests.unit.gateway import tokenizers_for_tests as small

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tokenizers import Tokenizer

    Family = Callable[[], Tokenizer]

FAMILIES = [small.byte_level, small.space_marked, small.word_pieces, small.metaspace]


def pieces(tokenizer: TextTokenizer, token_ids: Sequence[int], *, skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return [*map(detokenizer.feed, token_ids), detokenizer.flush()]


@given(token_ids=st.lists(st.integers(0, 399), max_size=30), skip=st.booleans())
def test_byte_level_equals_decoding_at_once(token_ids: list[int], skip: bool) -> None:
    """Any ids at all: invalid UTF-8 and unknown tokens too."""
    raw = small.byte_level()
    expected = raw.decode(token_ids, skip_special_tokens=skip)
    assert "".join(pieces(TextTokenizer(raw), token_ids, skip=skip)) == expected


@settings(max_examples=30)
@given(text=st.text(max_size=20) | st.text("hello world the quick 你😀", max_size=30))
def test_space_marked_equals_decoding_at_once(text: str) -> None:
    raw = small.space_marked()
    token_ids = raw.encode(text).ids
    assert "".join(pieces(TextTokenizer(raw), token_ids)) == raw.decode(token_ids)


@pytest.mark.parametrize("family", [small.word_pieces, small.metaspace])
@given(data=st.data())
def test_other_decoders_equal_decoding_at_once(family: Family, data: st.DataObject) -> None:
    raw = family()
    token_ids = data.draw(st.lists(st.integers(0, raw.get_vocab_size() - 1), max_size=20))
    assert "".join(pieces(TextTokenizer(raw), token_ids)) == raw.decode(token_ids)


@pytest.mark.parametrize("family", [small.byte_level, small.space_marked])
@given(text=st.text(max_size=30))
def test_a_split_character_is_held_back(family: Family, text: str) -> None:
    raw = family()
    token_ids = raw.encode(text, add_special_tokens=False).ids
    assert "\ufffd" not in "".join(pieces(TextTokenizer(raw), token_ids)[:-1]).replace(text, "")
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces(TextTokenizer(raw), token_ids))


def test_an_incomplete_character_at_the_end_is_flushed_as_replacement() -> None:
    raw = small.byte_level()
    token_ids = raw.encode("\N{SNOWMAN}", add_special_tokens=False).ids[:-1]
    assert token_ids
    parts = pieces(TextTokenizer(raw), token_ids)
    assert (set(parts[:-1]), parts[-1]) == ({""}, "\ufffd")


def test_bytes_that_never_become_a_character_are_not_held() -> None:
    """A model with random weights writes such bytes; its stream must not stall."""
    tokenizer = TextTokenizer(small.byte_level())
    lone = next(id_ for id_ in range(400) if tokenizer.token_bytes(id_) == b"\x80")
    assert pieces(tokenizer, [lone] * 20)[:-1] == ["\ufffd"] * 20


def test_the_first_space_belongs_to_a_continued_text_only() -> None:
    tokenizer = TextTokenizer(small.space_marked())
    world = tokenizer.encode("world", add_special_tokens=False)
    after = tokenizer.encode("hello", add_special_tokens=False)
    alone, continued = tokenizer.detokenizer(), tokenizer.detokenizer(after=after)
    assert "".join(map(alone.feed, world)) + alone.flush() == "world"
    assert "".join(map(continued.feed, world)) + continued.flush() == " world"


def test_a_window_continues_a_text_too() -> None:
    tokenizer = TextTokenizer(small.metaspace())
    detokenizer = tokenizer.detokenizer(after=tokenizer.encode("hello", add_special_tokens=False))
    assert detokenizer.feed(3) == " world"


@given(token_id=st.integers(0, 399))
def test_token_bytes_are_those_of_the_text(token_id: int) -> None:
    raw = small.byte_level()
    text = TextTokenizer(raw).token_bytes(token_id).decode("utf-8", "replace")
    assert text == raw.decode([token_id], skip_special_tokens=False)


@given(text=st.text(max_size=200))
def test_min_tokens_is_a_lower_bound(text: str) -> None:
    for family in FAMILIES:
        tokenizer = TextTokenizer(family())
        assert tokenizer.min_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_bos_is_added_by_the_post_processor_only() -> None:
    tokenizer = small.chat_tokenizer()
    bos = tokenizer.encode(small.BOS, add_special_tokens=False)
    assert tokenizer.encode("hello", add_special_tokens=True)[:1] == bos
    assert tokenizer.encode("hello", add_special_tokens=False)[:1] != bos
    assert tokenizer.chat_template is not None
    prompt = tokenizer.chat_template.render([{"role": "user", "content": "hello"}])
    assert tokenizer.encode(prompt, add_special_tokens=False).count(bos[0]) == 1


async def test_long_texts_are_encoded_in_threads_with_the_same_result() -> None:
    tokenizer = small.chat_tokenizer()
    text = "hello world " * 1_000
    with TokenizingPool(tokenizer) as pool:
        ids = await pool.encode(text, add_special_tokens=True)
        assert ids == tokenizer.encode(text, add_special_tokens=True)
        assert await pool.decode(ids) == small.BOS + text


async def test_waiting_long_texts_are_bounded() -> None:
    with TokenizingPool(small.chat_tokenizer(), num_threads=1, max_waiting=2) as pool:
        calls = [pool.encode("hello " * 1_000, add_special_tokens=False) for _ in range(3)]
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(answer) for answer in answers] == [list, list, NoCapacity]


def test_loading_a_folder(tmp_path: Path) -> None:
    config: dict[str, object] = {
        "bos_token": {"content": small.BOS, "special": True},
        "eos_token": small.EOS,
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": small.CHAT}],
    }
    small.write_folder(tmp_path, small.byte_level(), config)
    tokenizer = TextTokenizer.load(tmp_path, wall_s=lambda: 0.0)
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.chat_template is not None
    text = tokenizer.chat_template.render(messages)
    assert text == f"{small.BOS}{small.USER}hi{small.EOS}{small.ASSISTANT}"
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    tokenizer = TextTokenizer.load(tmp_path, wall_s=lambda: 0.0)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.render(messages) == small.EOS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "cannot be read as a tokenizer"),
        ("tokenizer_config.json", "[]", "is no JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat template"),
        ("tokenizer_config.json", '{"bos_token": {"id": 3}}', "chat template"),
        ("chat_template.jinja", "{% if %}", "chat template"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    small.write_folder(tmp_path, small.byte_level(), {})
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        TextTokenizer.load(tmp_path, wall_s=lambda: 0.0)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        TextTokenizer.load(tmp_path, wall_s=lambda: 0.0)
