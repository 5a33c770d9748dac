"""Reading the front of a prompt while a fetch brings the rest of its beginning: compute or load, both at once.

A prompt whose beginning is being fetched holds nothing and waits outside of the queue. An engine that would idle
meanwhile reads it from the front: blocks `[start, split)`, while the fetch brings `[split, stop)`, so chosen that both
end together (Jin et al., "Compute Or Load KV Cache? Why Not Both?", 2024, meets in the middle for the same reason).
Where a fetch is late, the engine goes on as far as `stop`: whoever waits as long for a fetch as reading would have
taken, and then reads, never takes more than twice what the better of the two does (the ski rental argument).

Nothing is waited for with blocks in hand: what was read is named block by block, and cached when the prompt lets go
of it, which it does as soon as anything else wants the engine or the blocks. Its turn in the queue finds all of it,
and reads the gap that may be left between it and what was fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.failpoints import RarePath
from engine.compose import Candidate
from prefill.admission import may_fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from engine.room import Room
    from kvstore.fetch_ends import FetchTicket
    from prefill.prefixes import PromptPrefixes
    from prefill.prompts import Prompt

#: Of the time that a fetch is expected to take, the engine reads at most so much: a prompt that has to wait for its
#: engine when its blocks have come would have been sooner without.
AHEAD_SHARE = 0.8

_READ_AHEAD = RarePath("prefill.read_ahead", "a prompt was read from the front while the rest of its prefix came")
_OVERTAKEN = RarePath("prefill.overtaken", "a prompt was read whole before its fetch had come")


def split(start: int, stop: int, *, read_s: Callable[[int], float], fetch_s: Callable[[int], float | None]) -> int:
    """Where what the engine reads, `[start, split)`, ends and what is fetched, `[split, stop)`, begins; blocks. Pure.

    The largest split with which reading so many blocks takes at most `AHEAD_SHARE` of fetching the others. `start`
    where that is none, or where either is unknown (`read_s` 0 or less, `fetch_s` None). Neither may fall with more.
    """

    def in_time(middle: int) -> bool:
        reading_s, fetching_s = read_s(middle - start), fetch_s(stop - middle)
        return fetching_s is not None and 0.0 < reading_s <= AHEAD_SHARE * fetching_s

    low, high = start, stop
    while high - low > 1:
        middle = (low + high) // 2
        if in_time(middle):
            low = middle
        else:
            high = middle
    return low


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchUnderWay:
    """What a prompt knows of the fetch that it waits for."""

    ticket: FetchTicket
    began_s: float
    #: From then on the fetch is late: reading its blocks would have taken as long, and it was expected to be over.
    #: Infinite where nothing is known of reading.
    late_after_s: float

    def read_limit(self, now_s: float) -> int:
        """Up to which block an idle engine reads."""
        return self.ticket.stop if now_s > self.late_after_s else self.ticket.start


class ReadAhead:
    """The one prompt that is read while its fetch runs, if there is one. Not thread-safe."""

    def __init__(self, prefixes: PromptPrefixes, room: Room, *, block_tokens: int) -> None:
        self._prefixes = prefixes
        self._room = room
        self._block_tokens = block_tokens
        #: It holds blocks for all that it is to read.
        self.prompt: Prompt | None = None
        #: Tokens that it is read up to.
        self._stop = 0
        #: Tokens computed so since the start.
        self.tokens_total = 0

    def candidate(self, now_s: float) -> Candidate | None:
        """What an engine that nobody else needs could read next. May take blocks."""
        if self.prompt is None:
            self._begin(self._prefixes.fetching(), now_s)
        prompt = self.prompt
        if prompt is None:
            return None
        sequence = prompt.sequence
        return Candidate(
            sequence_id=sequence.sequence_id,
            num_tokens=self._stop - sequence.num_computed,
            arrival=prompt.received_s,
            num_computed=sequence.num_computed,
        )

    def has_to_yield(self) -> bool:
        """Whether somebody wants its blocks."""
        view = self._room.view()
        return view.starving or view.offer is not None

    def computed(self, num_tokens: int) -> None:
        """A step has read so many of it."""
        prompt = self.prompt
        assert prompt is not None, "it was in the step"
        sequence = prompt.sequence
        sequence.num_computed += num_tokens
        self.tokens_total += num_tokens
        self._prefixes.name_final(prompt)
        prompt.ahead_stop = sequence.num_computed // self._block_tokens

    def is_done(self) -> bool:
        """As much is read as was to be."""
        return self.prompt is not None and self.prompt.sequence.num_computed >= self._stop

    def has_overtaken(self) -> bool:
        """Nothing that the fetch may bring is wanted any more."""
        prompt = self.prompt
        return prompt is not None and prompt.fetch is not None and prompt.ahead_stop >= prompt.fetch.ticket.stop

    def note_overtaken(self) -> None:
        _OVERTAKEN.reached()

    def let_go(self) -> Prompt | None:
        """Its blocks become cached; it must not be in a step. Whose they were."""
        prompt, self.prompt = self.prompt, None
        if prompt is not None:
            self._prefixes.give_back(prompt)
        return prompt

    def _begin(self, prompts: Iterable[Prompt], now_s: float) -> None:
        if self.has_to_yield():
            return
        for prompt in prompts:
            fetch = prompt.fetch
            if fetch is None or prompt.doomed or fetch.read_limit(now_s) <= prompt.num_cached:
                continue
            limit = fetch.read_limit(now_s)
            found = self._prefixes.find(prompt)
            num_found = len(found.leading)
            # What is still on its way needs its own.
            needed = limit - num_found + fetch.ticket.stop - fetch.ticket.start + prompt.num_cached - prompt.num_held
            if num_found >= limit or not may_fetch(needed, self._room.view()):
                continue
            _READ_AHEAD.reached()
            self._prefixes.take(prompt, found, limit)
            if prompt.ahead_stop <= prompt.ahead_start:
                prompt.ahead_start = prompt.ahead_stop = num_found
            self._stop = limit * self._block_tokens
            self.prompt = prompt
            return
