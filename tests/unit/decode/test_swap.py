"""When what a preempted answer lost is fetched from the store, and when it is read again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from contracts.ids import Incarnation, WorkerId
from contracts.messages import Peer
from decode.answers import Answer
from decode.swap import FIRST_PAUSE_S, Swaps
from engine.sequence import Sequence
from kvstore.fetch_ends import FetchEnd, FetchTicket
from tests.support.roles import BLOCK_TOKENS, generate

if TYPE_CHECKING:
    from collections.abc import Callable

STORE = Peer(worker_id=WorkerId("store-node"), incarnation=Incarnation(1), address="store:1")
#: Full blocks of the answer's tokens but for the last of these, which is computed in any case.
NUM_LOST = 4
READ_S = 0.5


@dataclass
class World:
    """A store, and what is asked of it."""

    store: Peer | None = STORE
    fetch_s: float | None = None
    read_s: float = READ_S
    kept: list[int] = field(default_factory=list[int])
    #: The fetches that were begun: their first and last position, and how they are ended.
    begun: list[tuple[int, int, Callable[[FetchEnd], None]]] = field(
        default_factory=list[tuple[int, int, "Callable[[FetchEnd], None]"]]
    )
    left: int = 0
    heard: int = 0

    def __post_init__(self) -> None:
        self.swaps = Swaps(
            keep=lambda chain, num_blocks, request: self.kept.append(num_blocks),
            store=lambda: self.store,
            start_fetch=self._start,
            expected_fetch_s=lambda store, num_blocks: self.fetch_s,
            reading_s=lambda num_tokens, num_computed: self.read_s,
            block_tokens=BLOCK_TOKENS,
        )
        tokens = list(range(NUM_LOST * BLOCK_TOKENS + 1))
        request = generate(prompt=NUM_LOST * BLOCK_TOKENS)
        sequence = Sequence(sequence_id=1, request=request, deadline_s=100.0, token_ids=tokens)
        chain: Any = []
        self.answer = Answer(sequence=sequence, chain=chain, num_named=NUM_LOST, adopted_s=0.0, handoff_s=None)
        self.answer.num_lost = NUM_LOST * BLOCK_TOKENS

    def _start(
        self, chain: Any, local: list[Any], stop: int, source: Peer, waiter: Callable[[FetchEnd], None], **_: Any
    ) -> FetchTicket:
        self.begun.append((len(local), stop, waiter))
        return FetchTicket(start=len(local), stop=stop, leave=self._leave)

    def _leave(self) -> None:
        self.left += 1

    def fetch(self, found: int = 0, now_s: float = 0.0) -> bool:
        blocks: Any = list(range(found))
        return self.swaps.fetch(self.answer, blocks, now_s, self._hear)

    def _hear(self) -> None:
        self.heard += 1

    def end(self, num_blocks: int, now_s: float = 0.1) -> None:
        first, _, waiter = self.begun[-1]
        waiter(FetchEnd(ended_s=now_s, start=first, tier_blocks={"dram": num_blocks} if num_blocks else {}))


def test_what_is_lost_is_offered_and_what_is_not_here_is_fetched_once() -> None:
    world = World()
    world.swaps.lose(world.answer)
    assert world.kept == [NUM_LOST]
    assert world.fetch(found=1)
    assert world.begun[0][:2] == (1, NUM_LOST)
    world.end(NUM_LOST - 1)
    assert (world.answer.fetch, world.heard, world.swaps.swapped_in_blocks_total) == (None, 1, NUM_LOST - 1)
    assert not world.fetch(found=1)


@pytest.mark.parametrize(
    "world",
    [World(store=None), World(fetch_s=2 * READ_S), World(read_s=0.001)],
    ids=["no store", "the store is slower", "little to read"],
)
def test_else_it_is_read(world: World) -> None:
    world.swaps.lose(world.answer)
    assert not world.fetch()
    assert world.begun == []


def test_nothing_is_fetched_where_everything_stands_here_or_nothing_was_kept() -> None:
    world = World()
    assert not world.fetch()
    world.answer.num_named = 0
    world.swaps.lose(world.answer)
    assert world.kept == []
    assert not world.fetch()
    world.answer.num_named = NUM_LOST
    world.swaps.lose(world.answer)
    assert not world.fetch(found=NUM_LOST)


def test_a_fetch_that_takes_longer_than_reading_is_left_and_none_is_begun_for_a_while() -> None:
    world = World()
    world.swaps.lose(world.answer)
    assert world.fetch(now_s=10.0)
    assert not world.swaps.is_late(world.answer, 10.0 + READ_S - 0.01)
    assert world.swaps.is_late(world.answer, 10.0 + READ_S)
    assert (world.answer.fetch, world.left) == (None, 1)
    world.swaps.lose(world.answer)
    assert not world.fetch(now_s=10.0 + READ_S + FIRST_PAUSE_S - 0.01)
    world.swaps.lose(world.answer)
    assert world.fetch(now_s=10.0 + READ_S + FIRST_PAUSE_S)


def test_a_store_that_has_nothing_costs_no_pause() -> None:
    world = World()
    world.swaps.lose(world.answer)
    assert world.fetch()
    world.end(0)
    world.swaps.lose(world.answer)
    assert world.fetch()


@pytest.mark.parametrize(("num_blocks", "is_fetched"), [(NUM_LOST, False), (48 // BLOCK_TOKENS, True)])
def test_where_nothing_is_known_a_long_answer_is_worth_a_try(num_blocks: int, is_fetched: bool) -> None:
    world = World(read_s=0.0)
    world.answer.sequence.token_ids = list(range(num_blocks * BLOCK_TOKENS + 1))
    world.answer.num_lost = num_blocks * BLOCK_TOKENS
    world.swaps.lose(world.answer)
    assert world.fetch() is is_fetched
