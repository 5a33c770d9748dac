"""How much of the prompts a block store would have had: prefix reuse under an LRU bound."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from workload.request import WorkloadRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixReuse:
    """What one store would have saved."""

    num_requests: int
    prompt_tokens: int
    #: Prompt tokens that were in the store, in an unbroken run from the start of their prompt.
    hit_tokens: int
    #: Blocks put into the store: each once, and once more whenever it comes back after it had to leave.
    stored_blocks: int

    @property
    def token_hit_rate(self) -> float:
        """Share of all prompt tokens; 0 without requests."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


def prefix_reuse(requests: Iterable[WorkloadRequest], capacity_tokens: int | None = None) -> PrefixReuse:
    """Token hit rate of one store that all requests share and that every prompt is written to on arrival.

    A request hits the longest run of its leading blocks that is stored; a block behind the first one missing never
    counts. Then all blocks of its prompt become the most recently used, first to last, and the least recently
    used leave. Answers are not stored. The accounting, block by block:

    - the store holds `capacity_tokens` // block tokens blocks; None: no bound.
    - a partial last block takes up a whole block, and hits only a request that has the same id there.
    - hits count in prompt tokens, so a hit on a partial last block is worth the tokens in it.

    Requests without hash ids hit nothing and store nothing. Raises ValueError for a capacity below one block, and
    where ids of different block sizes meet.
    """
    store = _LruBlocks(capacity_tokens)
    num_requests = prompt_tokens = hit_tokens = 0
    for request in requests:
        num_requests += 1
        prompt_tokens += request.prompt_tokens
        if request.hash_ids:
            store.use_block_tokens(request.hash_block_tokens)
            hit_blocks = store.leading(request.hash_ids)
            hit_tokens += min(hit_blocks * request.hash_block_tokens, request.prompt_tokens)
            store.put(request.hash_ids)
    return PrefixReuse(
        num_requests=num_requests, prompt_tokens=prompt_tokens, hit_tokens=hit_tokens, stored_blocks=store.num_put
    )


class _LruBlocks:
    """Block ids, the least recently used first."""

    def __init__(self, capacity_tokens: int | None) -> None:
        self._capacity_tokens = capacity_tokens
        self._block_tokens = 0
        self._capacity_blocks: int | None = None
        self._blocks: OrderedDict[int, None] = OrderedDict()
        self.num_put = 0

    def use_block_tokens(self, block_tokens: int) -> None:
        if block_tokens == self._block_tokens:
            return
        if self._block_tokens:
            raise ValueError(f"hash ids of blocks of {self._block_tokens} and of {block_tokens} tokens do not mix")
        self._block_tokens = block_tokens
        if self._capacity_tokens is not None:
            self._capacity_blocks = self._capacity_tokens // block_tokens
            if self._capacity_blocks < 1:
                raise ValueError(f"capacity_tokens {self._capacity_tokens} is less than a block of {block_tokens}")

    def leading(self, hash_ids: tuple[int, ...]) -> int:
        """How many leading ones are there."""
        for index, hash_id in enumerate(hash_ids):
            if hash_id not in self._blocks:
                return index
        return len(hash_ids)

    def put(self, hash_ids: tuple[int, ...]) -> None:
        blocks, capacity = self._blocks, self._capacity_blocks
        for hash_id in hash_ids:
            if hash_id in blocks:
                blocks.move_to_end(hash_id)
                continue
            self.num_put += 1
            if capacity is not None and len(blocks) >= capacity:
                blocks.popitem(last=False)
            blocks[hash_id] = None
