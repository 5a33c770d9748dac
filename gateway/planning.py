"""From a parsed body to what will be submitted: prompts as tokens, sampling, and how to answer.

Everything that can be refused is refused here, before a worker hears of the request, and what is large is
bounded before it is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from contracts.errors import BadRequest, ContextLengthExceeded, NotFound
from contracts.requests import SamplingParams
from gateway.answers import AnswerOptions
from gateway.chat_template import RESERVED
from gateway.schemas import (
    MAX_LOGIT_BIAS,
    MAX_STOP_CHARS,
    MAX_STOPS,
    ChatBody,
    ChatMessage,
    CompletionBody,
    GenerationBody,
    TokenizeBody,
)

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from gateway.settings import GatewaySettings
    from gateway.tokenizer import TextTokenizer, TokenizingPool

_DEFAULT_COMPLETION_TOKENS = 16

#: Below, dividing logits by it leaves nothing but infinities; 0 itself is greedy.
_MIN_TEMPERATURE = 0.01

_SEED_RANGE = 2**63

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})

ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class Prompt:
    token_ids: tuple[int, ...]
    #: What `echo` repeats.
    text: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One HTTP request: `n` answers to each prompt. Answer `i` is to prompt `i // n`."""

    model: str
    is_chat: bool
    prompts: tuple[Prompt, ...]
    n: int
    #: One for each prompt; of its `n` answers the j-th has `seed + j`.
    sampling: tuple[SamplingParams, ...]
    options: AnswerOptions
    stream: bool = False
    include_usage: bool = False
    include_timeline: bool = False
    return_token_ids: bool = False
    echo: bool = False

    @property
    def num_answers(self) -> int:
        return len(self.prompts) * self.n

    def prompt_of(self, index: int) -> Prompt:
        return self.prompts[index // self.n]

    @property
    def wants_logprobs(self) -> bool:
        return self.sampling[0].logprobs is not None


class Planner:
    """Checks and tokenises. `rng` gives seeds to requests without one."""

    def __init__(self, settings: GatewaySettings, pool: TokenizingPool, rng: random.Random) -> None:
        self._settings = settings
        self._pool = pool
        self._rng = rng

    @property
    def _tokenizer(self) -> TextTokenizer:
        return self._pool.tokenizer

    async def completion(self, body: CompletionBody) -> Plan:
        """Raises BadRequest (ContextLengthExceeded), NotFound for the model, NoCapacity."""
        model = self.check_model(body.model)
        _refuse(body.suffix, "suffix")
        if _or(body.best_of, 1) > _or(body.n, 1):
            raise BadRequest("best_of: more answers than n are not supported", param="best_of")
        if body.echo and body.logprobs is not None:
            raise BadRequest("logprobs: not supported together with echo", param="logprobs")
        given = _prompts_of(body)
        self._check_answers(len(given) * _or(body.n, 1))
        prompts = tuple([await self._prompt(one, echo=bool(body.echo)) for one in given])
        budgets = [
            self._budget(prompt, body.max_tokens, min(_DEFAULT_COMPLETION_TOKENS, self._room(prompt)))
            for prompt in prompts
        ]
        return self._plan(body, model, prompts, budgets, body.logprobs)

    async def chat(self, body: ChatBody) -> Plan:
        """Raises as `completion` does."""
        model = self.check_model(body.model)
        _check_chat_extras(body)
        self._check_answers(_or(body.n, 1))
        text = self.render(body.messages, body.add_generation_prompt, body.chat_template_kwargs)
        prompt = _non_empty(Prompt(tuple(await self._encode(text, add_special_tokens=False))))
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        budget = self._budget(prompt, asked, self._room(prompt))
        num_top = _or(body.top_logprobs, 0) if body.logprobs else None
        return self._plan(body, model, (prompt,), [budget], num_top)

    async def tokenize(self, body: TokenizeBody) -> list[int]:
        """Raises BadRequest, NotFound, NoCapacity."""
        self.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("prompt: give either prompt or messages", param="prompt")
        if body.prompt is not None:
            return await self._encode(body.prompt, add_special_tokens=_or(body.add_special_tokens, True))
        text = self.render(body.messages or [], body.add_generation_prompt, body.chat_template_kwargs)
        return await self._encode(text, add_special_tokens=_or(body.add_special_tokens, False))

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises NotFound."""
        names = self._settings.served_model_names
        if name is None:
            return names[0]
        if name not in names:
            raise NotFound(f"the model {name[:128]!r} is not served here", param="model")
        return name

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> None:
        """Raises BadRequest for the first id that no token has."""
        size = self._tokenizer.vocab_size
        wrong = next((token_id for token_id in token_ids if token_id >= size), None)
        if wrong is not None:
            raise BadRequest(f"{field}: no token {wrong}; ids run from 0 to {size - 1}", param=field)

    def render(
        self,
        messages: Sequence[ChatMessage],
        add_generation_prompt: bool | None,
        variables: dict[str, Any] | None,
    ) -> str:
        """The prompt's text. Raises BadRequest."""
        template = self._tokenizer.chat_template
        if template is None:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        reserved = RESERVED & set(variables or {})
        if reserved:
            raise BadRequest(f"chat_template_kwargs: {min(reserved)!r} cannot be set", param="chat_template_kwargs")
        return template.render(
            [_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
            add_generation_prompt=_or(add_generation_prompt, True),
            variables=variables,
        )

    # --- prompts and room -----------------------------------------------------------------------

    async def _prompt(self, given: str | list[int], *, echo: bool) -> Prompt:
        if not given:
            raise BadRequest("prompt: is empty", param="prompt")
        if isinstance(given, str):
            token_ids = await self._encode(given, add_special_tokens=True)
            return _non_empty(Prompt(tuple(token_ids), given))
        self.check_token_ids(given, "prompt")
        self._room(Prompt(tuple(given)))
        return Prompt(tuple(given), await self._pool.decode(given) if echo else "")

    async def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        least = self._tokenizer.min_tokens(text)
        if least > self._settings.max_model_len:
            raise self._too_long(f"at least {least}")
        return await self._pool.encode(text, add_special_tokens=add_special_tokens)

    def _room(self, prompt: Prompt) -> int:
        """Tokens that an answer may have. Raises ContextLengthExceeded when there is no room for one."""
        room = self._settings.max_model_len - len(prompt.token_ids)
        if room < 1:
            raise self._too_long(str(len(prompt.token_ids)))
        return room

    def _too_long(self, num_tokens: str) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"the context length is {self._settings.max_model_len} tokens, prompt and answer together; "
            f"the prompt has {num_tokens}"
        )

    def _budget(self, prompt: Prompt, asked: int | None, default: int) -> int:
        if asked is None:
            return default
        if asked > self._room(prompt):
            raise ContextLengthExceeded(
                f"the context length is {self._settings.max_model_len} tokens, prompt and answer together; "
                f"the prompt has {len(prompt.token_ids)} and max_tokens asks for {asked}",
                param="max_tokens",
            )
        return asked

    def _check_answers(self, num_answers: int) -> None:
        limit = self._settings.max_sequences
        if num_answers > limit:
            raise BadRequest(f"n: {num_answers} answers in one request, the limit is {limit}", param="n")

    # --- sampling -------------------------------------------------------------------------------

    def _plan(
        self,
        body: GenerationBody,
        model: str,
        prompts: tuple[Prompt, ...],
        budgets: list[int],
        logprobs: int | None,
    ) -> Plan:
        n = _or(body.n, 1)
        total = n * sum(budgets)
        if total > self._settings.max_total_tokens:
            raise BadRequest(
                f"max_tokens: {total} output tokens in one request, the limit is {self._settings.max_total_tokens}",
                param="max_tokens",
            )
        stop_token_ids = tuple(dict.fromkeys(body.stop_token_ids or ()))
        self.check_token_ids(stop_token_ids, "stop_token_ids")
        return Plan(
            model=model,
            is_chat=isinstance(body, ChatBody),
            prompts=prompts,
            n=n,
            sampling=tuple(self._sampling(body, budget, logprobs, stop_token_ids) for budget in budgets),
            options=_answer_options(body, stop_token_ids),
            stream=_or(body.stream, False),
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            include_timeline=_or(body.include_timeline, False),
            return_token_ids=_or(body.return_token_ids, False),
            echo=isinstance(body, CompletionBody) and _or(body.echo, False),
        )

    def _sampling(
        self, body: GenerationBody, budget: int, logprobs: int | None, stop_token_ids: tuple[int, ...]
    ) -> SamplingParams:
        min_tokens = _or(body.min_tokens, 0)
        if min_tokens > budget:
            raise BadRequest(f"min_tokens: {min_tokens} is more than max_tokens, {budget}", param="min_tokens")
        temperature = _or(body.temperature, 1.0)
        return SamplingParams(
            temperature=temperature and max(temperature, _MIN_TEMPERATURE),
            top_k=max(0, _or(body.top_k, 0)),
            top_p=_or(body.top_p, 1.0),
            min_p=_or(body.min_p, 0.0),
            seed=self._rng.randrange(_SEED_RANGE) if body.seed is None else body.seed % _SEED_RANGE,
            max_tokens=budget,
            min_tokens=min_tokens,
            stop_token_ids=stop_token_ids,
            ignore_eos=_or(body.ignore_eos, False),
            logprobs=logprobs,
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            repetition_penalty=_or(body.repetition_penalty, 1.0),
            logit_bias=self._logit_bias(body.logit_bias or {}),
        )

    def _logit_bias(self, biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
        if len(biases) > MAX_LOGIT_BIAS:
            raise BadRequest(f"logit_bias: {len(biases)} entries, the limit is {MAX_LOGIT_BIAS}", param="logit_bias")
        for text in biases:
            if not (text.isascii() and text.isdecimal() and len(text) <= 10):
                raise BadRequest(f"logit_bias: {text[:32]!r} is no token id", param="logit_bias")
        pairs = tuple((int(text), bias) for text, bias in biases.items())
        self.check_token_ids([token_id for token_id, _ in pairs], "logit_bias")
        return pairs


def seed_of(sampling: SamplingParams, answer: int) -> int:
    """The seed of the answer with this number among the `n` to one prompt."""
    return (sampling.seed + answer) % _SEED_RANGE


def _or(value: ValueT | None, default: ValueT) -> ValueT:
    return default if value is None else value


def _refuse(value: object, field: str) -> None:
    if value:
        raise BadRequest(f"{field}: not supported", param=field)


def _check_chat_extras(body: ChatBody) -> None:
    """Refuses what would change the answer's form if it were honoured; ignoring it would deceive."""
    if body.tool_choice != "none":
        _refuse(body.tools, "tools")
    if body.response_format is not None and body.response_format.type != "text":
        raise BadRequest(
            f"response_format: type {body.response_format.type[:64]!r} is not supported, only 'text'",
            param="response_format",
        )
    if body.top_logprobs and not body.logprobs:
        raise BadRequest("top_logprobs: needs logprobs to be true", param="top_logprobs")


def _answer_options(body: GenerationBody, stop_token_ids: tuple[int, ...]) -> AnswerOptions:
    stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(stops) > MAX_STOPS:
        raise BadRequest(f"stop: {len(stops)} strings, the limit is {MAX_STOPS}", param="stop")
    for stop in stops:
        if not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise BadRequest(
                f"stop: a string of {len(stop)} characters; 1 to {MAX_STOP_CHARS} are allowed", param="stop"
            )
    return AnswerOptions(
        stops=stops,
        stop_token_ids=frozenset(stop_token_ids),
        include_stop=_or(body.include_stop_str_in_output, False),
        skip_special_tokens=_or(body.skip_special_tokens, True),
        min_tokens=_or(body.min_tokens, 0),
    )


def _prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """One prompt as text or token ids, or a list of either."""
    given = body.prompt
    if isinstance(given, str):
        return [given]
    token_ids = [item for item in given if isinstance(item, int)]
    if token_ids and len(token_ids) == len(given):
        return [token_ids]
    prompts = [item for item in given if not isinstance(item, int)]
    if not prompts:
        raise BadRequest("prompt: is empty", param="prompt")
    if token_ids or len({type(prompt) for prompt in prompts}) > 1:
        raise BadRequest("prompt: texts and token ids cannot be mixed in one list", param="prompt")
    return prompts


def _non_empty(prompt: Prompt) -> Prompt:
    """A normaliser may leave nothing of a text."""
    if not prompt.token_ids:
        raise BadRequest("prompt: holds no token", param="prompt")
    return prompt


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    """As templates expect it: content is one text."""
    if message.role not in _ROLES:
        raise BadRequest(
            f"{where}.role: {message.role[:64]!r} is none of {', '.join(sorted(_ROLES))}",
            param=f"{where}.role",
        )
    fields: dict[str, Any] = {"role": message.role, "content": _content(message, f"{where}.content")}
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            fields[name] = value
    return fields


def _content(message: ChatMessage, where: str) -> str:
    if message.content is None:
        if message.tool_calls:
            return ""
        raise BadRequest(f"{where}: is missing", param=where)
    if isinstance(message.content, str):
        return message.content
    for index, part in enumerate(message.content):
        if part.type != "text" or part.text is None:
            raise BadRequest(
                f"{where}[{index}]: parts of type {part.type[:64]!r} are not supported, only text",
                param=f"{where}[{index}]",
            )
    return "\n".join(part.text or "" for part in message.content)
