"""What of a prompt's beginning need not be computed: blocks that stand here, and blocks that come from elsewhere.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from contracts.failpoints import Failpoint
from prefill.admission import blocks_to_fetch, may_fetch
from prefill.read_ahead import FetchUnderWay, split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from contracts.ids import BlockId
    from contracts.messages import Peer, RequestKey
    from contracts.requests import GenerateRequest
    from engine.room import Room
    from kvstore.fetch_ends import FetchEnd, StartFetch
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvtransfer import Ledger
    from prefill.block_tally import BlockTally
    from prefill.prompts import Prompt


_SPLIT_ANYWAY = Failpoint(
    "prefill.split_anyway", "the first block of a fetch is left to the engine, whatever is known of speeds"
)


class ExpectedFetch(Protocol):
    """Seconds that a fetch of so many blocks from there takes; None: not known."""

    def __call__(self, source: Peer, num_blocks: int) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """Blocks of a prompt that stand here."""

    leading: list[BlockId]
    #: More behind a gap: positions `[start, start + len(behind))`.
    start: int = 0
    behind: list[BlockId] = field(default_factory=list["BlockId"])

    def __len__(self) -> int:
        return len(self.leading) + len(self.behind)


class PromptPrefixes:
    """Finds, takes, fetches and names leading blocks; says so in the `Prompt`."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        ledger: Ledger,
        lent: BlockTally,
        room: Room,
        block_tokens: int,
        start_fetch: StartFetch,
        expected_fetch_s: ExpectedFetch | None,
        reading_s: Callable[[int, int], float] | None,
        on_fetched: Callable[[Prompt, float], None],
    ) -> None:
        """`lent`: blocks of all leases, kept up to date by the owner. `on_fetched` hears when a fetch that was not left
        has ended, however it did; `settle` has to follow."""
        self._cache = cache
        self._ledger = ledger
        self._lent = lent
        self._room = room
        self._block_tokens = block_tokens
        self._start_fetch = start_fetch
        self._expected_fetch_s = expected_fetch_s
        self._reading_s = reading_s
        self._on_fetched = on_fetched
        #: All and only prompts whose beginning is being fetched, or whose fetch is not settled; oldest first.
        self._fetching: dict[RequestKey, Prompt] = {}

    @property
    def enabled(self) -> bool:
        return self._cache.enabled

    @property
    def num_fetching(self) -> int:
        return len(self._fetching)

    def fetching(self) -> Iterable[Prompt]:
        return self._fetching.values()

    def chain(self, request: GenerateRequest) -> KeyChain:
        return self._cache.chain(request.token_ids, request.cache_salt, request.kv_class)

    def num_usable(self, prompt: Prompt) -> int:
        """Leading blocks that it could do without computing."""
        return self._cache.num_usable(prompt.chain, len(prompt.sequence.token_ids))

    # --- what stands here -------------------------------------------------------------------------

    def find(self, prompt: Prompt) -> Found:
        """Looks up which of its blocks stand, and notes how many: they may change until they are shared. Behind a gap
        only what was fetched for it is looked for."""
        leading = self._cache.match_prompt(prompt.chain, len(prompt.sequence.token_ids))
        start, behind = 0, list["BlockId"]()
        if prompt.fetched is not None and len(leading) < prompt.fetched.start:
            start = prompt.fetched.start
            # A prompt that joined another's fetch may end, or differ, before that does.
            stop = min(prompt.fetched.stop, self.num_usable(prompt))
            behind = self._cache.match(prompt.chain[index] for index in range(start, stop))
        blocks = leading + behind
        prompt.num_cached, prompt.num_held = len(leading), self._cache.num_held(blocks)
        prompt.num_cached_lent = sum(block in self._lent for block in blocks)
        prompt.gap_stop = start * self._block_tokens if behind else 0
        prompt.jump_to = (start + len(behind)) * self._block_tokens if behind else 0
        return Found(leading, start, behind)

    def take(self, prompt: Prompt, found: Found, num_blocks: int) -> None:
        """Gives it its first `num_blocks` blocks, what was found just now among them; the rest must be available."""
        sequence = prompt.sequence
        # Shared first, lest they be evicted for the others.
        self._ledger.share(sequence.owner, found.leading + found.behind)
        new = self._ledger.allocate(sequence.owner, num_blocks - len(found))
        assert new is not None, (self._ledger, num_blocks, len(found))
        gap = found.start - len(found.leading) if found.behind else 0
        sequence.block_ids = [*found.leading, *new[:gap], *found.behind, *new[gap:]]
        sequence.num_computed = len(found.leading) * self._block_tokens
        prompt.num_named = len(found.leading)

    def give_back(self, prompt: Prompt) -> None:
        """Lets its blocks go, as if it had not begun; what was named stays cached. It must not be in a step."""
        sequence = prompt.sequence
        if sequence.block_ids:
            self._ledger.release(sequence.owner, sequence.block_ids)
        sequence.block_ids, sequence.num_computed, prompt.num_named = [], 0, 0

    def name_final(self, prompt: Prompt) -> None:
        """Blocks that no chunk will write again can be found from now on."""
        sequence = prompt.sequence
        num_final = sequence.num_computed // self._block_tokens
        self._cache.name(prompt.chain, sequence.block_ids, prompt.num_named, num_final)
        prompt.num_named = num_final

    def note_admitted(self, prompt: Prompt, found: Found) -> None:
        """Counts what it was spared, and notes by tier where that had stood."""
        blocks = _by_tier(prompt, found)
        # What was fetched or read ahead for it did not stand here when it was looked for.
        self._cache.note_asked(self.num_usable(prompt), blocks.get("device", 0))
        self._cache.note_used(prompt.chain, self.num_usable(prompt))
        prompt.cached_by_tier = {tier: num_blocks * self._block_tokens for tier, num_blocks in blocks.items()}

    # --- fetches ----------------------------------------------------------------------------------

    def fetch(self, prompt: Prompt, local: list[BlockId], now_s: float, *, idle: bool) -> bool:
        """Begins to copy its beginning from where its plan says, if that still gains and there is room.

        `local`: leading blocks that were found just now. `idle`: nobody else needs the engine, so that it may read the
        front meanwhile. Once begun the plan is done with, whatever comes."""
        plan, num_local = prompt.plan, len(local)
        if plan is None or plan.source is None:
            return False
        stop = blocks_to_fetch(plan, num_local=num_local, most_blocks=self.num_usable(prompt))
        # Those that stand here are held meanwhile: they are not available either.
        taken = stop - num_local + prompt.num_cached - prompt.num_held
        if not stop or not may_fetch(taken, self._room.view()):
            return False
        began_s, source = now_s, plan.source

        def read_s(num_blocks: int) -> float:
            if self._reading_s is None:
                return 0.0
            return self._reading_s(num_blocks * self._block_tokens, num_local * self._block_tokens)

        def fetch_s(num_blocks: int) -> float | None:
            return None if self._expected_fetch_s is None else self._expected_fetch_s(source, num_blocks)

        def ended(end: FetchEnd) -> None:
            prompt.fetch, prompt.fetched, prompt.fetch_s = None, end, end.ended_s - began_s
            self._on_fetched(prompt, end.ended_s)

        start = split(num_local, stop, read_s=read_s, fetch_s=fetch_s) if idle else num_local
        if _SPLIT_ANYWAY.fires():
            start = min(num_local + 1, stop - 1)
        ticket = self._start_fetch(prompt.chain, local, stop, source, ended, start=start)
        if ticket is None:
            return False
        reading_s = read_s(stop - num_local)
        late_after_s = began_s + max(reading_s, fetch_s(stop - start) or 0.0) if reading_s > 0.0 else math.inf
        prompt.plan, prompt.fetch = None, FetchUnderWay(ticket=ticket, began_s=began_s, late_after_s=late_after_s)
        self._fetching[prompt.sequence.key] = prompt
        return True

    def is_fetching(self, prompt: Prompt) -> bool:
        return prompt.sequence.key in self._fetching

    def oldest_fetching(self) -> Prompt:
        """There must be one."""
        return next(iter(self._fetching.values()))

    def leave(self, prompt: Prompt) -> None:
        """Its beginning is not wanted any more; `settle` has to follow. Of a prompt that waits for none: nothing."""
        if prompt.fetch is not None:
            prompt.fetch.ticket.leave()
            prompt.fetch = None

    def settle(self, prompt: Prompt) -> None:
        """Its fetch is over, and what came of it is known."""
        self._fetching.pop(prompt.sequence.key, None)


def _by_tier(prompt: Prompt, found: Found) -> dict[str, int]:
    """Blocks among those found by where they stood when they were looked for; not those that were computed for it."""
    positions = {*range(len(found.leading)), *range(found.start, found.start + len(found.behind))}
    positions -= set(range(prompt.ahead_start, prompt.ahead_stop))
    tiers: dict[str, int] = {}
    if prompt.fetched is not None:
        left = len(positions & set(range(prompt.fetched.start, prompt.fetched.stop)))
        for tier, num_blocks in prompt.fetched.tier_blocks.items():
            if count := min(left, num_blocks):
                tiers[tier] = count
                left -= count
    if standing := len(positions) - sum(tiers.values()):
        tiers["device"] = standing
    return tiers
