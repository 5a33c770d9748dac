"""The two answer formats of OpenAI's API: completions and chat completions, whole and in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from gateway.answers import chat_logprobs, text_logprobs

if TYPE_CHECKING:
    from gateway.answers import Piece
    from gateway.generation import Choice
    from gateway.planning import Plan
    from gateway.tokenizer import TextTokenizer

    Object = dict[str, Any]


class Format(Protocol):
    """Makes the entries of `choices`."""

    id_prefix: str
    #: The `object` of a whole answer, and of a chunk.
    whole_name: str
    chunk_name: str

    def opening(self, choice: Choice) -> list[Object]:
        """Chunks before the first token."""
        ...

    def chunks(self, choice: Choice, piece: Piece) -> list[Object]:
        """Chunks for one piece of the answer; the last piece also says why it ended."""
        ...

    def whole(self, choice: Choice, piece: Piece) -> Object: ...


def format_of(plan: Plan, tokenizer: TextTokenizer) -> Format:
    return ChatFormat(plan, tokenizer) if plan.is_chat else TextFormat(plan, tokenizer)


class ChatFormat:
    id_prefix = "chatcmpl-"
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, plan: Plan, tokenizer: TextTokenizer) -> None:
        self._plan = plan
        self._tokenizer = tokenizer
        #: Whether a chunk says something without text.
        self._shows_tokens = plan.wants_logprobs or plan.return_token_ids

    def opening(self, choice: Choice) -> list[Object]:
        extra = _prompt_ids(self._plan, choice)
        return [self._chunk(choice, {"role": "assistant", "content": ""}, None, extra)]

    def chunks(self, choice: Choice, piece: Piece) -> list[Object]:
        out: list[Object] = []
        if piece.text or piece.finish is None or self._shows_tokens:
            extra = _token_ids(self._plan, piece)
            out.append(self._chunk(choice, {"content": piece.text}, self._logprobs(piece), extra))
        if piece.finish is not None:
            out.append(self._chunk(choice, {}, None, {}) | _ending(piece))
        return out

    def whole(self, choice: Choice, piece: Piece) -> Object:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": piece.text},
            "logprobs": self._logprobs(piece),
            **_ending(piece),
            **_prompt_ids(self._plan, choice),
            **_token_ids(self._plan, piece),
        }

    def _chunk(self, choice: Choice, delta: Object, logprobs: Object | None, extra: Object) -> Object:
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": None,
            **extra,
        }

    def _logprobs(self, piece: Piece) -> Object | None:
        return chat_logprobs(self._tokenizer, piece) if self._plan.wants_logprobs else None


class TextFormat:
    id_prefix = "cmpl-"
    whole_name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, plan: Plan, tokenizer: TextTokenizer) -> None:
        self._plan = plan
        self._tokenizer = tokenizer

    def opening(self, choice: Choice) -> list[Object]:
        extra = _prompt_ids(self._plan, choice)
        if not (extra or self._plan.echo):
            return []
        text = choice.prompt.text if self._plan.echo else ""
        return [self._choice(choice, text, None, extra)]

    def chunks(self, choice: Choice, piece: Piece) -> list[Object]:
        chunk = self._choice(choice, piece.text, self._logprobs(choice, piece), _token_ids(self._plan, piece))
        choice.num_chars += len(piece.text)
        return [chunk | _ending(piece)]

    def whole(self, choice: Choice, piece: Piece) -> Object:
        text = choice.prompt.text + piece.text if self._plan.echo else piece.text
        extra = _prompt_ids(self._plan, choice) | _token_ids(self._plan, piece)
        return self._choice(choice, text, self._logprobs(choice, piece), extra) | _ending(piece)

    def _choice(self, choice: Choice, text: str, logprobs: Object | None, extra: Object) -> Object:
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": None,
            **extra,
        }

    def _logprobs(self, choice: Choice, piece: Piece) -> Object | None:
        if not self._plan.wants_logprobs:
            return None
        return text_logprobs(self._tokenizer, piece, choice.num_chars)


def _ending(piece: Piece) -> Object:
    reason = {} if piece.stop_reason is None else {"stop_reason": piece.stop_reason}
    return {"finish_reason": piece.finish, **reason}


def _prompt_ids(plan: Plan, choice: Choice) -> Object:
    return {"prompt_token_ids": choice.prompt.token_ids} if plan.return_token_ids else {}


def _token_ids(plan: Plan, piece: Piece) -> Object:
    return {"token_ids": piece.token_ids} if plan.return_token_ids else {}
