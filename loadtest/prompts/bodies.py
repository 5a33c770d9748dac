"""Bodies of requests: JSON bytes with prompts of exact lengths, which share what the workload says they share."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import orjson

from contracts.errors import ConfigError
from loadtest.prompts.pieces import Piece, PieceCache, Writing, ids_piece, join, json_inside, text_piece
from workload.prompts import PromptMaker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.prompts.tokens import Vocabulary
    from loadtest.settings import PromptForm, Target
    from workload.chats import Chat, ChatTurn
    from workload.request import WorkloadRequest

CACHE_BYTES = 256 * 1024**2
NUM_TEXTS_CACHED = 4096

#: Fields of a body that the plan decides.
_PLANNED_FIELDS = frozenset(
    {"model", "prompt", "messages", "stream", "max_tokens", "max_completion_tokens", "n", "best_of", "echo"}
)

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


class Answer(NamedTuple):
    """What was really answered to an earlier turn."""

    text: str
    #: None: the server does not tell them.
    token_ids: tuple[int, ...] | None = None
    #: As the server reported; None: it did not, and the planned number is taken.
    num_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyFields:
    """Fields that not every server takes."""

    #: Answers of exactly the planned length.
    ignore_eos: bool = True
    include_usage: bool = True
    return_token_ids: bool = False
    #: `max_completion_tokens` where a server wants it by that name.
    max_tokens_name: str = "max_tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Tokens that the server adds to what is sent: special tokens and the chat template."""

    #: To a prompt of one message.
    prompt_tokens: int = 0
    #: For each further user message, with the answer before it.
    turn_tokens: int = 0
    #: For a system message; None: the template has none, and system prompts begin the first user message.
    system_tokens: int | None = 0


class BodyMaker:
    """A pure function from (what is asked, its number, the answers so far) to bytes, for one server.

    A prompt of text has as many words as tokens are asked for, less the overhead; at least one. Words are left out at
    the end (of a chat: of each message), so that what prompts share is still shared.
    """

    def __init__(
        self,
        target: Target,
        vocabulary: Vocabulary,
        seed: int,
        *,
        form: PromptForm,
        fields: BodyFields,
        overhead: Overhead,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Raises ConfigError for token ids at the chat endpoint, and for `extra_body` that contradicts the plan."""
        if target.endpoint == "chat" and form == "ids":
            raise ConfigError("the chat endpoint takes text, not token ids")
        taken = sorted(_PLANNED_FIELDS & set(target.extra_body))
        if taken:
            raise ConfigError(f"extra body: {', '.join(taken)} cannot be set, the workload decides it")
        self.path = PATHS[target.endpoint]
        self._is_chat = target.endpoint == "chat"
        self._form: PromptForm = form
        #: Turns repeat what was said before.
        self._encode = lru_cache(NUM_TEXTS_CACHED)(vocabulary.encode)
        self._writing = Writing.as_ids(vocabulary) if form == "ids" else Writing.as_text(vocabulary)
        self._maker = PromptMaker(seed, 0, self._writing.size)
        self._overhead = overhead
        self._cache = PieceCache(cache_bytes)
        self._opening, self._max_tokens = _frame(target, fields)
        #: Bodies whose (last) message could not be as short as asked: the overhead alone is as long.
        self.num_lengthened = 0

    def single(self, request: WorkloadRequest, number: int) -> bytes:
        """Of a request by itself. `number` tells those without hash ids apart."""
        prompt = join(self._single_pieces(request, number))
        if self._is_chat:
            return self._body(b'[{"role":"user","content":"', prompt, b'"}]', request.output_tokens)
        return self._body(*self._quoted(prompt), request.output_tokens)

    def turn(self, chat: Chat, number_of_chat: int, turn: int, answers: Sequence[Answer]) -> bytes:
        """Of a chat's turn, after `answers` to all turns before it.

        Token ids of an answer that are not known are made up, as many as it had: the prompt is then as long as it
        should be, but shares with the turn before only what that turn asked.
        """
        asking = chat.turns[turn]
        self.num_lengthened += asking.text is None and asking.new_tokens <= self._user_overhead(chat, turn)
        system = self._system_piece(chat)
        asked = [self._user_piece(chat, number_of_chat, each) for each in range(turn + 1)]
        if self._is_chat:
            messages = self._messages(system, asked, answers)
            return self._body(b"[", b",".join(messages), b"]", asking.output_tokens)
        pieces = [] if system is None else [system]
        for number, piece in enumerate(asked[:-1]):
            pieces += (piece, self._answer_piece(chat, number_of_chat, number, answers[number]))
        return self._body(*self._quoted(join([*pieces, asked[-1]])), asking.output_tokens)

    def turn_tokens(self, chat: Chat, turn: int, answers: Sequence[Answer]) -> int:
        """Tokens that the prompt of `turn` is planned to have, with the answers before it as they really were.

        Text that the chat brings along counts as the workload says, or as encoded where ids are sent.
        """
        answered = sum(map(_answer_tokens, chat.turns, answers[:turn]))
        system_tokens = chat.system_prompt_tokens
        if system_tokens:
            system_tokens = max(system_tokens, 1 + self._system_overhead())
        return system_tokens + answered + sum(self._user_tokens(chat, each) for each in range(turn + 1))

    # --- pieces -------------------------------------------------------------------------------------

    def _single_pieces(self, request: WorkloadRequest, number: int) -> list[Piece]:
        drawn = self._maker.pieces(request, number)
        left_out = min(self._overhead.prompt_tokens, request.prompt_tokens - 1)
        self.num_lengthened += left_out < self._overhead.prompt_tokens
        while drawn[-1][1] <= left_out:
            left_out -= drawn.pop()[1]
        drawn[-1] = (drawn[-1][0], drawn[-1][1] - left_out)
        # Only whole blocks come again.
        return [
            self._drawn(purpose, num_tokens, cached=num_tokens == request.hash_block_tokens)
            for purpose, num_tokens in drawn
        ]

    def _drawn(self, purpose: str, num_tokens: int, *, cached: bool = True) -> Piece:
        def make() -> Piece:
            return self._writing.piece(self._maker.draw(purpose, num_tokens))

        return self._cache.get((purpose, num_tokens), make) if cached else make()

    def _system_piece(self, chat: Chat) -> Piece | None:
        if not chat.system_prompt_tokens:
            return None
        return self._drawn(
            f"system/{chat.system_prompt}", _at_least_one(chat.system_prompt_tokens, self._system_overhead())
        )

    def _user_piece(self, chat: Chat, number: int, turn: int) -> Piece:
        text = chat.turns[turn].text
        purpose = f"chat/{number}/{turn}"
        if text is not None:
            return self._cache.get(purpose, lambda: self._given(text))
        return self._drawn(purpose, _at_least_one(chat.turns[turn].new_tokens, self._user_overhead(chat, turn)))

    def _given(self, text: str) -> Piece:
        if self._form == "ids":
            return ids_piece(self._encode(text))
        return text_piece(text, separator="\n")

    def _answer_piece(self, chat: Chat, number: int, turn: int, answer: Answer) -> Piece:
        if self._form == "text":
            return text_piece(answer.text)
        if answer.token_ids is not None:
            return ids_piece(answer.token_ids)
        return self._drawn(f"chat/{number}/{turn}/answer", _answer_tokens(chat.turns[turn], answer))

    # --- lengths ------------------------------------------------------------------------------------

    def _system_overhead(self) -> int:
        """Of a prompt that is one text, the system prompt is the first part and bears the overhead."""
        return (self._overhead.system_tokens or 0) if self._is_chat else self._overhead.prompt_tokens

    def _user_overhead(self, chat: Chat, turn: int) -> int:
        if turn:
            return self._overhead.turn_tokens if self._is_chat else 0
        return self._overhead.prompt_tokens if self._is_chat or not chat.system_prompt_tokens else 0

    def _user_tokens(self, chat: Chat, turn: int) -> int:
        asked = chat.turns[turn]
        if asked.text is None:
            return max(asked.new_tokens, 1 + self._user_overhead(chat, turn))
        return len(self._encode(asked.text)) if self._form == "ids" else asked.new_tokens

    # --- JSON ---------------------------------------------------------------------------------------

    def _messages(self, system: Piece | None, asked: Sequence[Piece], answers: Sequence[Answer]) -> list[bytes]:
        first = [asked[0]]
        messages: list[bytes] = []
        if system is not None and self._overhead.system_tokens is None:
            first = [system, asked[0]]
        elif system is not None:
            messages.append(b'{"role":"system","content":"%b"}' % join([system]))
        messages.append(b'{"role":"user","content":"%b"}' % join(first))
        for answer, piece in zip(answers, asked[1:], strict=False):
            messages.append(b'{"role":"assistant","content":"%b"}' % json_inside(answer.text))
            messages.append(b'{"role":"user","content":"%b"}' % join([piece]))
        return messages

    def _quoted(self, prompt: bytes) -> tuple[bytes, bytes, bytes]:
        return (b"[", prompt, b"]") if self._form == "ids" else (b'"', prompt, b'"')

    def _body(self, before: bytes, prompt: bytes, after: bytes, output_tokens: int) -> bytes:
        return b"%b%b%b%b%b%d}" % (self._opening, before, prompt, after, self._max_tokens, output_tokens)


def _at_least_one(num_tokens: int, overhead_tokens: int) -> int:
    return max(1, num_tokens - overhead_tokens)


def _answer_tokens(turn: ChatTurn, answer: Answer) -> int:
    if answer.token_ids is not None:
        return len(answer.token_ids)
    return turn.output_tokens if answer.num_tokens is None else answer.num_tokens


def _frame(target: Target, fields: BodyFields) -> tuple[bytes, bytes]:
    """What stands before a body's prompt, and what stands between it and the number of output tokens."""
    body: dict[str, object] = {"model": target.model, "stream": True, "temperature": 0}
    if fields.include_usage:
        body["stream_options"] = {"include_usage": True}
    if fields.ignore_eos:
        body["ignore_eos"] = True
    if fields.return_token_ids:
        body["return_token_ids"] = True
    prompt_name = b"messages" if target.endpoint == "chat" else b"prompt"
    head = orjson.dumps(body | target.extra_body)
    return b'%b,"%b":' % (head[:-1], prompt_name), b',"%b":' % fields.max_tokens_name.encode()
