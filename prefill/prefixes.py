"""What of a prompt's beginning need not be computed: blocks that stand here, and blocks that come from other workers.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from prefill.admission import blocks_to_fetch, may_fetch

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import BlockId
    from contracts.messages import Peer, PrefixPlan, RequestKey
    from contracts.requests import GenerateRequest
    from engine.room import Room
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from prefill.block_tally import BlockTally
    from prefill.prompts import Prompt


class StartFetch(Protocol):
    """Begins to copy blocks `[len(local), stop)` of a prompt from another worker into the prefix cache."""

    def __call__(
        self, chain: KeyChain, local: list[BlockId], stop: int, source: Peer, waiter: Callable[[float], None]
    ) -> Callable[[], None] | None:
        """None where that is not possible now. Otherwise `waiter` is called with the time when it has ended, however
        it did, unless what is returned is called before."""
        ...


class PromptPrefixes:
    """Finds, fetches and names leading blocks; says so in the `Prompt`."""

    def __init__(
        self,
        cache: PrefixCache,
        *,
        lent: BlockTally,
        room: Room,
        block_tokens: int,
        start_fetch: StartFetch,
        on_fetched: Callable[[Prompt, float], None],
    ) -> None:
        """`lent`: blocks of all leases, kept up to date by the owner. `on_fetched` hears when a fetch that was not left
        has ended, however it did; what there is then has been looked up."""
        self._cache = cache
        self._lent = lent
        self._room = room
        self._block_tokens = block_tokens
        self._start_fetch = start_fetch
        self._on_fetched = on_fetched
        #: All and only prompts whose beginning is being fetched, oldest first.
        self._fetching: dict[RequestKey, Prompt] = {}

    @property
    def enabled(self) -> bool:
        return self._cache.enabled

    @property
    def num_fetching(self) -> int:
        return len(self._fetching)

    def chain(self, request: GenerateRequest) -> KeyChain:
        return self._cache.chain(request.token_ids, request.cache_salt)

    def find(self, prompt: Prompt) -> list[BlockId]:
        """Looks up which of its leading blocks stand, and notes how many: they may change until they are shared."""
        cached = self._cache.match_prompt(prompt.chain, len(prompt.sequence.token_ids))
        prompt.num_cached, prompt.num_held = len(cached), self._cache.num_held(cached)
        prompt.num_cached_lent = sum(block in self._lent for block in cached)
        return cached

    def name_final(self, prompt: Prompt) -> None:
        """Blocks that no chunk will write again can be found from now on."""
        sequence = prompt.sequence
        num_final = sequence.num_computed // self._block_tokens
        self._cache.name(prompt.chain, sequence.block_ids, prompt.num_named, num_final)
        prompt.num_named = num_final

    # --- fetches ----------------------------------------------------------------------------------

    def fetch(self, prompt: Prompt, cached: list[BlockId], plan: PrefixPlan, now_s: float) -> bool:
        """Begins to copy its beginning from where the plan says, if that still gains and there is room. `cached`: what
        was found of it just now."""
        most_blocks = self._cache.num_usable(prompt.chain, len(prompt.sequence.token_ids))
        stop = blocks_to_fetch(plan, num_local=len(cached), most_blocks=most_blocks)
        # Those that stand here are held meanwhile: they are not available either.
        taken = stop - len(cached) + prompt.num_cached - prompt.num_held
        if not stop or plan.source is None or not may_fetch(taken, self._room.view()):
            return False

        def ended(ended_s: float) -> None:
            prompt.leave_fetch, prompt.fetch_s = None, ended_s - now_s
            del self._fetching[prompt.sequence.key]
            self.find(prompt)
            self._on_fetched(prompt, ended_s)

        prompt.leave_fetch = self._start_fetch(prompt.chain, cached, stop, plan.source, ended)
        if prompt.leave_fetch is None:
            return False
        self._fetching[prompt.sequence.key] = prompt
        return True

    def is_fetching(self, prompt: Prompt) -> bool:
        return prompt.sequence.key in self._fetching

    def oldest_fetching(self) -> Prompt:
        """There must be one."""
        return next(iter(self._fetching.values()))

    def leave(self, prompt: Prompt) -> None:
        """Its beginning is not wanted any more; `forget` has to follow. Of a prompt that waits for none: nothing."""
        if prompt.leave_fetch is not None:
            prompt.leave_fetch()
            prompt.leave_fetch = None

    def forget(self, prompt: Prompt) -> None:
        self._fetching.pop(prompt.sequence.key, None)
