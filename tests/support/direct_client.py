"""A gateway reduced to its calls: sends prompts to workers of the test's choice, and reads what they write."""

from __future__ import annotations

import asyncio
import itertools
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from contracts.errors import TandemError
from contracts.ids import GatewayId, RequestId
from contracts.messages import CANCEL, FRAMES, PREFILL, CancelRequest, FramesRequest, PrefillRequest, RequestKey
from contracts.requests import GenerateRequest, PhaseTimes, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from contracts.messages import Peer, PrefixPlan
    from contracts.requests import Frame, TokenDelta
    from rpc import Network

IDLE_TIMEOUT_S = 30.0
CALL_TIMEOUT_S = 5.0


@dataclass(slots=True)
class DirectAnswer:
    request: GenerateRequest
    token_ids: list[int] = field(default_factory=list[int])
    finish: str | None = None
    error: str | None = None
    #: Of the first token.
    phases: PhaseTimes = field(default_factory=PhaseTimes)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    #: By index: the first token and the others come on two streams, and either can be the faster.
    early: dict[int, TokenDelta] = field(default_factory=dict[int, "TokenDelta"])

    def take(self, delta: TokenDelta) -> None:
        assert delta.index >= len(self.token_ids), delta
        assert delta.index not in self.early, delta
        self.early[delta.index] = delta
        while (following := self.early.pop(len(self.token_ids), None)) is not None:
            self._append(following)

    def _append(self, delta: TokenDelta) -> None:
        if not self.token_ids and delta.phases is not None:
            self.phases = delta.phases
        self.token_ids.extend(delta.token_ids)
        if delta.finish is not None:
            self.finish = delta.finish
            self.error = None if delta.error is None else f"{delta.error.code}: {delta.error.message}"
            self.ended.set()
            assert not self.early, self.early


class DirectClient:
    """Use as `async with`; every worker that writes tokens must be `open`ed first."""

    def __init__(self, network: Network, name: str = "direct") -> None:
        self._network = network
        self._gateway_id = GatewayId(name)
        self._numbers = itertools.count()
        self._answers: dict[RequestId, DirectAnswer] = {}
        self._streams: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._streams:
            task.cancel()
        for ended in await asyncio.gather(*self._streams, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended

    async def open(self, *workers: Peer) -> None:
        for worker in workers:
            opened = asyncio.Event()
            self._streams.append(asyncio.create_task(self._read(worker, opened)))
            await asyncio.wait_for(opened.wait(), CALL_TIMEOUT_S)

    async def begin(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        prefill: Peer,
        decode: Peer,
        prefix: PrefixPlan | None = None,
        cache_salt: str = "",
    ) -> DirectAnswer:
        """Sends one greedy request; raises what the worker answers."""
        request = GenerateRequest(
            request_id=RequestId(f"{self._gateway_id}-{next(self._numbers)}"),
            gateway_id=self._gateway_id,
            token_ids=tuple(token_ids),
            num_prompt_tokens=len(token_ids),
            sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
            deadline_s=60.0,
            cache_salt=cache_salt,
        )
        answer = self._answers[request.request_id] = DirectAnswer(request)
        ask = PrefillRequest(target=prefill.incarnation, request=request, decode=decode, prefix=prefix)
        await self._network.channel(prefill.address).call(PREFILL, ask, timeout_s=CALL_TIMEOUT_S)
        return answer

    async def ask(
        self,
        token_ids: Sequence[int],
        *,
        max_tokens: int,
        prefill: Peer,
        decode: Peer,
        prefix: PrefixPlan | None = None,
        cache_salt: str = "",
    ) -> DirectAnswer:
        """As `begin`, to the end of the answer."""
        answer = await self.begin(
            token_ids, max_tokens=max_tokens, prefill=prefill, decode=decode, prefix=prefix, cache_salt=cache_salt
        )
        await asyncio.wait_for(answer.ended.wait(), 60.0)
        return answer

    async def cancel(self, answer: DirectAnswer, worker: Peer) -> None:
        key = RequestKey(answer.request.request_id, answer.request.attempt, answer.request.owner_epoch)
        ask = CancelRequest(requests=(key,), reason="test")
        await self._network.channel(worker.address).call(CANCEL, ask, timeout_s=CALL_TIMEOUT_S)

    async def _read(self, worker: Peer, opened: asyncio.Event) -> None:
        ask = FramesRequest(gateway_id=self._gateway_id, target=worker.incarnation)
        frames = self._network.channel(worker.address).stream(FRAMES, ask, idle_timeout_s=IDLE_TIMEOUT_S)
        with suppress(TandemError):
            async with aclosing(frames):
                async for frame in frames:
                    opened.set()
                    self._take(frame)

    def _take(self, frame: Frame) -> None:
        for delta in frame.deltas:
            self._answers[delta.request_id].take(delta)
