"""Finds out what a server takes and tells, before it is measured: by asking it for a few tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import msgspec

from contracts.errors import ConfigError
from loadtest.http.reader import AnswerReader
from loadtest.http.refusals import detail_of
from loadtest.prompts.bodies import PATHS, Answer, BodyFields, BodyMaker, Overhead
from loadtest.record import Outcome, RequestRecord
from workload.chats import Chat, ChatTurn
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loadtest.prompts.tokens import Vocabulary
    from loadtest.settings import PromptForm, Target

#: Of one answer; a cold server may load its model first.
DEADLINE_S = 60.0

_MODELS_PATH = "/v1/models"

#: Numbers that no item of a workload has: the run's own prompts stay unknown to the server's caches.
_NUMBER = -1

_PROMPT_TOKENS, _LONGER_PROMPT_TOKENS, _OUTPUT_TOKENS = 32, 96, 16

#: How often one question is asked.
_MAX_TRIES = 4
#: The longest `Retry-After` that is waited for in between.
_MAX_RETRY_AFTER_S = 5.0

#: Answers, and failures that another try would only repeat.
_LASTING = frozenset(
    {
        Outcome.FINISHED, Outcome.NO_OUTPUT, Outcome.HTTP_4XX, Outcome.HTTP_OTHER, Outcome.REFUSED,
        Outcome.CONNECT_FAILED, Outcome.CONNECT_TIMEOUT, Outcome.TIMEOUT,
    }
)  # fmt: skip

#: Statuses that say nothing about the fields of the body.
_NOT_ABOUT_FIELDS = frozenset({401, 403, 404, 408, 413, 429, 502, 503, 504})


class Sending(Protocol):
    def cancel(self, outcome: Outcome) -> None: ...


class Client(Protocol):
    """What is needed of `http.HttpClient`."""

    async def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]: ...

    def send(self, path: str, body: bytes, reader: AnswerReader, on_end: Callable[[], None]) -> Sending: ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    #: Prompt and answer together; None: the server does not say.
    max_model_len: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeResult:
    form: PromptForm
    #: What of the wanted fields the server takes.
    fields: BodyFields
    overhead: Overhead
    #: Sentences for the user: what could not be had, and what is only about right.
    notes: tuple[str, ...]


# --- the model --------------------------------------------------------------------------------------


class _ModelEntry(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_ModelEntry]


async def find_model(client: Client, wanted: str | None, *, base_url: str) -> ServedModel:
    """The named model, or the first that the server lists. Raises ConfigError saying what the server has.

    A server without a list is taken at the user's word.
    """
    asked = f"GET {base_url}{_MODELS_PATH}"
    try:
        status, headers, body = await client.get(_MODELS_PATH)
    except OSError as error:
        raise ConfigError(f"{asked}: {error or type(error).__name__}") from error
    if status != 200:
        if wanted is not None and status in (404, 405, 501):
            return ServedModel(wanted, None)
        raise ConfigError(f"{asked}: status {status}: {detail_of(status, headers, body)}")
    try:
        models = msgspec.json.decode(body, type=_Models).data
    except msgspec.DecodeError as error:
        raise ConfigError(f"{asked} is no list of models: {error}") from error
    for model in models:
        if wanted in (None, model.id):
            return ServedModel(model.id, model.max_model_len)
    listed = ", ".join(model.id for model in models[:20]) or "no model at all"
    raise ConfigError(f"{base_url} serves {listed}" + (f", not {wanted}" if wanted else ""))


# --- fields and lengths -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Wish:
    """Something that a server may refuse."""

    name: str
    #: The same way of asking, with it.
    add: Callable[[_Way], _Way]


@dataclass(frozen=True, slots=True)
class _Way:
    """How to ask."""

    form: PromptForm
    fields: BodyFields


async def probe(
    client: Client,
    target: Target,
    vocabulary: Vocabulary,
    *,
    form: PromptForm | None,
    fields: BodyFields,
    has_chats: bool,
    has_text: bool,
    now_s: Callable[[], float],
    deadline_s: float = DEADLINE_S,
) -> ProbeResult:
    """`form` None: token ids where that is possible, else text. `fields`: those wanted; each that the server refuses
    is left out and noted. `has_text`: chats of the workload bring their own text, which is ids to a tokenizer alone.
    Raises ConfigError when the form cannot be had, and when it does not answer even the plainest request."""
    can_encode = not has_text or vocabulary.tokenizer is not None
    if form == "ids" and not can_encode:
        raise ConfigError("the workload's own text as token ids needs the model's tokenizer: name it, or send text")
    takes_ids = form is None and target.endpoint == "completions" and bool(vocabulary.ids) and can_encode
    asker = _Asker(client, target, vocabulary, now_s, deadline_s)
    way, record = await asker.find_way(_plain_way(form), _wishes(fields, ids=takes_ids))
    asker.note_answer(record, way)
    overhead = await asker.overhead(way, record, has_chats=has_chats)
    returns_token_ids = way.fields.return_token_ids and record.counted_output_tokens is not None
    return ProbeResult(
        form=way.form,
        fields=replace(way.fields, return_token_ids=returns_token_ids),
        overhead=overhead,
        notes=tuple(asker.notes),
    )


def _plain_way(form: PromptForm | None) -> _Way:
    fields = BodyFields(ignore_eos=False, include_usage=False, return_token_ids=False)
    return _Way(form or "text", fields)


def _wishes(fields: BodyFields, *, ids: bool) -> list[_Wish]:
    wishes: list[_Wish] = []
    if ids:
        wishes.append(_Wish("prompts as token ids", lambda way: replace(way, form="ids")))
    if fields.include_usage:
        wishes.append(_field_wish("stream_options", lambda fields: replace(fields, include_usage=True)))
    if fields.ignore_eos:
        wishes.append(_field_wish("ignore_eos", lambda fields: replace(fields, ignore_eos=True)))
    if fields.return_token_ids:
        wishes.append(_field_wish("return_token_ids", lambda fields: replace(fields, return_token_ids=True)))
    return wishes


def _field_wish(name: str, add: Callable[[BodyFields], BodyFields]) -> _Wish:
    return _Wish(name, lambda way: replace(way, fields=add(way.fields)))


class _Asker:
    def __init__(
        self,
        client: Client,
        target: Target,
        vocabulary: Vocabulary,
        now_s: Callable[[], float],
        deadline_s: float,
    ) -> None:
        self._client = client
        self._target = target
        self._vocabulary = vocabulary
        self._now_s = now_s
        self._deadline_s = deadline_s
        self.notes: list[str] = []

    async def find_way(self, plainest: _Way, wishes: Sequence[_Wish]) -> tuple[_Way, RequestRecord]:
        """The way with all wishes, if the server takes it; else the plainest, and each wish that it takes on top."""
        wanted = plainest
        for wish in wishes:
            wanted = wish.add(wanted)
        record = await self._ask_single(wanted)
        if not _is_refused(record):
            return wanted, self._answered(record)
        way, record = await self._plainest(plainest)
        for wish in wishes:
            richer = wish.add(way)
            tried = await self._ask_single(richer)
            if _is_refused(tried):
                self.notes.append(f"the server refuses {wish.name}: {tried.detail}")
            else:
                way, record = richer, self._answered(tried)
        return way, record

    async def _plainest(self, plainest: _Way) -> tuple[_Way, RequestRecord]:
        record = await self._ask_single(plainest)
        if _is_refused(record) and "max_completion_tokens" in record.detail:
            fields = replace(plainest.fields, max_tokens_name="max_completion_tokens")
            plainest = replace(plainest, fields=fields)
            record = await self._ask_single(plainest)
        return plainest, self._answered(record)

    def note_answer(self, record: RequestRecord, way: _Way) -> None:
        answered = record.answered_tokens
        if record.usage_output_tokens is None:
            self.notes.append(
                "the server reports no usage: lengths of prompts cannot be verified, and tokens of answers "
                "are counted by token ids or, without those, as one for each chunk"
            )
        elif way.fields.ignore_eos and answered != _OUTPUT_TOKENS:
            self.notes.append(f"ignore_eos is without effect: {answered} tokens answered, asked {_OUTPUT_TOKENS}")
        if record.outcome is Outcome.NO_OUTPUT:
            self.notes.append("the server answered without a single token")

    # --- what the server adds to a prompt -----------------------------------------------------------

    async def overhead(self, way: _Way, record: RequestRecord, *, has_chats: bool) -> Overhead:
        counted = record.usage_prompt_tokens
        if counted is None:
            return Overhead()
        longer = self._answered(await self._ask_single(way, _LONGER_PROMPT_TOKENS))
        added = counted - _PROMPT_TOKENS
        added_to_longer = (longer.usage_prompt_tokens or 0) - _LONGER_PROMPT_TOKENS
        if added != added_to_longer or added < 0:
            self.notes.append(
                f"prompts are only about as long as asked: the server counts {counted} and "
                f"{longer.usage_prompt_tokens} tokens for {_PROMPT_TOKENS} and {_LONGER_PROMPT_TOKENS} "
                f"({self._vocabulary.source})"
            )
            return Overhead()
        if self._target.endpoint == "completions" or not has_chats:
            return Overhead(prompt_tokens=added)
        return Overhead(
            prompt_tokens=added,
            turn_tokens=await self._turn_overhead(way, added),
            system_tokens=await self._system_overhead(way, added),
        )

    async def _turn_overhead(self, way: _Way, added: int) -> int:
        chat = Chat(0.0, (ChatTurn(_PROMPT_TOKENS, _OUTPUT_TOKENS), ChatTurn(_PROMPT_TOKENS, _OUTPUT_TOKENS)))
        # At the start of a text not every word is one token.
        first = (self._vocabulary.openers or self._vocabulary.words)[0]
        answer = Answer(" ".join((first, *self._vocabulary.words[: _OUTPUT_TOKENS - 1])))
        record = self._answered(await self._ask(self._maker(way).turn(chat, _NUMBER, 1, [answer])))
        return (record.usage_prompt_tokens or 0) - 2 * _PROMPT_TOKENS - _OUTPUT_TOKENS - added

    async def _system_overhead(self, way: _Way, added: int) -> int | None:
        """May be negative: some templates put in a system prompt of their own where there is none."""
        chat = Chat(0.0, (ChatTurn(_PROMPT_TOKENS, _OUTPUT_TOKENS),), _NUMBER, _PROMPT_TOKENS)
        record = await self._ask(self._maker(way).turn(chat, _NUMBER, 0, ()))
        if _is_refused(record):
            self.notes.append(f"the server refuses system messages, they go into the first user's: {record.detail}")
            return None
        return (self._answered(record).usage_prompt_tokens or 0) - 2 * _PROMPT_TOKENS - added

    # --- asking -------------------------------------------------------------------------------------

    def _maker(self, way: _Way) -> BodyMaker:
        return BodyMaker(self._target, self._vocabulary, 0, form=way.form, fields=way.fields, overhead=Overhead())

    async def _ask_single(self, way: _Way, prompt_tokens: int = _PROMPT_TOKENS) -> RequestRecord:
        request = WorkloadRequest(0.0, prompt_tokens, _OUTPUT_TOKENS)
        return await self._ask(self._maker(way).single(request, _NUMBER))

    async def _ask(self, body: bytes) -> RequestRecord:
        """A server that fails now and then is to be measured, too: what may be chance is asked again."""
        for _ in range(_MAX_TRIES - 1):
            record = await self._ask_once(body)
            if record.outcome in _LASTING:
                return record
            wait_s = record.retry_after_s
            # A 429 that names no time would only come again.
            if wait_s is None and record.outcome is Outcome.REJECTED:
                return record
            if wait_s is not None:
                if wait_s > _MAX_RETRY_AFTER_S:
                    return record
                await asyncio.sleep(wait_s)
        return await self._ask_once(body)

    async def _ask_once(self, body: bytes) -> RequestRecord:
        record = RequestRecord(
            index=0, item=0, turn=0, slo_class="", prompt_tokens=_PROMPT_TOKENS, output_tokens=_OUTPUT_TOKENS
        )
        ended = asyncio.Event()
        reader = AnswerReader(record, now_s=self._now_s, keep_text=False)
        sending = self._client.send(self._path, body, reader, ended.set)
        try:
            async with asyncio.timeout(self._deadline_s):
                await ended.wait()
        except TimeoutError:
            sending.cancel(Outcome.TIMEOUT)
            record.detail = f"no whole answer within {self._deadline_s:g} s"
        return record

    @property
    def _path(self) -> str:
        return PATHS[self._target.endpoint]

    def _answered(self, record: RequestRecord) -> RequestRecord:
        """Raises ConfigError when it was not."""
        if record.outcome not in (Outcome.FINISHED, Outcome.NO_OUTPUT):
            raise ConfigError(
                f"POST {self._target.base_url}{self._path}: {record.outcome}: {record.detail or 'no word why'}"
            )
        return record


def _is_refused(record: RequestRecord) -> bool:
    """Whether leaving out a field may help."""
    return (
        record.outcome in (Outcome.HTTP_4XX, Outcome.HTTP_5XX, Outcome.ERROR_EVENT)
        and record.status not in _NOT_ABOUT_FIELDS
    )
