"""The oracle: greedy tokens and logits of the reference implementation, and the rule for ties."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.tiny_models import VOCAB_SIZE, load_reference, make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

PROMPT_LENGTHS = (1, 2, 17, 37, 128, 255, 400, 600)
NUM_NEW = 16
TIE_TOLERANCE = 1e-4


@dataclass(slots=True)
class TieCount:
    """Over a whole test session: how many tokens were compared, and how many were ties."""

    tokens: int = 0
    ties: int = 0


@dataclass(slots=True)
class Oracle:
    """One tiny model's prompts and the reference's answers to them."""

    model_dir: Path
    model: Any
    prompts: list[list[int]]
    outputs: list[list[int]]
    count: TieCount = field(default_factory=TieCount)

    def logits(self, token_ids: list[int]) -> Tensor:
        """fp32 `[tokens, vocabulary]`, of one full pass without a cache."""
        with torch.inference_mode():
            logits: Tensor = self.model(torch.tensor([token_ids])).logits[0]
        return logits

    def check(self, outputs: list[list[int]]) -> None:
        """Fails unless every output is the reference's, ties excepted."""
        for prompt, ours, expected in zip(self.prompts, outputs, self.outputs, strict=True):
            self.count.tokens += len(ours)
            if ours != expected:
                self._check_ties(prompt, ours)

    def _check_ties(self, prompt: list[int], ours: list[int]) -> None:
        """On our own tokens, each must be the reference's choice, or as good to within the tolerance."""
        logits = self.logits(prompt + ours)[len(prompt) - 1 : -1]
        for index, token in enumerate(ours):
            behind = float(logits[index].max() - logits[index, token])
            assert behind <= TIE_TOLERANCE, f"prompt of {len(prompt)}: output {index} is {behind} behind"
            self.count.ties += int(logits[index].argmax()) != token


def make_oracle(name: str, folder: Path) -> Oracle:
    model_dir = make_tiny_model(name, folder)
    model = load_reference(model_dir)
    generator = torch.Generator().manual_seed(11)
    prompts = [
        [int(token) for token in torch.randint(0, VOCAB_SIZE, (length,), generator=generator)]
        for length in PROMPT_LENGTHS
    ]
    return Oracle(model_dir, model, prompts, [_generate(model, prompt) for prompt in prompts])


def _generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_NEW, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def write_tokenizer(folder: Path) -> None:
    """A word per token id: tiny models have weights and no text."""
    vocabulary = {f"t{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"unk_token": "t0"}))
