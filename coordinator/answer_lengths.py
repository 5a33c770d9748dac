"""How long answers get: means of those that ended, by length of their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.messages import AnswerTally

#: What is expected of answers before any has ended, and how many ended ones outweigh it.
_FIRST_GUESS_TOKENS = 256.0
_GUESS_ANSWERS = 4.0
#: How many answers to prompts of one length outweigh the mean over all lengths.
_OVERALL_ANSWERS = 8.0
#: At so many answers to prompts of one length the older half of their weight goes: traffic changes.
_REMEMBERED_ANSWERS = 4096.0
#: Prompts of up to 2 ** 63 tokens.
_NUM_BUCKETS = 64


class AnswerLengths:
    """Buckets are by `prompt_tokens.bit_length()`, as in `WorkerLoad.answers`."""

    def __init__(self) -> None:
        self._answers = [0.0] * _NUM_BUCKETS
        self._tokens = [0.0] * _NUM_BUCKETS
        #: Over prompts of all lengths.
        self.mean_tokens = _FIRST_GUESS_TOKENS
        #: Answers since the start, and their tokens; without what workers told first, which may be from long ago.
        self.num_answers = 0
        self.num_tokens = 0

    def ended(self, now: Sequence[AnswerTally], before: Sequence[AnswerTally]) -> None:
        """A worker's tallies since its start, and those that it told last. Tallies that shrank or make no sense (a
        token at least is in each answer) tell nothing."""
        for bucket, tally in enumerate(now[:_NUM_BUCKETS]):
            answers, tokens = tally.answers, tally.output_tokens
            if bucket < len(before):
                if tally is before[bucket]:
                    continue
                answers -= before[bucket].answers
                tokens -= before[bucket].output_tokens
            if answers <= 0 or tokens < answers:
                continue
            if self._answers[bucket] > _REMEMBERED_ANSWERS:
                self._answers[bucket] *= 0.5
                self._tokens[bucket] *= 0.5
            self._answers[bucket] += answers
            self._tokens[bucket] += tokens
            if before:
                self.num_answers += answers
                self.num_tokens += tokens
        weight = sum(self._answers) + _GUESS_ANSWERS
        self.mean_tokens = (sum(self._tokens) + _GUESS_ANSWERS * _FIRST_GUESS_TOKENS) / weight

    def expected(self, prompt_tokens: int, max_tokens: int) -> float:
        """Of an answer to such a prompt; at least 1 token, at most `max_tokens`."""
        bucket = min(prompt_tokens.bit_length(), _NUM_BUCKETS - 1)
        weighted = self._tokens[bucket] + _OVERALL_ANSWERS * self.mean_tokens
        return max(1.0, min(float(max_tokens), weighted / (self._answers[bucket] + _OVERALL_ANSWERS)))
