"""An engine without a model: steps take the time a formula says, tokens are a hash of the context.

The hash is taken from what the KV pool holds, not from what the plan says, and what a token leaves in the
pool depends on everything before it, as KV does. A lost, repeated, stale, misplaced or unfinished token or
block therefore changes every later token of the answer, and a test that compares an answer with
`expected_tokens` sees it.
"""

from __future__ import annotations

import asyncio
import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from contracts.errors import InvariantBroken
from contracts.layout import PROTOCOL_VERSION, BlockLayout, KvIdentity
from contracts.requests import SamplingParams, TokenLogprobs, TopLogprob
from engine.plan import Sampled, SequenceStep, StepPlan, StepResult, work_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from contracts.ids import BlockId
    from contracts.latency import LatencyModel
    from engine.plan import SampleSpec


class TokenKv(msgspec.Struct, frozen=True):
    """What stands for one token's keys and values."""

    position: int
    token_id: int
    #: Hash of the context before it, as the step that wrote it read it.
    prefix_hash: int


#: None: never written, or being written.
Slot = TokenKv | None
#: A block's slots, `layout.block_tokens` of them.
BlockContent = tuple[Slot, ...]

#: All hashes are taken modulo this prime (2^61 - 1).
_PRIME = (1 << 61) - 1
#: Weight of a context's slot i is this to the power i, so that a slot counts by where it is found.
_BASE = 0x1A2B3C4D5E6F7081 % _PRIME
_ODD = 0x9E37_79B9_7F4A_7C15
_EMPTY_SLOT = 0x0BAD_5107
#: An unwritten slot and its hash.
_UNWRITTEN = (None, _EMPTY_SLOT)

DEFAULT_VOCAB_SIZE = 32_000


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """`T = max(floor, A * new_tokens) + B * sum of context lengths + C * sequences`, in seconds.

    The defaults are of the order of a small model on two CPU cores.
    """

    floor_s: float = 0.008
    per_new_token_s: float = 0.0004
    per_context_token_s: float = 0.000_000_5
    per_sequence_s: float = 0.0002

    def __post_init__(self) -> None:
        for name in ("floor_s", "per_new_token_s", "per_context_token_s", "per_sequence_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative: {getattr(self, name)}")

    def duration_s(self, plan: StepPlan) -> float:
        num_tokens = context_tokens = 0
        for step in plan.sequences:
            num_tokens += len(step.token_ids)
            context_tokens += step.start
        context_tokens += num_tokens
        return (
            max(self.floor_s, self.per_new_token_s * num_tokens)
            + self.per_context_token_s * context_tokens
            + self.per_sequence_s * len(plan.sequences)
        )


class StepCosts(Protocol):
    """What a modelled engine's steps take."""

    def duration_s(self, plan: StepPlan) -> float: ...


class ModelTiming:
    """The costs of a latency model: a fitted profile, a roofline."""

    def __init__(self, model: LatencyModel, *, around_step_s: float = 0.0) -> None:
        """`around_step_s`: what a worker spends on each step beside its engine."""
        self._model = model
        self._around_step_s = around_step_s

    def duration_s(self, plan: StepPlan) -> float:
        return self._around_step_s + self._model.step_s(work_of(plan))


def modelled_identity(*, block_tokens: int = 16) -> KvIdentity:
    """An identity for modelled engines that may exchange blocks."""
    return KvIdentity(
        model_fingerprint="modelled",
        layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=block_tokens, dtype="float32"),
        rope_base=10_000.0,
        protocol_version=PROTOCOL_VERSION,
    )


class ModelledEngine:
    """`engine.plan.Engine` for simulations. Steps take time on the running loop; nothing in it is random."""

    def __init__(
        self,
        *,
        identity: KvIdentity,
        num_blocks: int,
        max_context_tokens: int,
        timing: StepCosts | None = None,
        vocab_size: int = DEFAULT_VOCAB_SIZE,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._identity = identity
        self._num_blocks = num_blocks
        self._block_ids = frozenset(range(num_blocks))
        self._max_context_tokens = max_context_tokens
        self._timing = timing or StepTiming()
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._pool = _Pool(num_blocks, identity.layout.block_tokens)
        self._closed = False
        #: Set for good by `get_stuck`.
        self._stuck = False
        #: Set exactly while no step touches the pool. A step goes on when its caller is cancelled.
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def identity(self) -> KvIdentity:
        return self._identity

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def max_context_tokens(self) -> int:
        return self._max_context_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def description(self) -> str:
        return f"modelled, {self._num_blocks} blocks of {self._identity.layout.block_tokens} tokens"

    async def step(self, plan: StepPlan) -> StepResult:
        """Raises InvariantBroken for a plan that no caller may make: overlapping steps, blocks that are too
        few, unknown or written by two sequences, positions past the context."""
        if self._closed or not self._idle.is_set():
            raise InvariantBroken(f"a step was asked for while {'closed' if self._closed else 'another runs'}")
        self._check(plan)
        for step in plan.sequences:
            # What is being written reads as unwritten until the step ends.
            self._pool.write(step.block_ids, step.start, [_UNWRITTEN] * len(step.token_ids))
        begun = _Begun(plan, self._timing.duration_s(plan), self._prefix_hashes(plan), self._pool.num_writes)
        self._idle.clear()
        loop = asyncio.get_running_loop()
        result: asyncio.Future[StepResult] = loop.create_future()
        loop.call_at(loop.time() + begun.duration_s, self._end, begun, result)
        return await result

    async def quiesce(self) -> None:
        await self._idle.wait()

    async def close(self) -> None:
        self._closed = True
        await self.quiesce()

    def get_stuck(self) -> None:
        """From now on no step ends, as when a kernel hangs: `quiesce` and `close` do not return either."""
        self._stuck = True

    def read_block(self, block_id: BlockId) -> BlockContent:
        """The block as it is now, for a simulated transport. Slots that a step is writing are None."""
        return self._pool.read(block_id)

    def write_block(self, block_id: BlockId, content: BlockContent) -> None:
        """Overwrites the block, as a transport's last byte does."""
        self._pool.write_block(block_id, content)

    def _end(self, begun: _Begun, result: asyncio.Future[StepResult]) -> None:
        if self._stuck:
            return
        self._idle.set()
        try:
            sampled = self._compute(begun)
        except InvariantBroken as error:
            if not result.done():
                result.set_exception(error)
            return
        if not result.done():
            result.set_result(StepResult(sampled=sampled, duration_s=begun.duration_s))

    def _compute(self, begun: _Begun) -> dict[int, Sampled]:
        at_start = at_end = begun.prefix_hashes
        if self._pool.num_writes != begun.num_writes:
            at_end = self._prefix_hashes(begun.plan)
        sampled: dict[int, Sampled] = {}
        for step, before, after in zip(begun.plan.sequences, at_start, at_end, strict=True):
            # A context that changed while the step read it is neither the one nor the other.
            context_hash = self._append(step, before if before == after else _mix(before + after))
            if step.sample is not None:
                sampled[step.sequence_id] = self._choose(context_hash, step.sample)
        return sampled

    def _prefix_hashes(self, plan: StepPlan) -> list[int]:
        """By sequence of the plan: the hash of the context before its new tokens."""
        return [self._pool.context_hash(step.block_ids, step.start) for step in plan.sequences]

    def _append(self, step: SequenceStep, prefix_hash: int) -> int:
        """Writes a sequence's new tokens; the hash of its context with them."""
        context = _Context(step.start, prefix_hash, self._pool.weight(step.start))
        self._pool.write(step.block_ids, step.start, [context.append(token_id) for token_id in step.token_ids])
        return context.hash

    def _choose(self, context_hash: int, spec: SampleSpec) -> Sampled:
        return choose(
            context_hash,
            spec.params,
            spec.output_index,
            vocab_size=self._vocab_size,
            eos_token_ids=self._eos_token_ids,
        )

    def _check(self, plan: StepPlan) -> None:
        block_tokens = self._identity.layout.block_tokens
        writer_of: dict[BlockId, int] = {}
        seen: set[int] = set()
        for step in plan.sequences:
            sequence_id = step.sequence_id
            if sequence_id in seen:
                raise InvariantBroken(f"sequence {sequence_id} is twice in the plan")
            seen.add(sequence_id)
            stop = step.start + len(step.token_ids)
            if (complaint := self._complaint(step)) is not None:
                raise InvariantBroken(f"sequence {sequence_id}, positions [{step.start}, {stop}): {complaint}")
            for block_id in step.block_ids[step.start // block_tokens : (stop - 1) // block_tokens + 1]:
                writer = writer_of.setdefault(block_id, sequence_id)
                if writer != sequence_id:
                    raise InvariantBroken(f"sequences {writer} and {sequence_id} both write block {block_id}")

    def _complaint(self, step: SequenceStep) -> str | None:
        token_ids = step.token_ids
        stop = step.start + len(token_ids)
        if not token_ids or step.start < 0:
            return "nothing to compute"
        if stop > self._max_context_tokens:
            return f"the context ends at {self._max_context_tokens}"
        if len(step.block_ids) < self._identity.layout.blocks_for(stop):
            return f"only {len(step.block_ids)} blocks"
        block_ids = set(step.block_ids)
        if len(block_ids) < len(step.block_ids):
            return f"a block is twice in {list(step.block_ids)}"
        if not block_ids <= self._block_ids:
            return f"no block {min(block_ids - self._block_ids)}, there are {self._num_blocks}"
        lowest, highest = (min(token_ids), max(token_ids)) if len(token_ids) > 1 else (token_ids[0], token_ids[0])
        if lowest < 0 or highest >= self._vocab_size:
            return f"no token {lowest if lowest < 0 else highest}, the vocabulary has {self._vocab_size}"
        return None


class _Begun(NamedTuple):
    """A step that runs."""

    plan: StepPlan
    duration_s: float
    #: By sequence: the hash of the context before its new tokens, as the step found it.
    prefix_hashes: list[int]
    #: `_Pool.num_writes` since then.
    num_writes: int


class _Pool:
    """Slots of all blocks, with their hashes, so that a decode step hashes one slot and sums up blocks."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._slots: list[list[Slot]] = [[None] * block_tokens for _ in range(num_blocks)]
        #: By block and slot: `_slot_hash` of it.
        self._slot_hashes = [[_EMPTY_SLOT] * block_tokens for _ in range(num_blocks)]
        self._slot_weights = _powers(_BASE, block_tokens)
        #: By block: weighted sum of its slots' hashes.
        self._block_hashes = [sum(self._slot_weights) * _EMPTY_SLOT % _PRIME] * num_blocks
        self._block_weights = _powers(pow(_BASE, block_tokens, _PRIME), num_blocks)
        #: Grows with every slot that is written.
        self.num_writes = 0

    def read(self, block_id: BlockId) -> BlockContent:
        return tuple(self._slots[block_id])

    def write(self, block_ids: Sequence[BlockId], start: int, slots: Sequence[tuple[Slot, int]]) -> None:
        """Writes slots, each with its `_slot_hash`, from position `start` of a sequence whose blocks are these."""
        block_tokens, weights, block_hashes = self._block_tokens, self._slot_weights, self._block_hashes
        for position, (slot, slot_hash) in enumerate(slots, start):
            block_id, offset = block_ids[position // block_tokens], position % block_tokens
            hashes = self._slot_hashes[block_id]
            change = weights[offset] * (slot_hash - hashes[offset])
            block_hashes[block_id] = (block_hashes[block_id] + change) % _PRIME
            hashes[offset] = slot_hash
            self._slots[block_id][offset] = slot
        self.num_writes += len(slots)

    def write_block(self, block_id: BlockId, content: BlockContent) -> None:
        if len(content) != self._block_tokens:
            raise InvariantBroken(f"block {block_id} has {self._block_tokens} slots, not {len(content)}")
        hashes = [_EMPTY_SLOT if slot is None else _slot_hash(slot) for slot in content]
        self._slots[block_id] = list(content)
        self._slot_hashes[block_id] = hashes
        self._block_hashes[block_id] = _dot(self._slot_weights, hashes) % _PRIME
        self.num_writes += len(content)

    def weight(self, position: int) -> int:
        """`_BASE**position`."""
        place, offset = divmod(position, self._block_tokens)
        return self._block_weights[place] * self._slot_weights[offset] % _PRIME

    def context_hash(self, block_ids: Sequence[BlockId], num_tokens: int) -> int:
        """Sum over i of `_BASE**i` times the hash of slot i, over the first `num_tokens` slots of the blocks.

        The same for every block size: a block's own sum, times the weight of its place, is its part.
        """
        num_full, num_rest = divmod(num_tokens, self._block_tokens)
        total = _dot(self._block_weights, map(self._block_hashes.__getitem__, block_ids[:num_full]))
        if num_rest:
            rest = _dot(self._slot_weights, self._slot_hashes[block_ids[num_full]][:num_rest])
            total += self._block_weights[num_full] * rest
        return total % _PRIME


def _dot(weights: Iterable[int], hashes: Iterable[int]) -> int:
    """Their products' sum, as far as the shorter goes."""
    return sum(map(operator.mul, weights, hashes))


def _powers(base: int, count: int) -> list[int]:
    """`base**0 ... base**(count - 1)`."""
    return list(itertools.accumulate(range(count - 1), lambda power, _: power * base % _PRIME, initial=1))


def _slot_hash(kv: TokenKv) -> int:
    return _mix((kv.position + 1) * _ODD + kv.token_id + 1 + kv.prefix_hash)


class _Context:
    """A context that grows by tokens, without a pool."""

    def __init__(self, num_tokens: int, context_hash: int, weight: int) -> None:
        """`weight` is `_BASE**num_tokens`."""
        self.num_tokens = num_tokens
        #: What `_Pool.context_hash` says of a pool that holds all its tokens.
        self.hash = context_hash
        self._weight = weight

    def append(self, token_id: int) -> tuple[TokenKv, int]:
        """What the token leaves in a pool, and `_slot_hash` of it."""
        position = self.num_tokens
        kv = TokenKv(position, token_id, self.hash)
        # As `_slot_hash` says: written out, because it is most of what a modelled engine does.
        value = (position + 1) * _ODD + token_id + 1 + self.hash
        value = (value ^ (value >> 31)) * 0x7FB5_D329_728E_A185 % _PRIME
        value = (value ^ (value >> 27)) * 0x01DA_DEF4_BC2D_D44D % _PRIME
        slot_hash = value ^ (value >> 33)
        self.hash = (self.hash + self._weight * slot_hash) % _PRIME
        self._weight = self._weight * _BASE % _PRIME
        self.num_tokens += 1
        return kv, slot_hash

    def extend(self, token_ids: Sequence[int]) -> None:
        """As `append` of each, with no interest in what they leave."""
        context_hash, weight = self.hash, self._weight
        for value in map(operator.add, token_ids, itertools.count((self.num_tokens + 1) * _ODD + 1, _ODD)):
            value += context_hash
            value = (value ^ (value >> 31)) * 0x7FB5_D329_728E_A185 % _PRIME
            value = (value ^ (value >> 27)) * 0x01DA_DEF4_BC2D_D44D % _PRIME
            context_hash = (context_hash + weight * (value ^ (value >> 33))) % _PRIME
            weight = weight * _BASE % _PRIME
        self.hash, self._weight = context_hash, weight
        self.num_tokens += len(token_ids)


def _mix(value: int) -> int:
    """Spreads an integer over [0, _PRIME): nearby values give unrelated ones."""
    value = (value ^ (value >> 31)) * 0x7FB5_D329_728E_A185 % _PRIME
    value = (value ^ (value >> 27)) * 0x01DA_DEF4_BC2D_D44D % _PRIME
    return value ^ (value >> 33)


def choose(
    context_hash: int,
    params: SamplingParams,
    output_index: int,
    *,
    vocab_size: int,
    eos_token_ids: Collection[int],
) -> Sampled:
    """The token after a context: a function of the context alone when greedy, else also of the seed and of
    the token's index, as counter-based noise is. Filters and penalties change nothing; `min_tokens` holds."""
    key = context_hash
    if not params.greedy:
        key += _mix(_mix(params.seed + 1) + output_index + 1)
    token_id = _mix(key) % vocab_size
    if output_index < params.min_tokens:
        token_id = _next_allowed(token_id, {*eos_token_ids, *params.stop_token_ids}, vocab_size)
    return Sampled(token_id=token_id, logprobs=_logprobs(token_id, params.logprobs, vocab_size))


def _next_allowed(token_id: int, banned: Collection[int], vocab_size: int) -> int:
    for candidate in range(token_id, token_id + vocab_size):
        if candidate % vocab_size not in banned:
            return candidate % vocab_size
    raise InvariantBroken(f"all {vocab_size} tokens are masked out")


def _logprobs(token_id: int, num_top: int | None, vocab_size: int) -> TokenLogprobs | None:
    """Made up, but the same for the same token: each next token id is e times less likely."""
    if num_top is None:
        return None
    top = tuple(TopLogprob(token_id=(token_id + rank) % vocab_size, logprob=-0.5 - rank) for rank in range(num_top))
    return TokenLogprobs(logprob=-0.5, top=top)


def expected_tokens(
    prompt: Sequence[int],
    params: SamplingParams,
    num_tokens: int,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    eos_token_ids: Collection[int] = (),
) -> list[int]:
    """The first `num_tokens` output tokens that an undisturbed `ModelledEngine` writes after `prompt`.

    Stop tokens do not end it (callers cut there), nor does `params.max_tokens`.
    """
    context = _Context(0, 0, 1)
    context.extend(prompt)
    output: list[int] = []
    for index in range(num_tokens):
        sampled = choose(context.hash, params, index, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
        output.append(sampled.token_id)
        context.extend(output[-1:])
    return output
