"""Prefix hints of chance: placements that name some worker as the holder of a prompt's beginning.

What a coordinator says of prefixes is never more than a hint, however good its directory is; so workers must take any.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from contracts.messages import DISPATCH, Placement, PrefixPlan

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from contracts.messages import DispatchItem, DispatchReply, DispatchRequest, Method, Peer, Rejection, StreamMethod
    from rpc import CallContext, Server


class HintingServer:
    """A coordinator's server that adds hints to what its Dispatch answers."""

    def __init__(
        self, server: Server, holders: Callable[[], Sequence[Peer]], *, rng: random.Random, chance: float
    ) -> None:
        """`holders`: the workers that may be named, as of now; `chance`: of a placement that names none by itself."""
        self._server = server
        self._holders = holders
        self._rng = rng
        self._chance = chance

    def register(self, method: Method[Any, Any], handler: Any) -> None:
        self._server.register(method, self._with_hints(handler) if method is DISPATCH else handler)

    def register_stream(self, method: StreamMethod[Any, Any], handler: Any) -> None:
        self._server.register_stream(method, handler)

    async def start(self) -> str:
        return await self._server.start()

    async def stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)

    def _with_hints(self, handler: Any) -> Any:
        async def handle(ask: DispatchRequest, context: CallContext) -> DispatchReply:
            reply: DispatchReply = await handler(ask, context)
            pairs = zip(ask.items, reply.verdicts, strict=True)
            hinted = tuple(self._hint(item, verdict) for item, verdict in pairs)
            return msgspec.structs.replace(reply, verdicts=hinted)

        return handle

    def _hint(self, item: DispatchItem, verdict: Placement | Rejection) -> Placement | Rejection:
        if not isinstance(verdict, Placement) or (verdict.prefix is not None and verdict.prefix.source is not None):
            return verdict
        others = [peer for peer in self._holders() if peer.worker_id != verdict.prefill.worker_id]
        if not others or self._rng.random() >= self._chance:
            return verdict
        # At most one block for each token: whoever reads the prompt knows how many there are.
        plan = PrefixPlan(source=self._rng.choice(others), source_blocks=self._rng.randint(1, item.prompt_tokens))
        return msgspec.structs.replace(verdict, prefix=plan)
