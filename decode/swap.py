"""Preemption by swap: what an answer loses is kept by the machine's store, and comes back from there where that is
faster than reading it again.

An answer that loses its blocks offers those with keys to the store at once; they are cached, so that many are still
here when they are copied. When its turn comes again, what stands here is shared, and the rest is fetched, or read:
whichever is expected to take less time. (vLLM, SOSP'23, section 4.5, has both; it swaps by whole sequences and waits
for it.)

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from contracts.failpoints import RarePath

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import BlockId
    from contracts.messages import Peer
    from decode.answers import Answer
    from kvstore.fetch_ends import FetchEnd, StartFetch
    from kvstore.write_back import Keep

#: Where nothing is known of the store a fetch is tried for what takes longer to read.
WORTH_TRYING_S = 0.02
#: The same where it is not known either what reading takes, and what that is taken for then.
WORTH_TRYING_TOKENS = 48
ASSUMED_READING_S = 0.5
#: After one that took longer than reading none is tried for so long; twice as long each further time.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0

_SWAPPED_OUT = RarePath("decode.swapped_out", "what a preempted answer lost was offered to the store")


class Swaps:
    def __init__(
        self,
        *,
        keep: Keep,
        store: Callable[[], Peer | None],
        start_fetch: StartFetch,
        expected_fetch_s: Callable[[Peer, int], float | None],
        reading_s: Callable[[int, int], float],
        block_tokens: int,
    ) -> None:
        """`reading_s`: what reading so many tokens behind so many others takes; 0 where that is not known."""
        self._keep = keep
        self._store = store
        self._start_fetch = start_fetch
        self._expected_fetch_s = expected_fetch_s
        self._reading_s = reading_s
        self._block_tokens = block_tokens
        #: Until when nothing is fetched, and how long the next pause is.
        self._paused_until_s = -math.inf
        self._pause_s = FIRST_PAUSE_S
        #: Blocks that came back, since the start.
        self.swapped_in_blocks_total = 0

    def lose(self, answer: Answer) -> None:
        """It is about to lose its blocks."""
        answer.swapped = False
        if self._store() is not None and answer.num_named:
            _SWAPPED_OUT.reached()
            self._keep(answer.chain, answer.num_named, answer.sequence.request)
            answer.swapped = True

    def fetch(self, answer: Answer, found: list[BlockId], now_s: float, on_end: Callable[[], None]) -> bool:
        """Begins to fetch what is not among the leading blocks `found` here, if that is worth it; `on_end` is called
        when it has ended, however it did, unless it was left. Once for each time that it lost its blocks."""
        store, was_swapped, answer.swapped = self._store(), answer.swapped, False
        stop = (len(answer.sequence.token_ids) - 1) // self._block_tokens
        stop = min(stop, answer.num_lost // self._block_tokens)
        missing = stop - len(found)
        if not was_swapped or store is None or missing <= 0 or now_s < self._paused_until_s:
            return False
        read_s = self._reading_s(missing * self._block_tokens, len(found) * self._block_tokens)
        if read_s <= 0.0:
            read_s = ASSUMED_READING_S if missing * self._block_tokens >= WORTH_TRYING_TOKENS else 0.0
        fetch_s = self._expected_fetch_s(store, missing)
        if read_s <= (WORTH_TRYING_S if fetch_s is None else fetch_s):
            return False

        def ended(end: FetchEnd) -> None:
            answer.fetch = None
            num_blocks = end.stop - end.start
            self.swapped_in_blocks_total += num_blocks
            if num_blocks:
                self._pause_s = FIRST_PAUSE_S
            # Else the store did not come to copy them: it says so at once, and that costs no pause.
            on_end()

        answer.fetch = self._start_fetch(answer.chain, found, stop, store, ended)
        # Longer than reading it is not waited for.
        answer.fetch_late_s = now_s + read_s
        return answer.fetch is not None

    def is_late(self, answer: Answer, now_s: float) -> bool:
        """Reading would have been faster: its fetch is given up."""
        if answer.fetch is None or now_s < answer.fetch_late_s:
            return False
        self.leave(answer)
        self._paused_until_s = now_s + self._pause_s
        self._pause_s = min(2.0 * self._pause_s, LONGEST_PAUSE_S)
        return True

    def leave(self, answer: Answer) -> None:
        """It has ended."""
        if answer.fetch is not None:
            answer.fetch.leave()
            answer.fetch = None
