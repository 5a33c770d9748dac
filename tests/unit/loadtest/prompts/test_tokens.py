"""Words are one token each, whatever the tokenizer; special tokens never stand in a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from contracts.errors import ConfigError
from loadtest.prompts.common_words import COMMON_WORDS
from loadtest.prompts.pieces import MIN_WORDS
from loadtest.prompts.tokens import Vocabulary
from tests.support.layout import ROOT
from tests.unit.loadtest.prompts import tokenizers_for_tests as small

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tokenizers import Tokenizer

    Family = Callable[[], Tokenizer]


@pytest.fixture(scope="module", params=small.FAMILIES, ids=lambda family: family.__name__)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return small.written(request.param, tmp_path_factory.mktemp("tokenizer"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_sequence_of_words_has_as_many_tokens(vocabulary: Vocabulary, data: st.DataObject) -> None:
    opener = data.draw(st.sampled_from(vocabulary.openers))
    words = [opener, *data.draw(st.lists(st.sampled_from(vocabulary.words), max_size=60))]
    assert len(vocabulary.encode(" ".join(words))) == len(words)


def test_there_are_words_enough_and_openers_among_them(vocabulary: Vocabulary) -> None:
    assert len(vocabulary.words) == len(set(vocabulary.words)) > MIN_WORDS
    assert set(vocabulary.openers) <= set(vocabulary.words)


def test_ids_are_ordinary_tokens_and_all_of_them(vocabulary: Vocabulary) -> None:
    tokenizer = vocabulary.tokenizer
    assert tokenizer is not None
    special = {
        id_ for token, id_ in tokenizer.get_vocab().items() if token in ("<s>", "</s>", "[UNK]", "[SEP]", "<unk>")
    }
    assert special
    assert set(vocabulary.ids) == set(tokenizer.get_vocab().values()) - special
    assert list(vocabulary.ids) == sorted(set(vocabulary.ids))


def test_a_word_that_runs_into_its_neighbours_is_left_out(tmp_path: Path) -> None:
    words = small.written(small.greedy_word, tmp_path).words
    assert "of" in small.written(small.space_marked, tmp_path).words
    assert "of" not in words
    assert len(words) > 100


def test_words_without_a_token_at_the_start_of_a_text_do_not_open_one(tmp_path: Path) -> None:
    """Byte-level vocabularies know most words only with a space before them."""
    vocabulary = small.written(small.byte_level, tmp_path)
    others = [word for word in vocabulary.words if word not in vocabulary.openers]
    assert others
    assert all(len(vocabulary.encode(word)) > 1 for word in others)


def test_the_demo_model_has_words_and_openers() -> None:
    folder = ROOT / "engine" / "demo"
    vocabulary = Vocabulary.from_file(folder)
    assert Vocabulary.from_file(folder / "tokenizer.json") == vocabulary
    assert min(vocabulary.ids) > 5, "its first six are special"
    assert min(len(vocabulary.words), len(vocabulary.openers)) >= MIN_WORDS


def test_assumed_words_are_plain_and_without_ids() -> None:
    vocabulary = Vocabulary.assumed()
    assert not vocabulary.ids
    assert len(set(COMMON_WORDS)) == len(COMMON_WORDS) > 1000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in COMMON_WORDS)
    with pytest.raises(ConfigError, match=r"needs the model's tokenizer: name its tokenizer\.json"):
        vocabulary.encode("hello")


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {}}', "\x00\xff"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json is no tokenizer: "):
        Vocabulary.from_file(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"no tokenizer at {tmp_path / 'tokenizer.json'}"):
        Vocabulary.from_file(tmp_path)
