"""Prefixes that a worker in a study copies from other workers, or from the store, before it reads a prompt.

The order of things as in `kvstore.fetches`: the prompt waits for its prefix while others are read, the holder gives
what it really has when it is asked, the bytes share both ends' interfaces with all other KV, and a fetch that takes
too long is left alone. What comes goes into the worker's host memory, and takes no block of its KV pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvstore.fetch_ends import limit_s
from kvstore.fetches import MAX_FETCHES
from prefill.admission import blocks_to_fetch
from simulator.heap.request import PromptStage

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.heap.context import Context
    from simulator.heap.prefix_cache import PrefixCache
    from simulator.heap.request import Request
    from simulator.heap.store import Holder
    from simulator.heap.worker import Worker


class Fetches:
    def __init__(self, context: Context, worker: Worker, on_ready: Callable[[Request], None]) -> None:
        """`on_ready` is called with a prompt whose prefix is here, or as much of it as there will be."""
        self._heap = context.heap
        self._wires = context.wires
        self._message_s = context.spec.message_s
        self._block_tokens = context.layout.block_tokens
        self._hash_block_tokens = context.hash_block_tokens
        self._kv_token_bytes = context.spec.kv_token_bytes
        self._worker = worker
        self._on_ready = on_ready
        #: Prompts that wait for their prefix.
        self.num_open = 0
        #: KV blocks that came.
        self.num_blocks = 0

    def begin(self, request: Request) -> bool:
        """Asks for the prefix that its placement names; False where nothing would come of it."""
        plan, source, own = request.prefix_plan, request.fetch_from, self._worker.prefix_cache
        if plan is None or source is None or own is None or self.num_open >= MAX_FETCHES:
            return False
        hash_ids = request.hash_ids
        stop = blocks_to_fetch(plan, num_local=own.leading(hash_ids), most_blocks=len(hash_ids))
        if not stop:
            return False
        request.fetch_hash_blocks = stop
        request.prompt_stage = PromptStage.FETCHING
        request.fetch_since_s = self._heap.now_s
        self.num_open += 1
        self._heap.after(self._message_s, self._asked, request)
        num_tokens = (stop - own.leading(hash_ids, stop)) * self._hash_block_tokens
        self._heap.after(limit_s(num_tokens * self._kv_token_bytes), self._ended, request)
        return True

    def give_up(self, request: Request) -> None:
        """The request is over; what is on the wire goes on, for nothing."""
        request.prompt_stage = PromptStage.ABSENT
        self.num_open -= 1

    def _asked(self, request: Request) -> None:
        """The holder hears of it: what it has stands under a lease from now on."""
        source = request.fetch_from
        if request.prompt_stage is not PromptStage.FETCHING or source is None:
            self._heap.overtaken()
            return
        held, own = _cache_of(source), _cache_of(self._worker)
        prefix = request.hash_ids[: request.fetch_hash_blocks]
        count, num_local = held.leading(prefix), own.leading(prefix)
        if count <= num_local:
            self._heap.after(self._message_s, self._ended, request)
            return
        held.use(prefix[:count])
        request.fetch_hash_blocks = count
        self._heap.after(self._message_s, self._pull, (request, count - num_local))

    def _pull(self, news: tuple[Request, int]) -> None:
        request, num_hash_blocks = news
        source = request.fetch_from
        if request.prompt_stage is not PromptStage.FETCHING or source is None:
            self._heap.overtaken()
            return
        num_blocks = -(-num_hash_blocks * self._hash_block_tokens // self._block_tokens)
        self._wires.pull(source.interface, self._worker.interface, request, num_blocks, self._pulled)

    def _pulled(self, request: Request, num_blocks: int) -> None:
        self.num_blocks += num_blocks
        if request.prompt_stage is not PromptStage.FETCHING:
            return
        request.fetched_tokens = num_blocks * self._block_tokens
        _cache_of(self._worker).put(request.hash_ids[: request.fetch_hash_blocks])
        # The lease has to be confirmed.
        self._heap.after(2 * self._message_s, self._ended, request)

    def _ended(self, request: Request) -> None:
        """However it did."""
        if request.prompt_stage is not PromptStage.FETCHING:
            self._heap.overtaken()
            return
        self.num_open -= 1
        request.fetch_s = self._heap.now_s - request.fetch_since_s
        self._on_ready(request)


def _cache_of(holder: Holder) -> PrefixCache:
    assert holder.prefix_cache is not None, "else nothing is fetched from or to it"
    return holder.prefix_cache
