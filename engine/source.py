"""What a role gives to the step loop: candidates for the next step, and a place for its results.

The loop asks every source for its candidates, composes one batch (`engine.compose`), lets each source build
its part of the plan, awaits the engine, and hands the results back. Between `build` and `apply` or `fail` a
sequence's blocks are written by the engine: a source frees them only after.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from contracts.errors import TandemError
    from engine.compose import Candidate
    from engine.plan import Sampled, SequenceStep


class StepSource(Protocol):
    def candidates(self, now_s: float) -> tuple[SequenceOf[Candidate], SequenceOf[Candidate]]:
        """(decodes, chunks) that could run in the next step. May admit waiting work and preempt running work;
        called between steps only."""
        ...

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        """The granted part of the plan; the sequence is in a step from here on."""
        ...

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        """The step is done: `num_tokens` more have their KV, and a token was sampled where the plan asked."""
        ...

    def fail(self, sequence_id: int, error: TandemError) -> None:
        """The step failed and touches no block any more; the sequence ends."""
        ...
