"""Words that are one token each, found by asking a server's `/tokenize`."""

from __future__ import annotations

import itertools
import random
from typing import TYPE_CHECKING, Protocol

import msgspec
import orjson

from contracts.errors import ConfigError
from loadtest.prompts.common_words import COMMON_WORDS
from loadtest.prompts.tokens import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Sequence

PATH = "/tokenize"

#: One of them stands between the words that are asked about, and shows where each begins and ends.
_ANCHORS = ("and", "is", "the", "with")
_WORDS_PER_CALL = 256
#: Words that are tried at the start of a text, each by a call of its own.
_NUM_OPENERS_TRIED = 64


class Poster(Protocol):
    """What is needed of `http.HttpClient`."""

    async def post(self, path: str, body: bytes) -> tuple[int, object, bytes]: ...


class _Tokens(msgspec.Struct):
    tokens: list[int]


async def from_server(client: Poster, model: str) -> Vocabulary:
    """Of common English words and their ids. Raises ConfigError, saying why, where the server cannot tell."""
    tokenize = _Tokenize(client, model)
    anchor, anchor_id = await _find_anchor(tokenize)
    candidates = [word for word in COMMON_WORDS if not word.startswith(anchor)]
    ids = {anchor: anchor_id}
    for first in range(0, len(candidates), _WORDS_PER_CALL):
        ids |= await _single_tokens(tokenize, candidates[first : first + _WORDS_PER_CALL], anchor, anchor_id)
    words = tuple(word for word in COMMON_WORDS if word in ids)
    openers = [word for word in words[:_NUM_OPENERS_TRIED] if len(await tokenize(word)) == 1]
    await _verify(tokenize, ids)
    return Vocabulary(
        source=f"common words, by the server's {PATH}",
        ids=tuple(sorted(set(ids.values()))),
        words=words,
        openers=tuple(openers),
    )


class _Tokenize:
    def __init__(self, client: Poster, model: str) -> None:
        self._client = client
        self._model = model

    async def __call__(self, text: str) -> list[int]:
        body = orjson.dumps({"model": self._model, "prompt": text, "add_special_tokens": False})
        try:
            status, _, answer = await self._client.post(PATH, body)
        except OSError as error:
            raise ConfigError(f"the server's {PATH} cannot be asked: {error}") from error
        if status != 200:
            raise ConfigError(f"the server's {PATH} answers with status {status}")
        try:
            return msgspec.json.decode(answer, type=_Tokens).tokens
        except msgspec.DecodeError as error:
            raise ConfigError(f"the server's {PATH} answers otherwise than expected: {error}") from error


async def _find_anchor(tokenize: _Tokenize) -> tuple[str, int]:
    """A word that is one token behind a space, and its id."""
    for word in _ANCHORS:
        token_ids = await tokenize(" ".join([word] * 4))
        if len(token_ids) >= 4 and len(set(token_ids[-3:])) == 1:
            return word, token_ids[-1]
    raise ConfigError(f"by the server's {PATH} not even common words are one token each")


async def _single_tokens(tokenize: _Tokenize, words: Sequence[str], anchor: str, anchor_id: int) -> dict[str, int]:
    """The ids of those of `words` that are one token."""
    text = " ".join([anchor, anchor, *(f"{word} {anchor}" for word in words)])
    token_ids = await tokenize(text)
    bounds = [at for at, token_id in enumerate(token_ids) if token_id == anchor_id][-len(words) - 1 :]
    if len(bounds) <= len(words):
        raise ConfigError(f"by the server's {PATH} words are not tokens of their own")
    between = itertools.pairwise(bounds)
    return {word: token_ids[low + 1] for word, (low, high) in zip(words, between, strict=True) if high - low == 2}


async def _verify(tokenize: _Tokenize, ids: dict[str, int]) -> None:
    """That the words are the same tokens in another order."""
    shuffled = random.Random(0).sample(sorted(ids), len(ids))[:_WORDS_PER_CALL]
    expected = [ids[word] for word in shuffled]
    # The first is repeated, because at the start it may be other tokens.
    token_ids = await tokenize(" ".join([shuffled[0], *shuffled]))
    if token_ids[-len(expected) :] != expected:
        raise ConfigError(f"by the server's {PATH} words are other tokens in other texts")
