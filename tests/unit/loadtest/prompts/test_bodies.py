"""Prompts have exactly the lengths that are asked for, and share at least what the workload says they share."""

from __future__ import annotations

import functools
from dataclasses import replace
from itertools import takewhile
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import ConfigError
from gateway.chat_template import ChatTemplate
from loadtest.prompts.bodies import Answer, BodyFields, BodyMaker, Overhead
from loadtest.prompts.tokens import Vocabulary
from loadtest.settings import Endpoint, PromptForm, Target
from tests.support.layout import ROOT
from workload.chats import Chat, ChatTurn
from workload.request import WorkloadRequest

BLOCK = 16
NONE, FIELDS = Overhead(), BodyFields()
FORMS: tuple[PromptForm, ...] = ("ids", "text")
BOS = "<|bos|>"

#: As checkpoints have them: the first is the demo's own, the second takes spaces away at both ends, the third puts
#: one in front of what the user says, the last has a system prompt of its own where there is none.
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}<|assistant|>",
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content | trim }}<|end|>{% endfor %}<|assistant|>",
    "{% for m in messages %}<|user|>it: {{ m.content }}\n{% endfor %}it:",
    "{% if messages[0].role != 'system' %}<|system|>be good to me<|end|>{% endif %}"
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>",
)


@functools.cache
def demo() -> Vocabulary:
    return Vocabulary.from_file(ROOT / "engine" / "demo")


def maker(
    form: PromptForm = "text",
    *,
    endpoint: Endpoint = "completions",
    overhead: Overhead = NONE,
    fields: BodyFields = FIELDS,
    seed: int = 1,
    cache_bytes: int = 2**20,
    extra: dict[str, object] | None = None,
) -> BodyMaker:
    target = Target(name="a", base_url="http://a", model="demo", endpoint=endpoint, extra_body=extra or {})
    return BodyMaker(target, demo(), seed, form=form, fields=fields, overhead=overhead, cache_bytes=cache_bytes)


def prompt_ids(body: bytes) -> list[int]:
    """Without special tokens."""
    prompt = orjson.loads(body)["prompt"]
    return demo().encode(prompt) if isinstance(prompt, str) else prompt


def ask(prompt_tokens: int, hash_ids: tuple[int, ...] = ()) -> WorkloadRequest:
    return WorkloadRequest(0.0, prompt_tokens, 4, hash_ids, BLOCK if hash_ids else 0)


def shared(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


@st.composite
def requests(draw: st.DrawFn) -> WorkloadRequest:
    hash_ids = tuple(draw(st.lists(st.integers(0, 3), max_size=5)))
    if not hash_ids:
        return ask(draw(st.integers(1, 80)))
    return ask((len(hash_ids) - 1) * BLOCK + draw(st.integers(1, BLOCK)), hash_ids)


@pytest.mark.parametrize("form", FORMS)
@given(asked=st.lists(requests(), min_size=1, max_size=8), cache_bytes=st.sampled_from([0, 300, 2**20]))
def test_lengths_are_exact_and_shared_blocks_are_shared(
    form: PromptForm, asked: list[WorkloadRequest], cache_bytes: int
) -> None:
    bodies = maker(form, cache_bytes=cache_bytes)
    prompts = [prompt_ids(bodies.single(request, number)) for number, request in enumerate(asked)]
    assert [len(prompt) for prompt in prompts] == [request.prompt_tokens for request in asked]
    for one, one_ids in zip(asked, prompts, strict=True):
        for other, other_ids in zip(asked, prompts, strict=True):
            blocks = shared(list(one.hash_ids), list(other.hash_ids))
            at_least = min(blocks * BLOCK, one.prompt_tokens, other.prompt_tokens)
            assert shared(one_ids, other_ids) >= at_least


@pytest.mark.parametrize("form", FORMS)
def test_prompts_that_share_nothing_differ_from_the_start(form: PromptForm) -> None:
    """By chance a place agrees now and then: the demo's vocabulary is small."""
    bodies = maker(form)
    prompts = [prompt_ids(bodies.single(request, n)) for n, request in enumerate([ask(40)] * 20 + [ask(40, (7, 8, 9))])]
    pairs = [shared(one, other) for index, one in enumerate(prompts) for other in prompts[:index]]
    assert max(pairs) <= 3


@pytest.mark.parametrize("form", FORMS)
def test_equal_blocks_are_equal_bytes(form: PromptForm) -> None:
    bodies = maker(form)
    one, other = bodies.single(ask(3 * BLOCK, (1, 2, 3)), 0), bodies.single(ask(3 * BLOCK, (1, 2, 4)), 1)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    separators = one[:same].count(b"," if form == "ids" else b" ")
    assert separators >= 2 * BLOCK


@pytest.mark.parametrize("form", FORMS)
def test_a_body_is_a_function_of_request_number_and_seed(form: PromptForm) -> None:
    assert maker(form).single(ask(30), 5) == maker(form).single(ask(30), 5)
    assert maker(form).single(ask(30), 5) != maker(form).single(ask(30), 6)
    assert maker(form, seed=2).single(ask(30), 5) != maker(form).single(ask(30), 5)


# --- what stands in a body ---------------------------------------------------------------------------


def test_fields_are_those_that_the_server_takes() -> None:
    plain = BodyFields(ignore_eos=False, include_usage=False)
    body = orjson.loads(maker(fields=plain).single(ask(3), 0))
    assert body.pop("prompt")
    assert body == {"model": "demo", "stream": True, "temperature": 0, "max_tokens": 4}
    rich = orjson.loads(maker("ids", fields=BodyFields(return_token_ids=True)).single(ask(3), 0))
    assert rich["stream_options"] == {"include_usage": True}
    assert (rich["ignore_eos"], rich["return_token_ids"]) == (True, True)


def test_the_users_fields_go_before_the_load_tests() -> None:
    body = orjson.loads(maker(extra={"temperature": 0.7, "priority": 3}).single(ask(3), 0))
    assert (body["temperature"], body["priority"], body["stream"]) == (0.7, 3, True)


def test_another_name_for_the_number_of_tokens() -> None:
    fields = BodyFields(max_tokens_name="max_completion_tokens")
    body = orjson.loads(maker(endpoint="chat", fields=fields).single(ask(3), 0))
    assert body["max_completion_tokens"] == 4
    assert "max_tokens" not in body


@pytest.mark.parametrize("name", ["prompt", "messages", "model", "stream", "max_tokens", "n", "best_of", "echo"])
def test_the_users_fields_may_not_contradict_the_plan(name: str) -> None:
    with pytest.raises(ConfigError, match=f"extra body: {name} cannot be set"):
        maker(extra={name: 1})


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ConfigError, match="the chat endpoint takes text"):
        maker("ids", endpoint="chat")
    target = Target(name="a", base_url="http://a", model="demo", endpoint="completions")
    with pytest.raises(ConfigError, match="no token ids are known \\(common words\\)"):
        BodyMaker(target, Vocabulary.assumed(), 1, form="ids", fields=FIELDS, overhead=NONE)
    few = replace(demo(), words=("one", "two"), openers=("one",))
    with pytest.raises(ConfigError, match="only 2 words are one token each"):
        BodyMaker(target, few, 1, form="text", fields=FIELDS, overhead=NONE)


# --- overhead ----------------------------------------------------------------------------------------


@given(request=requests(), overhead=st.integers(0, 50))
def test_words_make_room_for_what_the_server_adds(request: WorkloadRequest, overhead: int) -> None:
    bodies = maker(overhead=Overhead(prompt_tokens=overhead))
    body = bodies.single(request, 0)
    assert len(prompt_ids(body)) == max(1, request.prompt_tokens - overhead)
    assert bodies.num_lengthened == (request.prompt_tokens <= overhead)
    whole = prompt_ids(maker().single(request, 0))
    assert prompt_ids(body) == whole[: len(prompt_ids(body))]


def test_without_words_for_the_start_of_a_text_it_begins_with_a_space() -> None:
    bare = replace(demo(), openers=())
    target = Target(name="a", base_url="http://a", model="demo", endpoint="completions")
    bodies = BodyMaker(target, bare, 1, form="text", fields=FIELDS, overhead=NONE)
    body = bodies.single(ask(9), 0)
    assert orjson.loads(body)["prompt"].startswith(" ")
    assert len(prompt_ids(body)) == 9


# --- chats -------------------------------------------------------------------------------------------


def rendered_tokens(template: ChatTemplate, messages: list[dict[str, Any]]) -> int:
    return len(demo().encode(template.render(messages)))


def overhead_of(template: ChatTemplate) -> Overhead:
    """What the template adds, by rendering it around single words."""
    user, answer = {"role": "user", "content": "help"}, {"role": "assistant", "content": "help"}
    first = rendered_tokens(template, [user]) - 1
    return Overhead(
        prompt_tokens=first,
        turn_tokens=rendered_tokens(template, [user, answer, user]) - 3 - first,
        system_tokens=rendered_tokens(template, [{"role": "system", "content": "help"}, user]) - 2 - first,
    )


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    lengths = st.integers(20, 60)
    turns = draw(st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
    return Chat(
        0.0, tuple(ChatTurn(*turn) for turn in turns), draw(st.integers(0, 3)), draw(st.sampled_from([0, 25, 60]))
    )


def words(num_tokens: int) -> str:
    return " ".join(demo().openers[index % 50] for index in range(num_tokens))


@pytest.mark.parametrize("source", TEMPLATES, ids=["demo", "trims", "spaced", "own-system-prompt"])
@settings(max_examples=25)
@given(chat=chats())
def test_messages_have_the_planned_length_inside_the_template(source: str, chat: Chat) -> None:
    template = ChatTemplate(source, special_tokens={"bos_token": BOS}, wall_s=lambda: 0.0)
    bodies = maker(endpoint="chat", overhead=overhead_of(template))
    answers: list[Answer] = []
    for turn, asked in enumerate(chat.turns):
        messages = orjson.loads(bodies.turn(chat, 0, turn, answers))["messages"]
        assert rendered_tokens(template, messages) == bodies.turn_tokens(chat, turn, answers)
        answers.append(Answer(words(asked.output_tokens), None, asked.output_tokens))
    single = orjson.loads(bodies.single(ask(50), 0))["messages"]
    assert rendered_tokens(template, single) == 50
    assert bodies.num_lengthened == 0


def test_each_turn_repeats_the_messages_before_it() -> None:
    bodies = maker(endpoint="chat")
    chat = Chat(0.0, (ChatTurn(5, 3), ChatTurn(4, 3), ChatTurn(2, 3)), 7, 9)
    answers = [Answer('it is "so"\n\u00e9'), Answer("yes")]
    before: list[dict[str, str]] = []
    for turn in range(3):
        messages = orjson.loads(bodies.turn(chat, 2, turn, answers[:turn]))["messages"]
        assert messages[: len(before)] == before
        before = messages
    assert [message["role"] for message in before] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert [before[2]["content"], before[4]["content"]] == [answer.text for answer in answers]
    assert [len(message["content"].split()) for message in (before[0], before[1], before[3])] == [9, 5, 4]


def test_a_system_prompt_goes_into_the_first_message_where_the_template_has_none() -> None:
    bodies = maker(endpoint="chat", overhead=Overhead(prompt_tokens=3, system_tokens=None))
    chat = Chat(0.0, (ChatTurn(8, 3),), 7, 9)
    (message,) = orjson.loads(bodies.turn(chat, 2, 0, ()))["messages"]
    assert message["role"] == "user"
    assert len(demo().encode(message["content"])) == 9 + 8 - 3
    assert bodies.turn_tokens(chat, 0, ()) == 17


@pytest.mark.parametrize("form", FORMS)
def test_chats_of_one_system_prompt_share_it_and_nothing_else(form: PromptForm) -> None:
    bodies = maker(form)
    one, other, stranger = (Chat(0.0, (ChatTurn(30, 3),), number, 40) for number in (7, 7, 8))
    first, second, third = (
        prompt_ids(bodies.turn(chat, number, 0, ())) for number, chat in enumerate((one, other, stranger))
    )
    assert 40 <= shared(first, second) <= 43
    assert shared(first, third) <= 3
    assert [len(first), len(second), len(third)] == [70, 70, 70]


@pytest.mark.parametrize("form", FORMS)
@given(chat=chats())
def test_completions_grow_by_the_answer_and_what_is_said_next(form: PromptForm, chat: Chat) -> None:
    bodies = maker(form, overhead=Overhead(prompt_tokens=1 if form == "text" else 0))
    answers: list[Answer] = []
    before: list[int] = []
    for turn, asked in enumerate(chat.turns):
        prompt = prompt_ids(bodies.turn(chat, 3, turn, answers))
        assert len(prompt) + (form == "text") == bodies.turn_tokens(chat, turn, answers)
        assert prompt[: len(before)] == before
        text = f" {words(asked.output_tokens)}"
        ids = tuple(demo().encode(text))
        answers.append(Answer(text, ids, len(ids)))
        before = [*prompt, *ids]


def test_unknown_ids_of_an_answer_are_made_up_as_many_as_it_had() -> None:
    bodies = maker("ids")
    chat = Chat(0.0, (ChatTurn(5, 6), ChatTurn(4, 3)))
    first = prompt_ids(bodies.turn(chat, 0, 0, ()))
    for answer, tokens in (
        (Answer("text"), 6),
        (Answer("text", None, 2), 2),
        (Answer("", (), 0), 0),
        (Answer("", None, 0), 0),
    ):
        prompt = prompt_ids(bodies.turn(chat, 0, 1, [answer]))
        assert len(prompt) == bodies.turn_tokens(chat, 1, [answer]) == 5 + tokens + 4
        assert prompt[:5] == first


# --- text that a chat brings along ---------------------------------------------------------------------


GIVEN = Chat(0.0, (ChatTurn(5, 6, 0.0, 'Who is "he"?\n\u00e9\u4f60'), ChatTurn(4, 3, 0.0, "Tell me.")))


def test_given_text_is_sent_as_it_is() -> None:
    messages = orjson.loads(maker(endpoint="chat").turn(GIVEN, 0, 1, [Answer("It is so.")]))["messages"]
    assert [message["content"] for message in messages] == ['Who is "he"?\n\u00e9\u4f60', "It is so.", "Tell me."]
    prompt = orjson.loads(maker().turn(GIVEN, 0, 1, [Answer(" It is so.")]))["prompt"]
    assert prompt == 'Who is "he"?\n\u00e9\u4f60 It is so.\nTell me.'


def test_given_text_as_ids_is_encoded() -> None:
    bodies, answers = maker("ids"), [Answer(" so", (300, 301))]
    prompt = prompt_ids(bodies.turn(GIVEN, 0, 1, answers))
    text = [demo().encode(turn.text or "") for turn in GIVEN.turns]
    assert prompt == [*text[0], 300, 301, *text[1]]
    assert bodies.turn_tokens(GIVEN, 1, answers) == len(prompt)


def test_given_text_as_ids_needs_a_tokenizer() -> None:
    target = Target(name="a", base_url="http://a", model="demo", endpoint="completions")
    unaware = replace(demo(), tokenizer=None)
    bodies = BodyMaker(target, unaware, 1, form="ids", fields=FIELDS, overhead=NONE)
    with pytest.raises(ConfigError, match="text of a trace as token ids needs the model's tokenizer"):
        bodies.turn(GIVEN, 0, 0, ())
