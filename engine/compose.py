"""Composition of the next step's batch: which sequences run, and how many tokens of each.

Pure: no clock, no engine, no queue. Iteration-level batching (Orca, OSDI'22, section 4) with stall-free
chunked prefill (Sarathi-Serve, OSDI'24, algorithm 3): every running decode gets its token before any prompt
does, then prompts already begun go on, then new ones begin, each with as much as the token budget still
holds. The longest stall of a decode is therefore one step of `max_tokens`, whatever prompts arrive.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


class GrantReason(Enum):
    """Why a sequence is in the step; the values are metric labels."""

    #: A running sequence writes its next token.
    DECODE = "decode"
    #: A prompt (or a recomputation) of which a part is done already goes on.
    CONTINUE = "continue"
    #: A prompt begins.
    ADMIT = "admit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A sequence that could run in the next step."""

    #: Unique among the candidates of a step.
    sequence_id: int
    #: Tokens that remain to be computed; > 0, and 1 for a decode.
    num_tokens: int
    #: Order of service within its class: the smaller goes first; ties go to the smaller sequence id.
    arrival: float
    #: Chunks only: whether an earlier step has computed a part.
    started: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBudget:
    """What one step may hold; both > 0."""

    max_tokens: int
    max_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    sequence_id: int
    num_tokens: int
    reason: GrantReason


def compose(decodes: Sequence[Candidate], chunks: Sequence[Candidate], budget: StepBudget) -> tuple[Grant, ...]:
    """The next step, in order of service: decodes, begun chunks, new chunks, each by arrival.

    A decode runs whole or not at all; a chunk gets `min(remaining, budget left)`. Nobody is passed by a
    later arrival of its own class. Candidates without a grant simply wait for the next step.
    """
    ordered = (
        *_by_arrival(decodes, GrantReason.DECODE),
        *_by_arrival((chunk for chunk in chunks if chunk.started), GrantReason.CONTINUE),
        *_by_arrival((chunk for chunk in chunks if not chunk.started), GrantReason.ADMIT),
    )
    grants: list[Grant] = []
    tokens_left = budget.max_tokens
    for candidate, reason in ordered[: budget.max_sequences]:
        num_tokens = min(candidate.num_tokens, tokens_left)
        if num_tokens == 0 or (reason is GrantReason.DECODE and num_tokens < candidate.num_tokens):
            break
        grants.append(Grant(sequence_id=candidate.sequence_id, num_tokens=num_tokens, reason=reason))
        tokens_left -= num_tokens
    return tuple(grants)


def _by_arrival(candidates: Iterable[Candidate], reason: GrantReason) -> list[tuple[Candidate, GrantReason]]:
    ordered = sorted(candidates, key=lambda candidate: (candidate.arrival, candidate.sequence_id))
    return [(candidate, reason) for candidate in ordered]
