"""Parts of prompts as they stand in JSON, and how tokens are written as such."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import orjson

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from loadtest.prompts.tokens import Vocabulary

#: Of made-up words; with fewer, unrelated prompts would begin alike.
MIN_WORDS = 16


class Piece(NamedTuple):
    """One part of a prompt: the inside of a JSON string, or of an array of token ids."""

    #: Its first token, or all of it, when the prompt begins with this piece; empty: the piece is.
    opening: bytes
    #: The same behind another piece, with what separates the two.
    joining: bytes
    rest: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.opening) + len(self.joining) + len(self.rest)


def join(pieces: Sequence[Piece]) -> bytes:
    """One prompt, or one message."""
    parts: list[bytes] = []
    for piece in pieces:
        if piece.opening:
            parts += (piece.joining if parts else piece.opening, piece.rest)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Writing:
    """How drawn numbers below `size` are written as tokens: each is one, wherever it stands."""

    #: Behind others.
    tokens: tuple[bytes, ...]
    #: At the start of a text, where there is no space before it.
    openings: tuple[bytes, ...]

    @classmethod
    def as_ids(cls, vocabulary: Vocabulary) -> Writing:
        """Raises ConfigError where no ids are known."""
        if not vocabulary.ids:
            raise ConfigError(
                f"no token ids are known ({vocabulary.source}): send prompts as text, or name a tokenizer"
            )
        return cls(tuple(b",%d" % each for each in vocabulary.ids), tuple(b"%d" % each for each in vocabulary.ids))

    @classmethod
    def as_text(cls, vocabulary: Vocabulary) -> Writing:
        """Raises ConfigError where too few words are known.

        Few tokenizers have every word as one token both behind a space and without one: at the start, a word that
        is two there gives way to one that is not.
        """
        words = [word.encode() for word in vocabulary.words]
        if len(words) < MIN_WORDS:
            raise ConfigError(
                f"only {len(words)} words are one token each ({vocabulary.source}), {MIN_WORDS} are needed: "
                "name the model's tokenizer, or send prompts as token ids"
            )
        tokens = tuple(b" " + word for word in words)
        openers = [word.encode() for word in vocabulary.openers]
        if not openers:
            return cls(tokens, tokens)
        known = set(openers)
        fitting = (word if word in known else openers[i % len(openers)] for i, word in enumerate(words))
        return cls(tokens, tuple(fitting))

    @property
    def size(self) -> int:
        return len(self.tokens)

    def piece(self, drawn: Sequence[int]) -> Piece:
        tokens = self.tokens
        if not drawn:
            return Piece(b"", b"", b"")
        return Piece(self.openings[drawn[0]], tokens[drawn[0]], b"".join([tokens[each] for each in drawn[1:]]))


def ids_piece(token_ids: Sequence[int]) -> Piece:
    """Of given token ids, maybe none."""
    listed = orjson.dumps(list(token_ids))[1:-1]
    return Piece(listed, b"," + listed, b"")


def text_piece(text: str, *, separator: str = "") -> Piece:
    """Of given text, which `separator` divides from a piece before it."""
    return Piece(json_inside(text), json_inside(separator + text), b"")


def json_inside(text: str) -> bytes:
    """As it stands between the quotes of a JSON string."""
    return orjson.dumps(text)[1:-1]


class PieceCache:
    """Pieces that may be needed again, bounded by their bytes; the one not used for longest goes first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._pieces: OrderedDict[Hashable, Piece] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], Piece]) -> Piece:
        piece = self._pieces.get(key)
        if piece is not None:
            self._pieces.move_to_end(key)
            return piece
        piece = self._pieces[key] = make()
        self._num_bytes += piece.num_bytes
        while self._num_bytes > self._max_bytes:
            _, oldest = self._pieces.popitem(last=False)
            self._num_bytes -= oldest.num_bytes
        return piece
