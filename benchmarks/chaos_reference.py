"""What a question's answer must be, and whether an answer is it.

The reference implementation (Hugging Face transformers, fp32) decides. A greedy token must be its choice on the same
tokens; a sampled one must be where the number that (seed, output index) gives falls in its distribution. Two right
computations differ in the last bits, so a token may miss by `TIE_TOLERANCE` in logits, or in probability: then it is a
tie, and counted. The answer of the same cluster at peace is what others are compared with first, for it is cheap.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.chaos_client import TEMPERATURE, End
from engine.noise import uniform

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.chaos_client import Question, Try

TIE_TOLERANCE = 1e-4


class Reference:
    """The reference implementation of a checkpoint. Not for several threads at once."""

    def __init__(self, model_dir: Path) -> None:
        # Without its types, which say little.
        transformers: Any = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(1)
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)

    def tokenize(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        ids: list[int] = self._tokenizer(prompt)["input_ids"]
        return ids

    def misses(self, question: Question, token_ids: Sequence[int]) -> list[float]:
        """How far each token is from being right, given all before it: 0 for the reference's own choice."""
        prompt = self.tokenize(question.prompt)
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]
        chosen = torch.tensor(token_ids)[:, None]
        if question.seed is None:
            missed = logits.max(dim=1).values - logits.gather(1, chosen)[:, 0]
        else:
            weights = torch.softmax(logits.double() / TEMPERATURE, dim=1)
            above = weights.cumsum(dim=1).gather(1, chosen)[:, 0]
            below = above - weights.gather(1, chosen)[:, 0]
            drawn = torch.tensor([uniform(question.seed, index) for index in range(len(token_ids))])
            missed = torch.maximum(below - drawn, drawn - above).clamp(min=0)
        return [float(miss) for miss in missed]


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The one right answer."""

    token_ids: tuple[int, ...]
    text: str
    finish: str
    prompt_tokens: int


class Auditor:
    """Knows the right answers, finds fault with others. Every token of every answer passes through `faults`.

    May be called from several threads; they take turns.
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._turn = threading.RLock()
        self._expected: dict[str, Expected] = {}
        self.num_tokens = 0
        self.num_ties = 0

    def learn(self, question: Question, record: Try) -> list[str]:
        """Takes an undisturbed answer for the right one; says where the reference disagrees with it."""
        with self._turn:
            return self._learn(question, record)

    def faults(self, question: Question, record: Try) -> list[str]:
        """What is wrong with what a client was sent, whole or not. An error is no fault: it is counted elsewhere."""
        with self._turn:
            return self._faults(question, record)

    def _learn(self, question: Question, record: Try) -> list[str]:
        if record.end is not End.WHOLE:
            return [f"{question.name}: undisturbed, and yet {record.end.value}: {record.error or record.how}"]
        prompt = self._reference.tokenize(question.prompt)
        usage = record.usage or {}
        self._expected[question.name] = Expected(
            token_ids=tuple(record.token_ids),
            text=record.text,
            finish=record.finishes[0] if record.finishes else "",
            prompt_tokens=usage.get("prompt_tokens", -1),
        )
        found = [] if usage.get("prompt_tokens") == len(prompt) else [f"{question.name}: usage {usage}"]
        if question.ignore_eos and len(record.token_ids) != question.max_tokens:
            found.append(f"{question.name}: {len(record.token_ids)} tokens of {question.max_tokens}")
        return found + self._misses(question, record.token_ids) + self._faults(question, record)

    def _faults(self, question: Question, record: Try) -> list[str]:
        expected = self._expected.get(question.name)
        if expected is None:
            return [f"{question.name}: there is nothing to compare with"]
        self.num_tokens += len(record.token_ids)
        found = self._token_faults(question, expected, record)
        if record.num_late:
            found.append(f"{record.num_late} events after the end")
        if record.end is End.WHOLE:
            found += _ending_faults(expected, record)
        elif len(record.finishes) > (record.end is End.LEFT):
            found.append(f"finish reasons {record.finishes} without a whole answer")
        return [f"{question.name}: {fault}" for fault in found]

    def _token_faults(self, question: Question, expected: Expected, record: Try) -> list[str]:
        ours, right = tuple(record.token_ids), expected.token_ids
        whole = record.end is End.WHOLE
        if ours == (right if whole else right[: len(ours)]):
            is_prefix = record.text == expected.text if whole else expected.text.startswith(record.text)
            return [] if is_prefix else [f"the text differs: {record.text!r}, not {expected.text!r}"]
        at = next((n for n, (a, b) in enumerate(zip(ours, right, strict=False)) if a != b), min(len(ours), len(right)))
        if at == len(ours) or at == len(right):
            return [f"{len(ours)} tokens ({record.replays} replays), not {len(right)}"]
        if not self._misses(question, ours):
            return []
        context = f"{list(ours[max(0, at - 2) : at + 4])}, not {list(right[max(0, at - 2) : at + 4])}"
        return [f"differs at output {at} of {len(right)} ({record.replays} replays): {context}"]

    def _misses(self, question: Question, token_ids: Sequence[int]) -> list[str]:
        if not token_ids:
            return []
        misses = self._reference.misses(question, token_ids)
        self.num_ties += sum(0 < miss <= TIE_TOLERANCE for miss in misses)
        return [
            f"{question.name}: output {index} misses the reference's by {miss:.3g}"
            for index, miss in enumerate(misses)
            if miss > TIE_TOLERANCE
        ]


def _ending_faults(expected: Expected, record: Try) -> list[str]:
    found: list[str] = []
    if record.finishes != [expected.finish]:
        found.append(f"finish reasons {record.finishes}, not [{expected.finish!r}]")
    if record.num_done != 1:
        found.append(f"{record.num_done} ends")
    counted = (record.usage or {}).get("completion_tokens")
    if counted != len(expected.token_ids):
        found.append(f"usage counts {counted} tokens, {len(expected.token_ids)} are right")
    return found
