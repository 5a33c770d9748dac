"""Small tokenizers of the families that checkpoints use, trained on a few lines."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from gateway.chat_template import ChatTemplate
from gateway.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LINES = [
    "the quick brown fox jumps over the lazy dog",
    "Hello world, hello there! How are you today?",
    "naïve café, Größe, 你好世界, emoji 😀 👍🏽",
    "one two three four five six seven eight nine ten",
] * 4

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"

CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@functools.cache
def byte_level() -> Tokenizer:
    """GPT-2 and Llama 3 style: every byte is a token, bos is added in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


@functools.cache
def space_marked() -> Tokenizer:
    """Llama 2 and Mistral style: SentencePiece with byte fallback."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", "▁the", "▁quick", "▁hello", "▁world", "he", "lo", "ll", "wo", "▁t", "▁h", "▁w", "ck"]
    pieces += [*words, *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("h", "e"), ("l", "o"), ("l", "l"), ("w", "o"), ("▁", "t"), ("▁", "h"), ("▁", "w"), ("c", "k")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    _add_specials(tokenizer, "<unk>", "<s>", "</s>")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@functools.cache
def word_pieces() -> Tokenizer:
    """A decoder that does not work token by token."""
    words = ["[UNK]", "[SEP]", "hello", "##s", "world", ".", ",", "quick", "##ly", "a"]
    tokenizer = Tokenizer(models.WordPiece(vocab={word: index for index, word in enumerate(words)}))
    _add_specials(tokenizer, "[UNK]", "[SEP]")
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@functools.cache
def metaspace() -> Tokenizer:
    words = ["<unk>", "▁", "▁hello", "▁world", "s", "▁▁", "a"]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@functools.cache
def chat_tokenizer() -> TextTokenizer:
    """What most gateway tests speak: byte-level, with a chat template."""
    template = ChatTemplate(CHAT, special_tokens={"bos_token": BOS, "eos_token": EOS}, wall_s=lambda: 0.0)
    return TextTokenizer(byte_level(), chat_template=template)


def _add_specials(tokenizer: Tokenizer, *names: str) -> None:
    add: Callable[[list[AddedToken]], int] = getattr(tokenizer, "add_special_tokens")  # noqa: B009 (partly typed)
    add([AddedToken(name, special=True, normalized=False) for name in names])


def write_folder(folder: Path, tokenizer: Tokenizer, config: dict[str, object]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
