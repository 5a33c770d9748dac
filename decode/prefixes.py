"""What of a coming prompt or of a preempted answer stands here already, and the keys of what is written here.

A block that has a key is final: shared ones are never written. What a sequence computes next lies behind them, in
blocks of its own, also where its prompt ends with a full block.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.failpoints import RarePath

if TYPE_CHECKING:
    from collections.abc import Sequence as Tokens

    from contracts.ids import BlockId
    from contracts.requests import GenerateRequest
    from decode.incoming import Incoming
    from engine.sequence import Sequence
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvtransfer import Ledger

_SKIPPED = RarePath("decode.skipped", "leading blocks of a handoff were not moved, for they stood here")
_FOUND_AGAIN = RarePath("decode.found_again", "a preempted answer found blocks of its own again")


class AnswerPrefixes:
    def __init__(self, cache: PrefixCache, ledger: Ledger) -> None:
        self._cache = cache
        self._ledger = ledger
        #: Blocks that were not moved here with their prompts, for they stood here, since the start.
        self.skipped_blocks_total = 0

    def chain(self, request: GenerateRequest, token_ids: Tokens[int]) -> KeyChain:
        """The keys of a sequence of this request; `token_ids` may grow at its end."""
        return self._cache.chain(token_ids, request.cache_salt, request.kv_class)

    # --- prompts on their way ---------------------------------------------------------------------

    def find(self, offer: Incoming) -> list[BlockId]:
        """Looks up which leading blocks of an offer's prompt stand here, and notes how many of the available ones it
        takes if it shares them.

        Unlike a prompt that is read, the last one may be among them: its next token has been sampled already. Not so of
        an answer that moves, which may come without any further token.
        """
        most_blocks = min(len(offer.chain), offer.num_blocks)
        if offer.is_move:
            most_blocks = min(most_blocks, (len(offer.token_ids) - 1) // self._cache.block_tokens)
        found = self._cache.match(offer.chain[index] for index in range(most_blocks))
        offer.num_new_blocks = offer.num_blocks - self._cache.num_held(found)
        return found

    def hold(self, offer: Incoming, found: list[BlockId]) -> None:
        """Until `hand_on` or `let_go` they are not evicted."""
        self._ledger.share(offer.holder, found)
        offer.shared = found
        offer.num_new_blocks = offer.num_blocks - len(found)

    def let_go(self, offer: Incoming) -> None:
        """Of what was held for an offer, if anything: it takes all of its blocks anew."""
        self._ledger.release(offer.holder, offer.shared)
        offer.shared, offer.num_new_blocks = [], offer.num_blocks

    def hand_on(self, offer: Incoming, owner: str) -> list[BlockId]:
        """What was held for an offer is `owner`'s from now on."""
        shared = offer.shared
        self._cache.note_asked(len(offer.chain), len(shared))
        if not offer.is_move:
            self._cache.note_used(offer.chain, len(offer.chain))
        if shared:
            _SKIPPED.reached()
            self.skipped_blocks_total += len(shared)
            self._ledger.share(owner, shared)
            self.let_go(offer)
        return shared

    # --- answers ----------------------------------------------------------------------------------

    def find_lost(self, chain: KeyChain, sequence: Sequence) -> tuple[list[BlockId], int]:
        """Leading blocks of a preempted answer that stand, and how many of them others hold. Its last token is computed
        in any case, for the next one is sampled from it."""
        found = self._cache.match_prompt(chain, len(sequence.token_ids))
        return found, self._cache.num_held(found)

    def share_again(self, chain: KeyChain, sequence: Sequence, found: list[BlockId]) -> None:
        """A preempted answer goes on from what was found; to be called at once."""
        self._ledger.share(sequence.owner, found)
        self._cache.note_asked(self._cache.num_usable(chain, len(sequence.token_ids)), len(found))
        sequence.block_ids = list(found)
        sequence.num_computed = len(found) * self._cache.block_tokens
        if found:
            _FOUND_AGAIN.reached()

    def name_final(self, chain: KeyChain, sequence: Sequence, num_named: int) -> int:
        """Gives keys to the blocks from `num_named` on that no step will write again; how many have theirs then, none
        where there is no cache."""
        num_final = min(sequence.num_computed // self._cache.block_tokens, len(chain))
        if num_final > num_named:
            self._cache.name(chain, sequence.block_ids, num_named, num_final)
        return num_final
