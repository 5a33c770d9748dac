"""The canary of a model, computed from its original: not from the form in which workers get the weights, and not by the
operators that they use."""

from __future__ import annotations

import hashlib
from math import isfinite
from typing import TYPE_CHECKING

import numpy as np

from coldstart.reference import reference_logits
from engine.canary import NUM_TOKENS, Canary
from engine.model_config import load_model_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.reference import Floats

#: Computed side by side. The one whose answer is the clearest becomes the canary: of each all beginnings are tried that
#: are half as long or longer.
_NUM_PROMPTS = 2
_NUM_LAST = NUM_TOKENS // 2


def canary_of(model_dir: Path, *, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Canary | None:
    """Of a folder in Hugging Face layout, whose weights are read once, a few rows at a time; None where it computes no
    numbers. `progress(bytes read, bytes in all)`. Blocks. Raises ConfigError, LoadError, CorruptCheckpoint."""
    vocab_size = load_model_config(model_dir).vocab_size
    prompts = [_prompt(number, vocab_size) for number in range(_NUM_PROMPTS)]
    logits_BTV = reference_logits(model_dir, prompts, num_last=_NUM_LAST, progress=progress)
    found = [
        _canary(prompt[: NUM_TOKENS - _NUM_LAST + 1 + position], logits_BTV[number, position])
        for number, prompt in enumerate(prompts)
        for position in range(_NUM_LAST)
    ]
    return max((each for each in found if isfinite(each.margin)), key=lambda each: each.margin, default=None)


def _canary(prompt: tuple[int, ...], logits_V: Floats) -> Canary:
    token = int(logits_V.argmax())
    others = np.delete(logits_V, token)
    margin = float(logits_V[token] - others.max()) if np.isfinite(logits_V).all() and len(others) else float("nan")
    return Canary(prompt=prompt, token=token, margin=round(margin, 4))


def _prompt(number: int, vocab_size: int) -> tuple[int, ...]:
    """Some tokens, the same ones everywhere."""
    digest = hashlib.sha256(f"canary {number}".encode()).digest()
    return tuple(int.from_bytes(digest[4 * i : 4 * i + 4], "little") % vocab_size for i in range(NUM_TOKENS))
