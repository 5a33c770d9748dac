"""A KV store in a study: prefixes outside of the workers, which any worker that reads prompts can fetch.

What a worker has read it offers; the store copies what it lacks, over both ends' interfaces. It gives in the same way,
and as any holder it gives what it has when it is asked. Where its blocks stand, and what its disk takes, is not
modelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from simulator.heap.prefix_cache import PrefixCache
from simulator.heap.wires import Interface

if TYPE_CHECKING:
    from simulator.heap.context import Context
    from simulator.heap.request import Request
    from simulator.heap.worker import Worker

#: Name of the only one.
STORE_ID = "store-0"


class Holder(Protocol):
    """Who has prefixes: a worker or a store."""

    worker_id: str
    interface: Interface
    #: A report of what changed in its prefix cache is on its way.
    tells_blocks: bool

    @property
    def prefix_cache(self) -> PrefixCache | None: ...


class Store:
    def __init__(self, context: Context, num_tokens: int) -> None:
        """Room for so many tokens, at least a block of the workload's hash ids."""
        self.worker_id = STORE_ID
        self.interface = Interface()
        self.tells_blocks = False
        self.num_blocks = num_tokens // context.layout.block_tokens
        self._heap = context.heap
        self._wires = context.wires
        self._message_s = context.spec.message_s
        self._kv_blocks = context.hash_block_tokens // context.layout.block_tokens
        self._cache = PrefixCache(num_tokens // context.hash_block_tokens, lambda: context.on_cache_changed(self))
        #: KV blocks that came.
        self.stored_blocks = 0

    def __repr__(self) -> str:
        return f"<store {self.worker_id} [{len(self._cache)}/{self._cache.capacity_blocks} blocks]>"

    @property
    def prefix_cache(self) -> PrefixCache:
        return self._cache

    def offer(self, request: Request, worker: Worker) -> None:
        """The worker has read this prompt, and offers its KV."""
        self._heap.after(self._message_s, self._offered, (request, worker))

    def _offered(self, news: tuple[Request, Worker]) -> None:
        request, worker = news
        held, cache = worker.prefix_cache, self._cache
        num_here = cache.leading(request.hash_ids)
        num_offered = 0 if held is None else held.leading(request.hash_ids)
        if num_offered <= num_here:
            cache.use(request.hash_ids)
            return
        prefix = request.hash_ids[:num_offered]

        def pulled(request: Request, num_blocks: int) -> None:
            del request
            self.stored_blocks += num_blocks
            cache.put(prefix)

        num_blocks = max(1, (num_offered - num_here) * self._kv_blocks)
        self._wires.pull(worker.interface, self.interface, request, num_blocks, pulled)
