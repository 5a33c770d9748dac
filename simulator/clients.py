"""Clients of a simulated cluster: what they ask, what they got, and whether it is right, token by token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import TandemError
from gateway.core import Submission
from simulator.engine import expected_tokens

if TYPE_CHECKING:
    from contracts.requests import SamplingParams, TokenDelta
    from gateway.core import GatewayCore
    from gateway.stream import RequestStream


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request of a client."""

    at_s: float
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    #: Cancelled after this many tokens; None: never.
    cancel_after: int | None = None
    deadline_s: float = 60.0


@dataclass(slots=True, kw_only=True)
class Answer:
    """What a client got. `problems` names what no client may ever see."""

    ask: Ask
    token_ids: list[int] = field(default_factory=list[int])
    #: The likeliest token at each place, where logprobs were asked for.
    top_ids: list[int] = field(default_factory=list[int])
    finish: str | None = None
    error: TandemError | None = None
    asked_s: float = 0.0
    #: None while it is open.
    ended_s: float | None = None
    #: Deltas that did not continue what came before.
    misplaced: list[str] = field(default_factory=list[str])

    def take(self, delta: TokenDelta) -> None:
        if delta.index != len(self.token_ids):
            self.misplaced.append(f"a delta begins at token {delta.index}, {len(self.token_ids)} came before")
        if self.finish is not None:
            self.misplaced.append(f"token {delta.index} comes after the end ({self.finish})")
        self.token_ids.extend(delta.token_ids)
        self.top_ids.extend(each.top[0].token_id for each in delta.logprobs or () if each.top)
        self.finish = delta.finish

    def problems(self) -> list[str]:
        """What came must be a prefix of the right answer, and the whole of it when it ended well."""
        sampling = self.ask.sampling
        found = list(self.misplaced)
        right = expected_tokens(self.ask.token_ids, sampling, sampling.max_tokens)
        wrong = [index for index, pair in enumerate(zip(self.token_ids, right, strict=False)) if pair[0] != pair[1]]
        if wrong:
            found.append(f"token {wrong[0]} is {self.token_ids[wrong[0]]}, not {right[wrong[0]]}")
        if self.top_ids != (self.token_ids if sampling.logprobs else []):
            found.append("the logprobs are not those of its tokens")
        if self.finish is not None and (self.finish, len(self.token_ids)) != ("length", sampling.max_tokens):
            found.append(f"it ended ({self.finish}) after {len(self.token_ids)} of {sampling.max_tokens} tokens")
        if self.finish is not None and self.error is not None:
            found.append(f"it ended well and failed: {self.error!r}")
        cancelled = self.ask.cancel_after is not None and len(self.token_ids) >= self.ask.cancel_after
        if self.ended_s is not None and self.finish is None and self.error is None and not cancelled:
            found.append(f"it ended without a word after {len(self.token_ids)} tokens")
        return found


async def ask_for(core: GatewayCore, ask: Ask) -> Answer:
    """Asks now (`at_s` is the caller's), reads to the end, or to where the client goes away."""
    answer = Answer(ask=ask)
    await ask_into(core, answer)
    return answer


async def ask_into(core: GatewayCore, answer: Answer) -> None:
    """As `ask_for`, into an answer that others watch."""
    loop = asyncio.get_running_loop()
    ask = answer.ask
    answer.asked_s = loop.time()
    submission = Submission(token_ids=ask.token_ids, sampling=ask.sampling, deadline_s=ask.deadline_s)
    try:
        async with core.submit(submission) as stream:
            await _read(stream, answer)
    except TandemError as error:
        answer.error = error
    answer.ended_s = loop.time()


async def _read(stream: RequestStream, answer: Answer) -> None:
    cancel_after = answer.ask.cancel_after
    if cancel_after == 0:
        return
    async for delta in stream:
        answer.take(delta)
        if cancel_after is not None and len(answer.token_ids) >= cancel_after:
            return
