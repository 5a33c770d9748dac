"""What all parts of a running study share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.layout import BlockLayout
    from simulator.heap.events import EventHeap
    from simulator.heap.moves import Moves
    from simulator.heap.recorder import Recorder
    from simulator.heap.request import Request
    from simulator.heap.results import Outcome
    from simulator.heap.spec import StudySpec
    from simulator.heap.store import Holder
    from simulator.heap.wires import Wires
    from simulator.heap.worker import Worker


@dataclass(slots=True, kw_only=True)
class Context:
    spec: StudySpec
    layout: BlockLayout
    #: Tokens of a block of the prefix caches; 0: nothing is known of shared prefixes.
    hash_block_tokens: int
    heap: EventHeap
    wires: Wires
    recorder: Recorder
    moves: Moves
    #: Reports the one end of a request.
    on_end: Callable[[Request, Outcome], None]
    #: Reports that the first token of a request was written.
    on_first_token: Callable[[Request], None]
    #: Reports that a worker refused a request, and after how many seconds it may be sent again.
    on_refused: Callable[[Request, float], None]
    #: Reports that something came into or left the prefixes of a worker or of the store.
    on_cache_changed: Callable[[Holder], None]
    #: Reports that a worker has read a prompt whole.
    on_read: Callable[[Request, Worker], None]
