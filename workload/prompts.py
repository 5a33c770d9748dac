"""Token ids for a workload's prompts: equal hash ids give equal tokens, so that shared prefixes are really shared."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import chain, starmap
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from workload.request import WorkloadRequest


@dataclass(frozen=True, slots=True)
class PromptMaker:
    """A pure function from (request, its number, seed) to tokens; the same on every machine and at any time.

    Tokens are drawn from `low` <= id < `high`, about evenly: leave out special tokens, an end-of-text token in a prompt
    may end it. Blocks of different ids have unrelated tokens, which agree by chance once in `high - low` places.
    """

    seed: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 2**32:
            raise ValueError(f"token ids must lie in 0 <= low < high <= 2^32, got {self.low} and {self.high}")

    def token_ids(self, request: WorkloadRequest, number: int) -> tuple[int, ...]:
        """`prompt_tokens` ids. `number` tells requests without hash ids apart: each has a prompt of its own."""
        return tuple(chain.from_iterable(starmap(self.draw, self.pieces(request, number))))

    def pieces(self, request: WorkloadRequest, number: int) -> list[tuple[str, int]]:
        """What `token_ids` draws, one after another: (purpose, number of tokens) of each block."""
        if not request.hash_ids:
            return [(f"request/{number}", request.prompt_tokens)]
        block_tokens = request.hash_block_tokens
        tail_tokens = request.prompt_tokens - (len(request.hash_ids) - 1) * block_tokens
        if not 0 < tail_tokens <= block_tokens:
            raise ValueError(
                f"request {number}: {len(request.hash_ids)} hash ids of {block_tokens} tokens "
                f"for a prompt of {request.prompt_tokens} tokens"
            )
        full = [(f"block/{hash_id}", block_tokens) for hash_id in request.hash_ids[:-1]]
        return [*full, (f"block/{request.hash_ids[-1]}", tail_tokens)]

    def draw(self, purpose: str, num_tokens: int) -> list[int]:
        """The first `num_tokens` of an endless sequence: SHAKE-128 gives a shorter output as a prefix of a longer."""
        digest = hashlib.shake_128(f"{self.seed}/{purpose}".encode()).digest(4 * num_tokens)
        ids = np.frombuffer(digest, dtype="<u4") % (self.high - self.low) + self.low
        drawn: list[int] = ids.tolist()
        return drawn
