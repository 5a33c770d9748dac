"""How long answers turn out, by the length of their prompts: what forecasts of decode load rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.messages import AnswerTally

if TYPE_CHECKING:
    from engine.sequence import Sequence


class AnswerTallies:
    """Counts answers that ended of themselves, since the worker's start."""

    def __init__(self) -> None:
        #: By `bit_length` of the number of prompt tokens: answers, and their output tokens.
        self._answers: list[int] = []
        self._output_tokens: list[int] = []

    def add(self, sequence: Sequence) -> None:
        """One more answer, which has just ended at a stop or at its length."""
        size = sequence.request.num_prompt_tokens.bit_length()
        missing = size + 1 - len(self._answers)
        if missing > 0:
            self._answers += [0] * missing
            self._output_tokens += [0] * missing
        self._answers[size] += 1
        self._output_tokens[size] += sequence.output_count

    def report(self, *others: AnswerTallies) -> tuple[AnswerTally, ...]:
        """As `contracts.messages.WorkerLoad.answers`; with what others counted."""
        parts = (self, *others)
        return tuple(
            AnswerTally(
                sum(part._answers[size] for part in parts if size < len(part._answers)),
                sum(part._output_tokens[size] for part in parts if size < len(part._output_tokens)),
            )
            for size in range(max(len(part._answers) for part in parts))
        )
