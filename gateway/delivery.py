"""The order of one answer: which tokens the client gets next, whatever order and repeats they come in.

Two workers' streams are not ordered with each other, and a replayed request's tokens come from other workers
than the ones before: deltas are put in order by output index, each token is let through once, and what came
too early waits here. No I/O, no clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from contracts.requests import TokenDelta


class Delivery:
    """The tokens of one answer, in order. Grows only; nothing is taken back."""

    def __init__(self) -> None:
        #: Output tokens that the client has got.
        self.token_ids: list[int] = []
        #: Deltas that start beyond what was delivered, by index.
        self._early: dict[int, TokenDelta] = {}

    def __repr__(self) -> str:
        return f"<Delivery [{self.next_index} delivered, {len(self._early)} early]>"

    @property
    def next_index(self) -> int:
        """The output index that the client waits for."""
        return len(self.token_ids)

    @property
    def has_gap(self) -> bool:
        """Later tokens are here, the next one is not."""
        return bool(self._early)

    @property
    def num_early_tokens(self) -> int:
        return sum(len(early.token_ids) for early in self._early.values()) if self._early else 0

    def is_news(self, delta: TokenDelta) -> bool:
        """Whether it holds a token that was not delivered, or the end."""
        return delta.index + len(delta.token_ids) > self.next_index or delta.finish is not None

    def take(self, delta: TokenDelta) -> list[TokenDelta]:
        """What the client gets now: nothing, or `delta` and the early ones that continue it, in order, without
        tokens it has. Ends with the first delta that has `finish`."""
        if delta.index > self.next_index:
            self._keep(delta)
            return []
        out: list[TokenDelta] = []
        following: TokenDelta | None = delta
        while following is not None:
            fresh = _from_index(following, self.next_index)
            self.token_ids.extend(fresh.token_ids)
            out.append(fresh)
            following = self._next_early() if self._early and fresh.finish is None else None
        return out

    def forget_early(self) -> None:
        """Throws away what came too early: the try that it came from was given up."""
        self._early.clear()

    def _keep(self, delta: TokenDelta) -> None:
        known = self._early.get(delta.index)
        if known is None or len(delta.token_ids) > len(known.token_ids) or delta.finish is not None:
            self._early[delta.index] = delta

    def _next_early(self) -> TokenDelta | None:
        """Takes the early delta that continues at `next_index`, and forgets those that fell behind it."""
        for index in sorted(self._early):
            if index > self.next_index:
                return None
            delta = self._early.pop(index)
            if self.is_news(delta):
                return delta
        return None


def _from_index(delta: TokenDelta, index: int) -> TokenDelta:
    """`delta` without its tokens before output index `index`."""
    skip = index - delta.index
    if skip <= 0:
        return delta
    logprobs = None if delta.logprobs is None else delta.logprobs[skip:]
    return msgspec.structs.replace(delta, index=index, token_ids=delta.token_ids[skip:], logprobs=logprobs)
