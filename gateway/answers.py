"""One answer's way from tokens to text: detokenised, stop strings cut, logprobs kept beside."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from gateway.stop_strings import StopMatcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.requests import TokenDelta, TokenLogprobs
    from gateway.tokenizer import TextTokenizer

#: JSON has no minus infinity.
_LEAST_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    stops: tuple[str, ...] = ()
    #: Those the client asked for (the model's own are not named in answers).
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    skip_special_tokens: bool = True
    #: Stop strings count only in what comes after so many tokens.
    min_tokens: int = 0


@dataclass(slots=True)
class Piece:
    """What is new. The text of a token may come with a later piece."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] = field(default_factory=list["TokenLogprobs"])
    #: "stop" or "length", at the end.
    finish: str | None = None
    #: The stop string, or the client's stop token, that ended the answer.
    stop_reason: str | int | None = None

    def extend(self, other: Piece) -> None:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish, self.stop_reason = other.finish, other.stop_reason


class Answer:
    """Feed it deltas in order, until a piece has `finish`; later tokens are not part of the answer."""

    def __init__(self, tokenizer: TextTokenizer, options: AnswerOptions, *, after: Sequence[int] = ()) -> None:
        """`after`: the prompt, where the answer continues its text (completions)."""
        self._options = options
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=options.skip_special_tokens, after=after)
        self._matcher = StopMatcher(options.stops, include_match=options.include_stop)
        self.num_tokens = 0

    def feed(self, delta: TokenDelta) -> Piece:
        piece = Piece()
        for position, token_id in enumerate(delta.token_ids):
            self.num_tokens += 1
            piece.token_ids.append(token_id)
            if delta.logprobs is not None:
                piece.logprobs.append(delta.logprobs[position])
            ends = delta.finish == "stop" and position == len(delta.token_ids) - 1
            hidden = ends and not self._options.include_stop
            self._add(piece, "" if hidden else self._detokenizer.feed(token_id))
            if piece.finish is not None:
                return piece
        if delta.finish is not None:
            self._finish(piece, delta)
        return piece

    def _add(self, piece: Piece, text: str) -> None:
        if self.num_tokens <= self._options.min_tokens:
            piece.text += text
            return
        released = self._matcher.feed(text)
        piece.text += released.text
        if released.matched is not None:
            piece.finish, piece.stop_reason = "stop", released.matched

    def _finish(self, piece: Piece, delta: TokenDelta) -> None:
        self._add(piece, self._detokenizer.flush())
        if piece.finish is not None:
            return
        piece.text += self._matcher.flush()
        piece.finish = delta.finish
        last = delta.token_ids[-1] if delta.token_ids else None
        if delta.finish == "stop" and last in self._options.stop_token_ids:
            piece.stop_reason = last


def chat_logprobs(tokenizer: TextTokenizer, piece: Piece) -> dict[str, object]:
    """OpenAI's chat form."""
    return {
        "content": [
            {
                **_entry(tokenizer, token_id, logprobs.logprob),
                "top_logprobs": [_entry(tokenizer, top.token_id, top.logprob) for top in logprobs.top],
            }
            for token_id, logprobs in zip(piece.token_ids, piece.logprobs, strict=True)
        ]
    }


def text_logprobs(tokenizer: TextTokenizer, piece: Piece, offset: int) -> dict[str, object]:
    """OpenAI's completions form. `offset`: characters of the text before the piece."""
    tokens = [token_text(tokenizer.token_bytes(token_id)) for token_id in piece.token_ids]
    offsets: list[int] = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [_finite(logprobs.logprob) for logprobs in piece.logprobs],
        "top_logprobs": [
            {token_text(tokenizer.token_bytes(top.token_id)): _finite(top.logprob) for top in logprobs.top}
            for logprobs in piece.logprobs
        ],
        "text_offset": offsets,
    }


def token_text(raw: bytes) -> str:
    """A token alone: its text, or its bytes spelled out where they are only part of a character."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _entry(tokenizer: TextTokenizer, token_id: int, logprob: float) -> dict[str, object]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": token_text(raw), "logprob": _finite(logprob), "bytes": list(raw)}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
