"""The text of the demo model: seeded, split from its probes, and encoded without loss."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import minijinja
import pytest
from tokenizers import Tokenizer

from engine.demo import corpus
from engine.demo.corpus import Kind, Span

GENERATORS = (corpus.recall_conversation, corpus.notes, corpus.chat, corpus.stories)
EVERYBODY = corpus.Circle(corpus.NAMES, corpus.NUMBER_ATTRIBUTES)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The stored tokenizer."""
    return Tokenizer.from_file(str(Path(corpus.__file__).with_name("tokenizer.json")))


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("generate", GENERATORS)
def test_same_seed_gives_same_text(generate: Callable[[random.Random, int], list[Span]]) -> None:
    first = generate(random.Random(5), 200)
    assert first == generate(random.Random(5), 200)
    assert first != generate(random.Random(6), 200)


@pytest.mark.parametrize("generate", GENERATORS)
def test_text_reaches_the_wanted_length(generate: Callable[[random.Random, int], list[Span]]) -> None:
    for seed in range(20):
        text = "".join(span.text for span in generate(random.Random(seed), 150))
        assert corpus.rough_token_count(text) >= 150


def test_recalled_values_were_stated_before() -> None:
    for seed in range(20):
        stated = ""
        for span in corpus.recall_conversation(random.Random(seed), 300):
            if span.kind is Kind.RECALL:
                assert f"{span.text}." in stated
            stated += span.text


def test_training_facts_and_probe_facts_are_disjoint() -> None:
    rng = random.Random(3)
    assert not any(
        corpus.is_held_out(fact.answer_stem, fact.value)
        for fact in corpus.draw_facts(rng, 100, EVERYBODY, held_out=False)
    )
    assert all(
        corpus.is_held_out(fact.answer_stem, fact.value)
        for fact in corpus.draw_facts(rng, 100, EVERYBODY, held_out=True)
    )


def test_drawn_facts_never_contradict_known_ones() -> None:
    rng = random.Random(4)
    known = corpus.draw_facts(rng, 40, EVERYBODY, held_out=False)
    new = corpus.draw_facts(rng, 40, EVERYBODY, held_out=False, known=known)
    assert len({fact.answer_stem for fact in (*known, *new)}) == 80


def test_probe_has_the_wanted_length_and_holds_the_answer(tokenizer: Tokenizer) -> None:
    rng = random.Random(2)
    for tokens_target in (60, 200, 400):
        probe = corpus.probe(rng, tokens_target, lambda text: len(_encode(tokenizer, text)))
        prompt = corpus.render_prompt(probe.turns)
        assert abs(len(_encode(tokenizer, prompt)) - tokens_target) < 40
        assert f"{probe.expected}." in prompt
        assert probe.answer.endswith(f"{probe.expected}.")


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Anna's locker number is 4821.",
        "  two  spaces,\ttabs\r\n\nand lines  ",
        "naïve Ünïcödé — Ελληνικά, 日本語, 🙂👩‍👩‍👧 ٣٤",
        "snake_case __init__ don't x'y's 3rd 1_000",
        "\x00\x7f\u200b\ufeff",
    ],
)
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(_encode(tokenizer, text), skip_special_tokens=False) == text


def test_random_text_round_trips(tokenizer: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(200):
        points = (rng.choice((rng.randrange(0x250), rng.randrange(0xE000, 0x20000))) for _ in range(12))
        text = "".join(map(chr, points))
        assert tokenizer.decode(_encode(tokenizer, text), skip_special_tokens=False) == text


def test_every_digit_is_its_own_token(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("is 4821, 007 and x99", add_special_tokens=False).tokens
    assert [token for token in tokens if any(map(str.isdigit, token))] == list("482100799")


def test_names_and_values_are_single_tokens(tokenizer: Tokenizer) -> None:
    values = (*corpus.NAMES, *corpus.COLOURS, *corpus.CITIES, *corpus.ANIMALS, *corpus.ROOMS)
    assert all(len(_encode(tokenizer, f" {value}")) == 1 for value in values)
    assert all(len(_encode(tokenizer, name)) == 1 for name in corpus.NAMES)


def test_control_tokens_are_single_tokens(tokenizer: Tokenizer) -> None:
    for token in (corpus.BOS, corpus.END, corpus.SYSTEM, corpus.USER, corpus.ASSISTANT):
        assert _encode(tokenizer, token) == [tokenizer.token_to_id(token)]


def test_chat_template_renders_what_the_model_was_trained_on() -> None:
    settings = json.loads(Path(corpus.__file__).with_name("tokenizer_config.json").read_text())
    turns = (
        corpus.plain_turn("system", "You are a helpful assistant."),
        corpus.plain_turn("user", "Hello!"),
        corpus.plain_turn("assistant", "Hello! How can I help you today?"),
        corpus.plain_turn("user", "Who are you?"),
    )
    rendered = minijinja.Environment().render_str(
        settings["chat_template"],
        messages=[{"role": turn.role, "content": turn.text} for turn in turns],
        add_generation_prompt=True,
        bos_token=settings["bos_token"],
        eos_token=settings["eos_token"],
    )
    assert rendered == corpus.render_prompt(turns)
