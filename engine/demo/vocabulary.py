"""Builds the tokenizer of the demo model.

It is a byte-level BPE whose vocabulary holds every byte (so any UTF-8 text round-trips), the frequent
words of the corpus as whole tokens, and merges of common letter pairs for all other words. Digits
are cut apart before merging, so a number always has one token per digit. Whole words are found by
``ignore_merges`` (a word that is in the vocabulary is used as it is), which spares the chains of
intermediate tokens that merges up to a whole word would need.
"""

import random
import re
import string
from collections import Counter
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from engine.demo import corpus

PAD: Final = "<|pad|>"
SPECIAL_TOKENS: Final = (PAD, corpus.BOS, corpus.END, corpus.SYSTEM, corpus.USER, corpus.ASSISTANT)
VOCABULARY_SIZE: Final = 960

_PAIRS: Final = (
    "th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co "
    "me de hi ri ro ic ne ea ra ce li ch ll be ma si om ur ca el ta la ns di fo ho pe ec pr no ct us "
    "ac ot il tr ly"
)

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def _byte_alphabet() -> dict[int, str]:
    """The printable character that stands for each byte (the GPT-2 mapping)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in mapping:
            mapping[byte] = chr(256 + len(mapping) - len(printable))
    return mapping


def _frequent_words(rng: random.Random, rows: int) -> list[str]:
    counts: Counter[str] = Counter()
    for _ in range(rows):
        for generate in (corpus.recall_conversation, corpus.chat, corpus.stories):
            for span in generate(rng, 256):
                if span.text not in SPECIAL_TOKENS:
                    counts.update(re.findall(corpus.WORD_PATTERN, span.text))
    for word in corpus.NAMES:
        counts[word] += rows
    return [word for word, count in counts.most_common() if count > 12]


def build_tokenizer(rng: random.Random) -> Tokenizer:
    """Build the tokenizer from a sample of the corpus."""
    alphabet = _byte_alphabet()
    vocabulary = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for byte in range(256):
        vocabulary[alphabet[byte]] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for pair in (*_PAIRS.split(), *(alphabet[ord(" ")] + letter for letter in string.ascii_letters)):
        vocabulary[pair] = len(vocabulary)
        merges.append((pair[0], pair[1]))
    for word in _frequent_words(rng, rows=2_000):
        if len(vocabulary) == VOCABULARY_SIZE:
            break
        vocabulary.setdefault("".join(alphabet[byte] for byte in word.encode()), len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    special_tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special_tokens)  # pyright: ignore[reportUnknownMemberType]
    split = pre_tokenizers.Split(Regex(corpus.WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, vocabulary[corpus.BOS])]
    )
    return tokenizer


def tokenizer_settings(max_length: int) -> dict[str, Any]:
    """What goes into ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": corpus.BOS,
        "eos_token": corpus.END,
        "pad_token": PAD,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
