"""Tokenizers of the families that checkpoints use, with some hundred words each."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from loadtest.prompts.common_words import COMMON_WORDS
from loadtest.prompts.tokens import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BOS, EOS = "<s>", "</s>"


def _lines() -> list[str]:
    rng = random.Random(3)
    return [" ".join(rng.choices(COMMON_WORDS[:250], k=12)) for _ in range(400)]


def _bpe(pre_tokenizer: pre_tokenizers.PreTokenizer, decoder: decoders.Decoder) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


def byte_level(*, add_prefix_space: bool = False) -> Tokenizer:
    """GPT-2 and Llama 3 style; every text gets a bos in front."""
    tokenizer = _bpe(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space), decoders.ByteLevel())
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def prefix_space() -> Tokenizer:
    return byte_level(add_prefix_space=True)


def metaspace() -> Tokenizer:
    return _bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace())


def space_marked() -> Tokenizer:
    """Llama 2 style: nothing splits the text, and every text gets a space in front."""
    described = json.loads(metaspace().to_str())
    described["pre_tokenizer"] = None
    whole = Tokenizer.from_str(json.dumps(described))
    whole.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return whole


def greedy_word() -> Tokenizer:
    """Nothing splits the text, and "of" makes one token with any other word behind it."""
    described = json.loads(space_marked().to_str())
    words, merges = described["model"]["vocab"], described["model"]["merges"]
    for word in [word for word in words if word.startswith("▁") and word not in ("▁", "▁of")]:
        words[f"▁of{word}"] = len(words)
        merges.append(["▁of", word])
    return Tokenizer.from_str(json.dumps(described))


def word_pieces() -> Tokenizer:
    """BERT style: without case, and with a limit on length in its file."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=700, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(_lines(), trainer)
    described = json.loads(tokenizer.to_str())
    described["truncation"] = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    return Tokenizer.from_str(json.dumps(described))


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=600, special_tokens=["<unk>", EOS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_lines(), trainer)
    return tokenizer


FAMILIES: tuple[Callable[[], Tokenizer], ...] = (
    byte_level,
    prefix_space,
    metaspace,
    space_marked,
    greedy_word,
    word_pieces,
    unigram,
)


def written(family: Callable[[], Tokenizer], folder: Path) -> Vocabulary:
    """Of the family's file, which is written to `folder`."""
    family().save(str(folder / "tokenizer.json"))
    return Vocabulary.from_file(folder)
