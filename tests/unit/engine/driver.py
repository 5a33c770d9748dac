"""A small worker loop around a runner: random blocks, chunks by budget, preemption; greedy only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.ids import BlockId
from contracts.requests import SamplingParams
from engine.compose import Candidate, Grant, GrantReason, StepBudget, compose
from engine.plan import SampleSpec, SequenceStep, StepPlan

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from engine.runner import Runner

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


@dataclass(slots=True)
class DrivenSequence:
    sequence_id: int
    token_ids: list[int]
    num_prompt_tokens: int
    block_ids: list[BlockId] = field(default_factory=list[BlockId])
    num_computed: int = 0

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


@dataclass(slots=True)
class Driver:
    """Runs prompts to `num_new` tokens each. `preempt_share`: chance per step to preempt one sequence."""

    runner: Runner
    budget: StepBudget
    num_new: int
    rng: random.Random
    preempt_share: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    sequences: list[DrivenSequence] = field(default_factory=list[DrivenSequence])
    free_blocks: list[BlockId] = field(default_factory=list[BlockId])

    def run(self, prompts: list[list[int]], arrive: Callable[[int], int] = lambda _: 0) -> list[list[int]]:
        """The outputs, in the order of `prompts`; prompt i may start at step `arrive(i)`."""
        self.free_blocks = [BlockId(block) for block in range(self.runner.pool.num_blocks)]
        self.rng.shuffle(self.free_blocks)
        self.sequences = [DrivenSequence(i, list(prompt), len(prompt)) for i, prompt in enumerate(prompts)]
        while unfinished := [each for each in self.sequences if len(each.output) < self.num_new]:
            arrived = [each for each in unfinished if arrive(each.sequence_id) <= self.num_steps]
            self.step(arrived)
            if self.rng.random() < self.preempt_share:
                self.preempt(self.rng.choice(self.sequences))
        return [sequence.output for sequence in self.sequences]

    def step(self, arrived: list[DrivenSequence]) -> None:
        decodes = [each for each in arrived if each.num_computed == len(each.token_ids) - 1 and each.output]
        chunks = [each for each in arrived if each not in decodes]
        grants = compose(_candidates(decodes), _candidates(chunks), self.budget)
        result = self.runner.run(StepPlan(tuple(self.planned(grant) for grant in grants)))
        for grant in grants:
            sequence = self.sequences[grant.sequence_id]
            sequence.num_computed += grant.num_tokens
            if grant.sequence_id in result.sampled:
                sequence.token_ids.append(result.sampled[grant.sequence_id].token_id)
            if len(sequence.output) == self.num_new:
                self.release(sequence)
        self.num_steps += 1

    def planned(self, grant: Grant) -> SequenceStep:
        sequence = self.sequences[grant.sequence_id]
        stop = sequence.num_computed + grant.num_tokens
        while len(sequence.block_ids) * self.runner.pool.layout.block_tokens < stop:
            sequence.block_ids.append(self.free_blocks.pop())
        complete = stop == len(sequence.token_ids)
        assert complete or grant.reason is not GrantReason.DECODE
        return SequenceStep(
            sequence_id=sequence.sequence_id,
            token_ids=sequence.token_ids[sequence.num_computed : stop],
            start=sequence.num_computed,
            block_ids=sequence.block_ids,
            sample=greedy_sample(sequence.token_ids, sequence.num_prompt_tokens) if complete else None,
        )

    def preempt(self, sequence: DrivenSequence) -> None:
        """Takes its blocks away; its KV, output included, is computed again."""
        self.num_preemptions += bool(sequence.block_ids)
        self.release(sequence)
        sequence.num_computed = 0

    def release(self, sequence: DrivenSequence) -> None:
        self.free_blocks.extend(sequence.block_ids)
        sequence.block_ids.clear()
        self.rng.shuffle(self.free_blocks)


def greedy_sample(token_ids: list[int], num_prompt_tokens: int) -> SampleSpec:
    return SampleSpec(
        params=GREEDY,
        output_index=len(token_ids) - num_prompt_tokens,
        history=token_ids,
        num_prompt_tokens=num_prompt_tokens,
    )


def _candidates(sequences: list[DrivenSequence]) -> list[Candidate]:
    return [
        Candidate(
            sequence_id=each.sequence_id,
            num_tokens=len(each.token_ids) - each.num_computed,
            arrival=each.sequence_id,
            started=each.num_computed > 0,
        )
        for each in sequences
    ]
