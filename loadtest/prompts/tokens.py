"""Where exact prompt lengths come from: ordinary token ids, and words that are one token each."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import orjson
from tokenizers import Tokenizer

from contracts.errors import ConfigError
from loadtest.prompts.common_words import COMMON_WORDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

#: More words make prompts no less alike, and lower ids are commoner and shorter words.
MAX_WORDS = 4096

_MIN_WORD_CHARS, _MAX_WORD_CHARS = 2, 16
#: Words in random order that must each still be one token.
_NUM_SAMPLED_WORDS = 50_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """What prompts are made of. Any sequence of `ids` is a prompt of so many tokens, and so is any sequence of `words`
    with one space between them, where it begins with one of `openers`."""

    #: For people.
    source: str
    #: Ordinary ids, ascending, without special tokens; empty: unknown.
    ids: tuple[int, ...]
    #: One token each behind a space.
    words: tuple[str, ...]
    #: Of `words`, those that are one token without a space before them, too. Empty: begin with a space.
    openers: tuple[str, ...]
    tokenizer: Tokenizer | None = field(default=None, repr=False, compare=False)

    @classmethod
    def from_file(cls, path: Path) -> Vocabulary:
        """From a `tokenizer.json`, or a folder with one. Raises ConfigError naming the file."""
        file = path / "tokenizer.json" if path.is_dir() else path
        tokenizer, unknown = _read(file)
        left_out = {*tokenizer.get_added_tokens_decoder(), *unknown}
        ids = tuple(sorted(set(tokenizer.get_vocab(with_added_tokens=False).values()) - left_out))
        words = _words(tokenizer, ids)
        return cls(
            source=str(file),
            ids=ids,
            words=tuple(word.text for word in words),
            openers=tuple(word.text for word in words if word.is_opener),
            tokenizer=tokenizer,
        )

    @classmethod
    def assumed(cls) -> Vocabulary:
        """Common words, for a server of which nothing is known."""
        return cls(source="common words", ids=(), words=COMMON_WORDS, openers=COMMON_WORDS)

    def encode(self, text: str) -> list[int]:
        """Without special tokens. Raises ConfigError where no tokenizer is at hand."""
        if self.tokenizer is None:
            raise ConfigError("text of a trace as token ids needs the model's tokenizer: name its tokenizer.json")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def count(self, text: str) -> int:
        """Tokens of a text. Raises ConfigError as `encode`."""
        return len(self.encode(text))


class _Word(NamedTuple):
    text: str
    #: Behind a space.
    token_id: int
    is_opener: bool


def _read(file: Path) -> tuple[Tokenizer, set[int]]:
    """The tokenizer, never cutting and never padding, and the ids that stand for unknown text."""
    if not file.is_file():
        raise ConfigError(f"no tokenizer at {file}")
    try:
        raw = file.read_bytes()
        tokenizer = Tokenizer.from_buffer(raw)
        model: dict[str, object] = orjson.loads(raw)["model"]
    except Exception as error:
        # The library raises plain Exception for anything it cannot read.
        raise ConfigError(f"{file} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    unknown = {model.get("unk_id"), tokenizer.token_to_id(str(model.get("unk_token")))}
    return tokenizer, {each for each in unknown if isinstance(each, int)}


def _words(tokenizer: Tokenizer, ids: Sequence[int]) -> list[_Word]:
    """The first `MAX_WORDS` by id that keep being one token each in any order."""
    texts = {token_id: tokenizer.decode([token_id]).strip() for token_id in ids}
    candidates = [(token_id, text) for token_id, text in texts.items() if _is_plain(text)]
    alone = tokenizer.encode_batch([text for _, text in candidates], add_special_tokens=False)
    twice = tokenizer.encode_batch([f"{text} {text}" for _, text in candidates], add_special_tokens=False)
    found = [
        _Word(text, token_id, len(first.ids) == 1)
        for (token_id, text), first, both in zip(candidates, alone, twice, strict=True)
        if both.ids == [*first.ids, token_id]
    ]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    return _without_clashes(found[:MAX_WORDS], encode)


def _is_plain(text: str) -> bool:
    return _MIN_WORD_CHARS <= len(text) <= _MAX_WORD_CHARS and text.isascii() and text.isalpha()


def _without_clashes(words: Iterable[_Word], encode: Callable[[str], list[int]]) -> list[_Word]:
    """The words, in order, without those that become other tokens beside some neighbour (as far as samples show)."""
    kept = list(words)
    rng = random.Random(0)
    for _ in range(_NUM_SAMPLED_WORDS // max(1, len(kept))):
        shuffled = rng.sample(kept, len(kept))
        while shuffled and (at := _first_clash(shuffled, encode)) is not None:
            del shuffled[max(0, at - 1) : at + 1]
        left = {word.text for word in shuffled}
        kept = [word for word in kept if word.text in left]
    return kept


def _first_clash(words: Sequence[_Word], encode: Callable[[str], list[int]]) -> int | None:
    """Of a text of these words, the place of the first that is not the token that it should be."""
    # The first word's own tokens are not looked at: it may be several at the start of a text.
    head = encode(words[0].text)
    expected = [*head, *(word.token_id for word in words)]
    actual = encode(" ".join([words[0].text, *(word.text for word in words)]))
    if actual == expected:
        return None
    pairs = enumerate(zip(actual, expected, strict=False))
    differs = next((at for at, (one, other) in pairs if one != other), min(len(actual), len(expected)))
    return min(max(0, differs - len(head)), len(words) - 1)
