"""One sequence as both roles keep it: its tokens, its blocks, and how far its KV is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from contracts.messages import RequestKey
from contracts.requests import ErrorInfo, TokenDelta
from engine.plan import SampleSpec, SequenceStep

if TYPE_CHECKING:
    from contracts.ids import BlockId
    from contracts.requests import FinishReason, GenerateRequest, PhaseTimes, SamplingParams
    from engine.plan import Sampled


class Emit(Protocol):
    """Where deltas go: towards the gateway that owns the request's stream. Never waits."""

    def __call__(self, request: GenerateRequest, delta: TokenDelta) -> None: ...


def request_key(request: GenerateRequest) -> RequestKey:
    return RequestKey(request.request_id, request.attempt, request.owner_epoch)


def owner_name(key: RequestKey) -> str:
    """The name under which an ownership of a request holds blocks in the ledger."""
    return f"{key.request_id}#{key.attempt}.{key.owner_epoch}"


@dataclass(slots=True, kw_only=True)
class Sequence:
    """Mutable; belongs to one role's queue at a time."""

    #: Unique in this worker's life.
    sequence_id: int
    request: GenerateRequest
    #: On this worker's clock; past it the request is given up.
    deadline_s: float
    #: Prompt and output. All but the last `len - num_computed` have their KV in `block_ids`.
    token_ids: list[int]
    #: Blocks in order of position; they cover at least `num_computed` tokens.
    block_ids: list[BlockId] = field(default_factory=list["BlockId"])
    num_computed: int = 0

    @property
    def key(self) -> RequestKey:
        return request_key(self.request)

    @property
    def owner(self) -> str:
        return owner_name(self.key)

    @property
    def num_remaining(self) -> int:
        """Tokens whose KV must be computed before the next one can be sampled; 1 for a running decode."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_count(self) -> int:
        return len(self.token_ids) - self.request.num_prompt_tokens

    def step(self, num_tokens: int) -> SequenceStep:
        """Work for the next `num_tokens` tokens; samples when they are all that remain."""
        start, stop = self.num_computed, self.num_computed + num_tokens
        assert 0 < num_tokens <= self.num_remaining, (num_tokens, self.num_remaining)
        sample = None
        if stop == len(self.token_ids):
            sample = SampleSpec(
                params=self.request.sampling,
                output_index=self.output_count,
                history=self.token_ids,
                num_prompt_tokens=self.request.num_prompt_tokens,
            )
        return SequenceStep(
            sequence_id=self.sequence_id,
            token_ids=self.token_ids[start:stop],
            start=start,
            block_ids=self.block_ids,
            sample=sample,
        )

    def append(self, sampled: Sampled, finish: FinishReason | None, phases: PhaseTimes | None) -> TokenDelta:
        """Takes the sampled token as the next of the sequence; returns the delta that tells the client."""
        delta = TokenDelta(
            request_id=self.request.request_id,
            attempt=self.request.attempt,
            owner_epoch=self.request.owner_epoch,
            index=self.output_count,
            token_ids=(sampled.token_id,),
            logprobs=(sampled.logprobs,) if sampled.logprobs is not None else None,
            finish=finish,
            phases=phases,
        )
        self.token_ids.append(sampled.token_id)
        return delta


def finish_after(
    token_id: int,
    *,
    output_count: int,
    sequence_tokens: int,
    sampling: SamplingParams,
    eos_token_ids: tuple[int, ...],
    max_context_tokens: int,
) -> FinishReason | None:
    """Whether a sequence ends with `token_id`, its output token number `output_count` (counted from 1).

    "stop" wins over "length" when both hold. `min_tokens` needs no test here: the sampler masks end and
    stop tokens until then. `sequence_tokens` counts prompt and output, this token included.
    """
    if token_id in sampling.stop_token_ids:
        return "stop"
    if not sampling.ignore_eos and token_id in eos_token_ids:
        return "stop"
    if output_count >= sampling.max_tokens or sequence_tokens >= max_context_tokens:
        return "length"
    return None


def failure(request: GenerateRequest, index: int, code: str, message: str) -> TokenDelta:
    """The last delta of a request that cannot go on here."""
    return TokenDelta(
        request_id=request.request_id,
        attempt=request.attempt,
        owner_epoch=request.owner_epoch,
        index=index,
        finish="error",
        error=ErrorInfo(code=code, message=message),
    )
