"""What of earlier prompts' KV still stands in a worker's own blocks, found by key.

The ledger keeps a key with each block that has one, whoever refers to it, until the block is evicted; so a prompt
shares blocks with prompts that are being read or have just been handed over as well as with those long ended.
Only full blocks have keys, and they are given when the block will never be written again.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from kvstore.block_keys import block_keys, root_key
from kvtransfer import BlockClass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from contracts.ids import BlockId
    from contracts.layout import KvIdentity
    from contracts.requests import KvClass
    from kvtransfer import Ledger


class KeyChain:
    """The keys of one sequence's full blocks, made as far as they are asked for: a long prompt whose beginning is not
    here costs one hash before it is read, an answer one for each block that it fills."""

    def __init__(
        self, root: bytes, token_ids: Sequence[int], block_tokens: int, *, kv_class: KvClass = "exact"
    ) -> None:
        """`token_ids` is kept, not copied. It may grow at its end, and the chain with it, but not change otherwise."""
        #: Of the KV that its keys name.
        self.kv_class = kv_class
        self._token_ids = token_ids
        self._block_tokens = block_tokens
        self._root = root
        self._made: list[bytes] = []
        #: Makes the keys of blocks that were full when it was made.
        self._rest: Iterator[bytes] = iter(())

    def __len__(self) -> int:
        """Full blocks of the sequence."""
        return len(self._token_ids) // self._block_tokens

    def __getitem__(self, index: int) -> bytes:
        """Of block `index`, counted from 0. Raises IndexError."""
        num_blocks = len(self)
        if not 0 <= index < num_blocks:
            raise IndexError(f"key {index} of {num_blocks}")
        while index >= len(self._made):
            made = list(islice(self._rest, index + 1 - len(self._made)))
            self._made += made
            if not made:
                parent = self._made[-1] if self._made else self._root
                unnamed = self._token_ids[len(self._made) * self._block_tokens :]
                self._rest = block_keys(parent, unnamed, self._block_tokens)
        return self._made[index]

    def part(self, start: int, stop: int) -> tuple[bytes, ...]:
        """Of blocks `[start, stop)`."""
        return tuple(self[index] for index in range(start, stop))


class PrefixCache:
    """Not thread-safe, like the ledger that it reads and names blocks in."""

    def __init__(self, ledger: Ledger, identity: KvIdentity, *, enabled: bool = True) -> None:
        """Not `enabled`: no prompt has keys, so nothing is found and nothing kept."""
        self._ledger = ledger
        self._identity = identity
        self._enabled = enabled
        #: Blocks that were asked for since the start and stood here, and those that did not: see `note_asked`.
        self.hit_blocks_total = 0
        self.missed_blocks_total = 0
        #: Hears which leading blocks of its own a prompt begins with here, found or not.
        self.on_used: Callable[[KeyChain, int], None] | None = None

    @property
    def enabled(self) -> bool:
        return self._enabled

    @property
    def block_tokens(self) -> int:
        return self._identity.layout.block_tokens

    def chain(self, token_ids: Sequence[int], cache_salt: str, kv_class: KvClass = "exact") -> KeyChain:
        """The keys of a sequence; ids must fit into 32 bits unsigned. Sequences of other salts, or of the other class,
        share no key. `token_ids` may grow at its end: see `KeyChain`."""
        root = root_key(self._identity, cache_salt, kv_class=kv_class)
        return KeyChain(root, token_ids if self._enabled else (), self.block_tokens, kv_class=kv_class)

    def match(self, keys: Iterable[bytes]) -> list[BlockId]:
        """The blocks with the leading keys of these, up to the first that no block has.

        Their bytes stand until something is allocated: share or pin them at once.
        """
        found: list[BlockId] = []
        for key in keys:
            block = self._ledger.lookup(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_usable(self, chain: KeyChain, num_tokens: int) -> int:
        """Leading blocks of a prompt of `num_tokens` tokens that need not be computed. Not all of it: its last token is
        always computed, for what comes after it is sampled from that."""
        return min(len(chain), max(0, num_tokens - 1) // self.block_tokens)

    def match_prompt(self, chain: KeyChain, num_tokens: int) -> list[BlockId]:
        """Leading blocks of a prompt of `num_tokens` tokens that stand here and need not be computed."""
        return self.match(chain[index] for index in range(self.num_usable(chain, num_tokens)))

    def num_held(self, blocks: Iterable[BlockId]) -> int:
        """How many of these are somebody's already, so that sharing them takes none of the available ones."""
        return sum(self._ledger.block_class(block) is not BlockClass.CACHED for block in blocks)

    def note_asked(self, num_asked: int, num_found: int) -> None:
        """Counts what somebody wanted and got. Apart from `match`, which is asked again and again for the same."""
        self.hit_blocks_total += num_found
        self.missed_blocks_total += num_asked - num_found

    def note_used(self, chain: KeyChain, num_blocks: int) -> None:
        """A prompt was admitted here, and its first `num_blocks` blocks are such as others may share; there may be
        none."""
        if self.on_used is not None:
            self.on_used(chain, num_blocks)

    def name(self, chain: KeyChain, blocks: Sequence[BlockId], start: int, stop: int) -> None:
        """Gives positions `[start, stop)` of a prompt's `blocks` their keys: they are final from now on, and outlive
        who holds them. One that another block has already is left to that block."""
        for index in range(start, min(stop, len(chain))):
            self._ledger.set_key(blocks[index], chain[index])
