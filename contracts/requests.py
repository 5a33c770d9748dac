"""A generation request as workers see it, and what comes back: token deltas in frames.

Workers know token ids only. Text, chat templates, stop strings and usage live in the gateway.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from contracts.ids import Attempt, GatewayId, Incarnation, OwnerEpoch, RequestId, WorkerId

#: Why a request ended at the worker. The gateway adds "stop" for stop strings.
FinishReason = Literal["stop", "length", "cancelled", "error"]

#: Workers that are not set up otherwise take nobody in without leaving the KV blocks that everybody there fills within
#: so many tokens: an answer of at most this length is not preempted.
GROWTH_TOKENS = 64

#: Priorities above this, or below its negative, count like these.
MOST_PRIORITY = 6


def counted_priority(priority: int) -> int:
    """What a priority comes to where prompts are ordered: bounded, so that whoever asks for most cannot keep others
    waiting for ever."""
    return max(-MOST_PRIORITY, min(priority, MOST_PRIORITY))


#: Whether KV is what the model computed, to the bit, or may have gone through a lossy codec. Never mixed.
KvClass = Literal["exact", "lossy"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the next token is chosen. Already validated by the gateway; workers trust the ranges.

    Noise is counter-based: a function of (seed, token index) alone, so that a sampled answer survives
    handoff, migration, preemption and replay unchanged.
    """

    #: 0 is greedy: the smallest token id among those with the largest logit.
    temperature: float = 1.0
    #: 0 keeps all.
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    #: Tokens to write at most; > 0.
    max_tokens: int
    #: End-of-sequence and stop tokens are masked out before this many tokens are written.
    min_tokens: int = 0
    #: Ends the answer when written; the token itself is part of the delta (the gateway drops it from text).
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    #: None: no logprobs. n: the chosen token's, and those of the n likeliest tokens.
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    #: (token id, bias) pairs added to the logits.
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence to continue."""

    request_id: RequestId
    attempt: Attempt = Attempt(1)
    owner_epoch: OwnerEpoch = OwnerEpoch(1)
    #: Where frames with its tokens go.
    gateway_id: GatewayId
    #: Prompt, and on a replay also the tokens already streamed; not empty.
    token_ids: tuple[int, ...]
    #: How many of `token_ids` the client wrote. Output index 0 is the token after these.
    num_prompt_tokens: int
    sampling: SamplingParams
    #: Seconds from receipt after which a worker gives the request up.
    deadline_s: float
    #: Seconds from receipt within which the first token is due; None: no hurry. Negative where it is late already.
    ttft_due_s: float | None = None
    #: Time per output token that its client was promised; None: no promise.
    tpot_target_s: float | None = None
    #: Larger goes first; see `counted_priority`.
    priority: int = 0
    tenant: str = ""
    #: Prompts share blocks only where it is equal.
    cache_salt: str = ""
    #: "lossy": it may go on from KV that went through a lossy codec, and shares blocks with its like alone.
    kv_class: KvClass = "exact"


class TopLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    logprob: float
    top: tuple[TopLogprob, ...] = ()


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A `TandemError` as data. `code` is a key of `contracts.errors.ERROR_BY_CODE`."""

    code: str
    message: str


class PhaseTimes(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Durations a worker measured on its own monotonic clock; absent phases are None."""

    #: Receipt at the prefill worker to the start of the first step that computed the prompt.
    queue_s: float | None = None
    #: Of that: fetching a prefix from another worker.
    fetch_s: float | None = None
    #: Prompt tokens that were not computed, for their KV stood in the prefix cache or was fetched.
    cached_tokens: int | None = None
    #: Of these, by where they stood when they were looked for (`contracts.store_messages.Tier`), "peer" for the pool of
    #: another worker; empty where none were cached.
    cached_by_tier: dict[str, int] = {}
    #: That start to the first token sampled.
    prefill_s: float | None = None
    #: Offer received by the decode worker to its blocks adopted.
    handoff_s: float | None = None
    #: Adopted to this delta's token sampled.
    decode_s: float | None = None


class TokenDelta(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New tokens of one request, from one engine step.

    `index` is the output index of the first one: the gateway orders and de-duplicates by it. The last delta
    of a request carries `finish`; with "error" also `error`. A final delta may carry no tokens.
    """

    request_id: RequestId
    attempt: Attempt = Attempt(1)
    owner_epoch: OwnerEpoch = OwnerEpoch(1)
    index: int
    token_ids: tuple[int, ...] = ()
    #: Parallel to `token_ids`, when asked for.
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish: FinishReason | None = None
    error: ErrorInfo | None = None
    phases: PhaseTimes | None = None


class Claim(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker is ready to go on with a request that another one had: it asks the gateway to be its owner.

    Granted to the first that claims this epoch, if it is the next one and the attempt the present one; repeated until
    answered (`contracts.messages.GRANT`). Until then the claimer writes nothing.
    """

    request_id: RequestId
    attempt: Attempt
    #: The claimed one: one more than that of the present owner.
    owner_epoch: OwnerEpoch
    #: Output tokens that the claimer knows of: it goes on with the next.
    num_outputs: int
    #: It takes the request's prompt, which nobody has begun to read; else its answer.
    reads: bool = False


class Frame(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything one engine step wrote for one gateway. An empty frame is a sign of life."""

    worker_id: WorkerId
    incarnation: Incarnation
    #: 0, 1, 2, … within one stream: a gap is a bug.
    sequence_number: int
    deltas: tuple[TokenDelta, ...] = ()
    #: Made after these.
    claims: tuple[Claim, ...] = ()
