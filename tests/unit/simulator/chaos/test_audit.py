"""The auditor's judgement of answers made by hand, and the witness's of what workers and pulls do."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.errors import DeadlineExceeded, Internal, NoCapacity, TandemError, WorkerUnavailable
from contracts.ids import Attempt, BlockId, Incarnation, OwnerEpoch, RequestId, WorkerId
from contracts.messages import Peer
from contracts.requests import SamplingParams, TokenDelta
from engine.plan import SampleSpec, SequenceStep
from kvtransfer.ledger import BlockClass, Ledger
from simulator import Program, run
from simulator.chaos.audit import DEADLINE_SLACK_S, Auditor
from simulator.chaos.scenario import PATIENT_DEADLINE_S, Scenario, Weather
from simulator.chaos.witness import MAX_PROBLEMS, Witness
from simulator.clients import Answer, Ask, ask_for
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.engine import TokenKv, expected_tokens
from simulator.store import StoreDiskSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contracts.messages import Role
    from simulator.engine import BlockContent

ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
PROMPT = (1, 2, 3)
SAMPLING = SamplingParams(temperature=0.0, max_tokens=4)
RIGHT = expected_tokens(PROMPT, SAMPLING, 4)


def answer(
    token_ids: list[int],
    *,
    finish: str | None = None,
    error: TandemError | None = None,
    took_s: float | None = 1.0,
    deadline_s: float = 4.0,
    cancel_after: int | None = None,
) -> Answer:
    ask = Ask(at_s=0.0, token_ids=PROMPT, sampling=SAMPLING, deadline_s=deadline_s, cancel_after=cancel_after)
    return Answer(ask=ask, token_ids=token_ids, finish=finish, error=error, ended_s=took_s)


def judged(one: Answer, weather: Weather) -> list[str]:
    """The auditor's problems, without those that a cluster on which nothing ran cannot have."""
    scenario = Scenario(
        seed=1, weather=weather, cluster=ClusterSpec(roles=ROLES), asks=(one.ask,), faults=(), failpoints={}
    )
    found: list[str] = []

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, scenario.cluster) as cluster:
            auditor = Auditor(scenario, cluster, Witness())
            auditor.look()
            auditor.judge([one])
            found.extend(auditor.problems)

    run(main, seed=1)
    return found


GOOD = [
    answer(RIGHT, finish="length"),
    answer(RIGHT[:2], cancel_after=2),
    answer([], error=NoCapacity("full")),
]
BEARABLE = [
    answer(RIGHT[:2], error=WorkerUnavailable("gone")),
    answer(RIGHT[:2], error=NoCapacity("nobody has room for the replay")),
    answer(RIGHT[:1], error=DeadlineExceeded("late"), took_s=4.0),
]
BAD = {
    "token 1 is": answer([RIGHT[0], RIGHT[1] + 1, *RIGHT[2:]], finish="length"),
    "it ended (length) after 3 of 4 tokens": answer(RIGHT[:3], finish="length"),
    "it ended without a word after 2 tokens": answer(RIGHT[:2]),
    "it ended well and failed": answer(RIGHT, finish="length", error=WorkerUnavailable("after the end")),
    "not ended": answer(RIGHT[:2], took_s=None),
    "took 4.600 s, its deadline was 4 s": answer(RIGHT, finish="length", took_s=4.1 + DEADLINE_SLACK_S),
    "failed with internal: a bug": answer([], error=Internal("a bug")),
    "stood still for 59.999 s without a fault": answer(
        [], error=DeadlineExceeded("late"), took_s=PATIENT_DEADLINE_S, deadline_s=PATIENT_DEADLINE_S
    ),
}


@pytest.mark.parametrize("one", GOOD)
def test_what_may_always_be(one: Answer) -> None:
    assert judged(one, Weather.CALM) == []
    assert judged(one, Weather.ROUGH) == []


@pytest.mark.parametrize("one", BEARABLE)
def test_what_may_be_only_where_something_was_done(one: Answer) -> None:
    assert judged(one, Weather.ROUGH) == []
    assert len(judged(one, Weather.CALM)) == 1
    assert len(judged(one, Weather.SURVIVABLE)) == 1


@pytest.mark.parametrize("says", BAD)
def test_what_may_never_be(says: str) -> None:
    found = judged(BAD[says], Weather.ROUGH)
    assert len(found) == 1, found
    assert says in found[0]
    assert found[0].startswith("request 0: ")


def test_a_request_that_survives_all_may_not_even_be_refused() -> None:
    assert judged(answer([], error=NoCapacity("full")), Weather.SURVIVABLE) == [
        "request 0: failed with no_capacity: full"
    ]


def compared(*named: tuple[str, bytes, BlockContent]) -> list[str]:
    """The auditor's problems with what stands under keys in a cluster."""
    scenario = Scenario(
        seed=1, weather=Weather.CALM, cluster=ClusterSpec(roles=ROLES), asks=(), faults=(), failpoints={}
    )
    found: list[str] = []

    class Standing(SimulatedCluster):
        def named_blocks(self) -> Iterator[tuple[str, bytes, BlockContent]]:
            return iter(named)

    async def main(program: Program) -> None:
        async with Standing(program, scenario.cluster) as cluster:
            auditor = Auditor(scenario, cluster, Witness())
            auditor.compare_copies()
            auditor.compare_copies()
            found.extend(problem.split(" s: ")[1] for problem in auditor.problems)

    run(main, seed=1)
    return found


def kv(position: int, token_id: int = 7) -> TokenKv:
    return TokenKv(position=position, token_id=token_id, prefix_hash=position)


def test_copies_of_a_block_are_equal_wherever_they_stand() -> None:
    assert compared(("a", b"1", (kv(0), kv(1))), ("b", b"1", (kv(0), kv(1))), ("b", b"2", (kv(2), kv(3)))) == []
    assert compared(("a", b"1", (kv(0), kv(1))), ("b", b"1", (kv(0), kv(1, 8)))) == ["b and a have one key, and differ"]
    assert compared(("a", b"1", (kv(0), None))) == ["a has a key, and is not written to the end"]


def test_all_that_has_a_key_is_compared() -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=ROLES, stores=("s0",), store_disk=StoreDiskSpec())
        async with SimulatedCluster(program, spec) as cluster:
            prompt = tuple(range(40))
            one = await ask_for(cluster.core, Ask(at_s=0.0, token_ids=prompt, sampling=SAMPLING))
            assert one.error is None
            await asyncio.sleep(5.0)
            named = list(cluster.named_blocks())
        (key, content) = next((key, content) for where, key, content in named if where == "the disk of s0")
        places = [where for where, other, _ in named if other == key]
        assert [place.split()[-1] for place in places] == ["p0@1", "d0@1", "s0@1", "s0"]
        assert [slot.token_id for slot in content if slot is not None] == list(prompt[:8])

    run(main, seed=1)


# --- the witness ----------------------------------------------------------------------------------------


def step(start: int, num_tokens: int, output_index: int | None = None) -> SequenceStep:
    sample = None
    if output_index is not None:
        sample = SampleSpec(
            params=SAMPLING, output_index=output_index, history=[*PROMPT, *RIGHT], num_prompt_tokens=len(PROMPT)
        )
    blocks = (BlockId(5), BlockId(6))
    return SequenceStep(sequence_id=1, token_ids=tuple(range(num_tokens)), start=start, block_ids=blocks, sample=sample)


def delta(attempt: int, index: int, num_tokens: int) -> TokenDelta:
    return TokenDelta(
        request_id=RequestId("r"),
        attempt=Attempt(attempt),
        owner_epoch=OwnerEpoch(1),
        index=index,
        token_ids=tuple(range(num_tokens)),
    )


def peer(incarnation: int) -> Peer:
    return Peer(worker_id=WorkerId("d0"), incarnation=Incarnation(incarnation), address="d0:1")


def test_a_wrong_token_is_told_where_it_is_computed() -> None:
    witness = Witness()
    for index, token_id in enumerate(RIGHT):
        witness.stepped("d0@1", step(3 + index, 1, index), 4, token_id)
    assert witness.problems == []
    witness.stepped("d0@1", step(3, 1, 0), 4, RIGHT[0] + 1)
    assert witness.problems == [f"d0@1 computes for sequence 1: token 0 is {RIGHT[0] + 1}, not {RIGHT[0]}"]


def test_a_token_is_computed_once_by_each_life_and_try() -> None:
    witness = Witness()
    for incarnation, attempt, index, count in [(1, 1, 0, 2), (1, 1, 2, 1), (2, 1, 0, 1), (1, 2, 0, 1), (1, 1, 3, 0)]:
        witness.heard(peer(incarnation), delta(attempt, index, count), 0.0)
    assert witness.problems == []
    witness.heard(peer(1), delta(1, 1, 1), 0.0)
    assert witness.problems == ["d0@1: token 1 of r, attempt 1, is computed twice"]


def test_tokens_that_come_long_after_their_request_was_forgotten_are_told_once() -> None:
    witness = Witness(stray_limit_s=1.5)
    witness.heard(peer(1), delta(1, 0, 1), 9.0)
    witness.forgotten(RequestId("r"), 10.0)
    witness.forgotten(RequestId("another"), 0.0)
    witness.heard(peer(1), delta(1, 1, 1), 11.5)
    assert witness.problems == []
    witness.heard(peer(1), delta(1, 2, 1), 11.625)
    witness.heard(peer(1), delta(1, 3, 1), 12.0)
    assert witness.problems == ["d0@1: token 2 of r comes 1.625 s after it was forgotten"]


def test_where_a_cancel_may_be_lost_tokens_may_come_for_ever() -> None:
    witness = Witness()
    witness.forgotten(RequestId("r"), 10.0)
    witness.heard(peer(1), delta(1, 0, 1), 1000.0)
    assert witness.problems == []


@pytest.mark.parametrize("block_class", BlockClass)
def test_pulls_write_what_they_were_given_only(block_class: BlockClass) -> None:
    witness = Witness()
    witness.landed("d0@1", BlockId(3), block_class, BlockClass.OFFERED)
    given = block_class in (BlockClass.RESERVED, BlockClass.QUARANTINED)
    assert bool(witness.problems) != given


def test_nothing_is_computed_from_what_was_let_go_before_it_was_read() -> None:
    witness = Witness()
    witness.landed("d0@1", BlockId(5), BlockClass.RESERVED, BlockClass.FREE)
    witness.stepped("d1@1", step(3, 2), 4, None)
    assert witness.problems == [], "that is another worker's block"
    witness.stepped("d0@1", step(3, 2), 4, None)
    assert witness.problems == ["d0@1 reads block 5, which was pulled when its holder had let it go"]


def test_what_was_let_go_may_be_overwritten() -> None:
    witness = Witness()
    for block in (5, 6):
        witness.landed("d0@1", BlockId(block), BlockClass.RESERVED, BlockClass.FREE)
    witness.landed("d0@1", BlockId(5), BlockClass.RESERVED, BlockClass.OFFERED)
    witness.stepped("d0@1", step(3, 4), 4, None)
    witness.stepped("d0@1", step(6, 1), 4, None)
    assert witness.problems == []


@pytest.mark.parametrize("block_class", BlockClass)
def test_disks_touch_what_somebody_holds_only(block_class: BlockClass) -> None:
    is_held = block_class in (BlockClass.OWNED, BlockClass.OFFERED)
    reads, writes = Witness(), Witness()
    writes.loaded("s0@1", BlockId(3), block_class, is_named=False)
    reads.spilled("s0@1", BlockId(3), block_class)
    assert bool(reads.problems) == bool(writes.problems) != is_held


def test_a_disk_writes_nothing_that_can_be_found() -> None:
    witness = Witness()
    witness.loaded("s0@1", BlockId(3), BlockClass.OWNED, is_named=True)
    assert witness.problems == ["s0@1: the disk writes block 3, which has a key already"]


def test_what_was_let_go_before_it_was_read_gets_no_key() -> None:
    witness, ledger = Witness(), Ledger(8)
    blocks = ledger.allocate("store", 3)
    assert blocks is not None
    for block in blocks:
        witness.landed("s0@1", block, BlockClass.RESERVED, BlockClass.CACHED)
    witness.loaded("s0@1", blocks[0], BlockClass.OWNED, is_named=False)
    for block in blocks[:2]:
        ledger.set_key(block, bytes([block]))
    witness.look({"s0@1": ledger, "s0@2": Ledger(8)})
    witness.look({"s0@1": ledger})
    assert witness.problems == [f"s0@1 has named block {blocks[1]}, which was pulled when its holder had let it go"]


def test_what_is_told_is_bounded() -> None:
    witness = Witness()
    for number in range(2 * MAX_PROBLEMS):
        witness.landed("d0@1", BlockId(number), BlockClass.FREE, BlockClass.OFFERED)
    assert len(witness.problems) == MAX_PROBLEMS
