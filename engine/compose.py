"""Composition of the next step's batch: which sequences run, and how many tokens of each.

Pure: no clock, no engine, no queue. Iteration-level batching (Orca, OSDI'22, section 4) with stall-free
chunked prefill (Sarathi-Serve, OSDI'24, algorithm 3): every running decode gets its token before any prompt
does, then prompts already begun go on, then new ones begin, each with as much as the token budget still
holds. The longest stall of a decode is therefore one step of `max_tokens`, whatever prompts arrive.

Past the number of tokens that saturates the device, prompts in one step only wait for each other: new ones share a
step up to that number, and a longer one has a step of its own (DistServe, OSDI'24, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence


class GrantReason(Enum):
    """Why a sequence is in the step; the values are metric labels."""

    #: A running sequence writes its next token.
    DECODE = "decode"
    #: A prompt (or a recomputation) of which a part is done already goes on.
    CONTINUE = "continue"
    #: A prompt begins.
    ADMIT = "admit"


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence that could run in the next step."""

    #: Unique among the candidates of a step.
    sequence_id: int
    #: Tokens that remain to be computed; > 0, and 1 for a decode.
    num_tokens: int
    #: Order of service within its class: the smaller goes first; ties go to the smaller sequence id.
    arrival: float
    #: Chunks only: whether an earlier step has computed a part.
    started: bool = False
    #: Tokens before these whose KV is there.
    num_computed: int = 0
    #: Decodes only: the time between its tokens that its client was promised; None: no promise.
    tpot_target_s: float | None = None


#: Looked up once: an enum's members are found by a search of its class.
_DECODE, _CONTINUE, _ADMIT = GrantReason.DECODE, GrantReason.CONTINUE, GrantReason.ADMIT

BY_ARRIVAL = attrgetter("arrival", "sequence_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBudget:
    """What one step may hold; all > 0."""

    max_tokens: int
    max_sequences: int
    #: Prompt tokens up to which new prompts share a step; None: no such limit.
    saturation_tokens: int | None = None


class Grant(msgspec.Struct, frozen=True, kw_only=True):
    sequence_id: int
    num_tokens: int
    reason: GrantReason


def compose(decodes: Sequence[Candidate], chunks: Sequence[Candidate], budget: StepBudget) -> tuple[Grant, ...]:
    """The next step, in order of service: decodes, begun chunks, new chunks, each by arrival.

    A decode runs whole or not at all; a chunk gets `min(remaining, budget left)`. A new prompt that would take the
    step past `saturation_tokens` begins only where no other prompt runs. Nobody is passed by a later arrival of its
    own class. Candidates without a grant simply wait for the next step.
    """
    saturation = budget.saturation_tokens
    begun = [chunk for chunk in chunks if chunk.started]
    new = [chunk for chunk in chunks if not chunk.started]
    grants: list[Grant] = []
    tokens_left = budget.max_tokens
    prompt_tokens = 0
    for reason, candidates in ((_DECODE, decodes), (_CONTINUE, begun), (_ADMIT, new)):
        for candidate in sorted(candidates, key=BY_ARRIVAL) if len(candidates) > 1 else candidates:
            num_tokens = candidate.num_tokens
            if saturation is not None and reason is _ADMIT and 0 < prompt_tokens > saturation - num_tokens:
                return tuple(grants)
            if num_tokens > tokens_left:
                # A decode is not cut, and nothing later passes it.
                num_tokens = 0 if reason is _DECODE else tokens_left
            if num_tokens == 0 or len(grants) == budget.max_sequences:
                return tuple(grants)
            grants.append(Grant(sequence_id=candidate.sequence_id, num_tokens=num_tokens, reason=reason))
            tokens_left -= num_tokens
            if reason is not _DECODE:
                prompt_tokens += num_tokens
    return tuple(grants)
