"""Text to token ids and back, from the tokenizer files of a Hugging Face checkpoint; without transformers.

Incremental detokenising works on bytes wherever the tokenizer's decoder allows it (byte-level BPE, and
SentencePiece-style vocabularies with byte fallback): each token is a known byte string, so a character that
is split over tokens waits for its last byte and for nothing else. Other decoders fall back to decoding a
window of the last tokens.
"""

from __future__ import annotations

import asyncio
import codecs
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import msgspec
from tokenizers import Tokenizer

from contracts.errors import ConfigError, NoCapacity
from gateway.chat_template import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

#: Texts at least this long are tokenised in a thread; shorter ones take the loop less than a hand-over does.
THREAD_FROM_CHARS = 2_000

#: Tokens of the prompt that a window starts with, where the answer continues a text.
_CONTEXT_TOKENS = 8

#: Characters that normalising may make one of (composing Unicode, cutting spaces).
_MAX_NORMALIZED_SHRINK = 4

#: Tokens that may wait for a character to become complete; longer waits mean that it never will.
_MAX_HELD_TOKENS = 8

ResultT = TypeVar("ResultT")

_SPACE_MARK = "\u2581"


class Detokenizer(Protocol):
    """Turns one answer's tokens into text, as they come."""

    def feed(self, token_id: int) -> str:
        """The text that is certain now; may be empty, never ends inside a character."""
        ...

    def flush(self) -> str:
        """What remains at the end: U+FFFD for a character that was never completed."""
        ...


class ByteDetokenizer:
    """For decoders under which each token is a fixed byte string."""

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool) -> None:
        self._token_bytes = token_bytes
        #: Whether a first space is still to be dropped.
        self._strip_space = strip_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        return self._strip(self._utf8.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        return self._strip(self._utf8.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if not (text and self._strip_space):
            return text
        self._strip_space = False
        return text.removeprefix(" ")


class WindowDetokenizer:
    """For any decoder: what the last tokens add to the text of the few before them.

    Keeps `[given, read, end)`: tokens before `given` are forgotten, those before `read` have been given out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], *, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context)
        self._num_read = len(self._window)

    def feed(self, token_id: int) -> str:
        self._window.append(token_id)
        known, text = self._decode(self._window[: self._num_read]), self._decode(self._window)
        num_held = len(self._window) - self._num_read
        if len(text) <= len(known) or (text.endswith("\ufffd") and num_held <= _MAX_HELD_TOKENS):
            return ""
        self._window = self._window[self._num_read :]
        self._num_read = len(self._window)
        return text[len(known) :]

    def flush(self) -> str:
        known, text = self._decode(self._window[: self._num_read]), self._decode(self._window)
        self._window, self._num_read = [], 0
        return text[len(known) :]


@dataclass(frozen=True, slots=True)
class _Added:
    content: str
    special: bool


class TextTokenizer:
    """One model's tokenizer, and its chat template where it has one. Safe in threads."""

    def __init__(self, tokenizer: Tokenizer, *, chat_template: ChatTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self._added = {
            token_id: _Added(token.content, token.special)
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        #: Ids run below this number.
        self.vocab_size = 1 + max(vocabulary.values())
        self._scheme = _byte_scheme(tokenizer)
        #: Of the tokens asked for so far; at most one entry for each id.
        self._bytes_of: dict[int, bytes] = {}
        self._longest_token_bytes = max(len(token.encode()) for token in vocabulary)

    @classmethod
    def load(cls, folder: Path, *, wall_s: Callable[[], float]) -> TextTokenizer:
        """From `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a model folder (only
        the first must exist). Raises ConfigError naming the file."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"no tokenizer.json in {folder}")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            # The library raises plain Exception for anything it cannot read.
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        config = _read_config(folder / "tokenizer_config.json")
        return cls(tokenizer, chat_template=_load_template(folder, config, wall_s))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """`add_special_tokens`: those the post-processor adds (bos). Chat templates write their own."""
        # Of the encoding calls only the batch ones release the interpreter lock.
        encodings = self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encodings[0].ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def min_tokens(self, text: str) -> int:
        """A lower bound on `len(encode(text))` that costs nothing, to refuse absurd prompts before work;
        0 where an unknown word of any length may be one token."""
        if self._scheme is None:
            return 0
        return len(text) // (_MAX_NORMALIZED_SHRINK * self._longest_token_bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token alone stands for; empty for an unknown id."""
        raw = self._bytes_of.get(token_id)
        if raw is None:
            raw = self._bytes_of[token_id] = self._find_bytes(token_id)
        return raw

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._scheme is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        return self._scheme.to_bytes(token)

    def detokenizer(self, *, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> Detokenizer:
        """`after`: the tokens whose text this text continues. Without any it stands alone: then the space
        that SentencePiece vocabularies put before a first word is left out."""
        if self._scheme is None:
            decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
            return WindowDetokenizer(decode, context=after[-_CONTEXT_TOKENS:])

        def bytes_of(token_id: int) -> bytes:
            if skip_special_tokens and self._is_special(token_id):
                return b""
            return self.token_bytes(token_id)

        return ByteDetokenizer(bytes_of, strip_space=not after and self._scheme.strips_first_space)

    def _is_special(self, token_id: int) -> bool:
        added = self._added.get(token_id)
        return added is not None and added.special


class TokenizingPool:
    """Tokenises without stalling the event loop: long texts in threads, of which few may wait.

    Use as a context manager; leaving it lets running work end in its threads.
    """

    def __init__(self, tokenizer: TextTokenizer, *, num_threads: int = 2, max_waiting: int = 64) -> None:
        self.tokenizer = tokenizer
        self._executor = ThreadPoolExecutor(num_threads, thread_name_prefix="tokenize")
        self._max_waiting = max_waiting
        #: Texts handed to the threads and not done.
        self._num_waiting = 0

    def __enter__(self) -> TokenizingPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Raises NoCapacity when too many long texts wait."""
        encode = functools.partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self.run(encode, in_thread=len(text) >= THREAD_FROM_CHARS)

    async def decode(self, token_ids: Sequence[int]) -> str:
        decode = functools.partial(self.tokenizer.decode, token_ids, skip_special_tokens=False)
        return await self.run(decode, in_thread=len(token_ids) >= THREAD_FROM_CHARS)

    async def run(self, work: Callable[[], ResultT], *, in_thread: bool) -> ResultT:
        """Other work on long texts. Raises NoCapacity as `encode` does."""
        if not in_thread:
            return work()
        if self._num_waiting >= self._max_waiting:
            raise NoCapacity(
                f"{self._num_waiting} long texts already wait to be tokenised", retry_after_s=1.0, reason="gateway_full"
            )
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._num_waiting -= 1


# --- what a token's bytes are -----------------------------------------------------------------------


class _ByteScheme(Protocol):
    strips_first_space: bool

    def to_bytes(self, token: str) -> bytes: ...


class _ByteLevel:
    """GPT-2's mapping: every byte has a printable character of its own."""

    strips_first_space = False

    def __init__(self) -> None:
        self._byte_of = {character: byte for byte, character in enumerate(_printable_bytes())}

    def to_bytes(self, token: str) -> bytes:
        try:
            return bytes(self._byte_of[character] for character in token)
        except KeyError:
            # An added token is written in plain text.
            return token.encode()


class _SpaceMarked:
    """SentencePiece: a mark for the space, and `<0x0A>` for bytes that have no token."""

    def __init__(self, *, strips_first_space: bool) -> None:
        self.strips_first_space = strips_first_space
        self._byte_of = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)}

    def to_bytes(self, token: str) -> bytes:
        return self._byte_of.get(token) or token.replace(_SPACE_MARK, " ").encode()


def _printable_bytes() -> list[str]:
    """The character that stands for each byte: itself where printable, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(spare)) for byte in range(256)]


def _byte_scheme(tokenizer: Tokenizer) -> _ByteScheme | None:
    """How this tokenizer's decoder maps tokens to bytes; None when it does not work token by token."""
    decoder = msgspec.json.decode(tokenizer.to_str())["decoder"]
    if decoder is None:
        return None
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    match [_essence(step) for step in steps]:
        case [("ByteLevel",)]:
            return _ByteLevel()
        case [("Replace", {"String": "\u2581"}, " "), ("ByteFallback",), ("Fuse",), *rest] if rest in (
            [],
            [("Strip", " ", 1, 0)],
        ):
            return _SpaceMarked(strips_first_space=bool(rest))
        case _:
            return None


def _essence(step: dict[str, Any]) -> tuple[Any, ...]:
    """What of a decoder's description decides the text it makes."""
    keys = {
        "Replace": ("pattern", "content"),
        "Strip": ("content", "start", "stop"),
    }
    return (step["type"], *(step.get(key) for key in keys.get(step["type"], ())))


# --- files ------------------------------------------------------------------------------------------


class _AddedToken(msgspec.Struct):
    content: str


class _NamedTemplate(msgspec.Struct):
    name: str
    template: str


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no JSON object: {error}") from error


def _load_template(folder: Path, config: dict[str, Any], wall_s: Callable[[], float]) -> ChatTemplate | None:
    path = folder / "chat_template.jinja"
    try:
        source = path.read_text() if path.is_file() else _template_in(config.get("chat_template"))
        special_tokens = _special_tokens(config)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ConfigError(f"the chat template of {folder} cannot be used: {error}") from error
    if source is None:
        return None
    return ChatTemplate(source, special_tokens=special_tokens, wall_s=wall_s)


def _template_in(value: object) -> str | None:
    """A template, or the one named "default" of a list of named ones."""
    if value is None or isinstance(value, str):
        return value
    named = msgspec.convert(value, list[_NamedTemplate])
    return next((entry.template for entry in named if entry.name == "default"), None)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token`, `eos_token` and so on, which stand as text or as objects with a `content`."""
    tokens: dict[str, str] = {}
    for name, value in config.items():
        if name.endswith("_token") and isinstance(value, str | dict):
            token = msgspec.convert(value, str | _AddedToken)
            tokens[name] = token if isinstance(token, str) else token.content
    return tokens
