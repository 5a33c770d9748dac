"""Codecs that failed on blocks: counted, and told now and then."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from kvstore.ssd.codec import BlockCodec

#: Between two lines: a codec that fails on one block is likely to fail on all.
TELL_INTERVAL_S = 60.0


class CodecFailures:
    """For any thread."""

    def __init__(self, clock: Clock, log: Callable[[str], None]) -> None:
        self._clock = clock
        self._log = log
        self._guard = threading.Lock()
        self._num_told = 0
        self._told_s: float | None = None
        #: Blocks that were kept as they are for it.
        self.num_blocks = 0

    def add(self, codec: BlockCodec, error: Exception) -> None:
        now_s = self._clock.now_s()
        with self._guard:
            self.num_blocks += 1
            if self._told_s is not None and now_s - self._told_s < TELL_INTERVAL_S:
                return
            count, self._num_told, self._told_s = self.num_blocks - self._num_told, self.num_blocks, now_s
        blocks = "a block is" if count == 1 else f"{count} blocks are"
        self._log(f"codec {codec.name} failed, {blocks} kept on disk without it: {error!r}")
