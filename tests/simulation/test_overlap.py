"""The KV of a prompt leaves while the prompt is still being read: proved by byte counts, not by times.

A prompt of n tokens is read in chunks of k. After each chunk the blocks that are full are final and are pulled
while the next chunk computes, so when the last chunk's step begins its work, at least the blocks filled by the
chunks before the one just computed are with the reader, and by the time that step ends

    floor((c - 1) * k / b) of ceil(n / b) blocks      (c chunks, b tokens a block)

are. Where chunks end with a block and the prompt with a chunk, that is (c - 1) / c of the bytes. Elsewhere the
block that a chunk leaves half filled is written again, so it travels with the next one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.requests import SamplingParams
from gateway.core import Submission
from kvtransfer.memory import PullFate, PullInfo
from simulator import Program, StepTiming, expected_tokens, run
from simulator.cluster import ClusterSpec, SimulatedCluster

if TYPE_CHECKING:
    from contracts.messages import Role

ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
#: A step takes this long, whatever is in it; a pull a small part of it.
STEP_S = 0.1
PULL_S = 0.002
OUTPUT = 3
#: By then a started worker knows its peers.
PROBED_S = 5.0


@dataclass(slots=True)
class Wire:
    """What crossed it, and when: (asked, landed, bytes) of each pull, in order."""

    pulls: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])

    def fate(self, info: PullInfo) -> PullFate:
        now_s = asyncio.get_running_loop().time()
        self.pulls.append((now_s, now_s + PULL_S, info.num_bytes))
        return PullFate(duration_s=PULL_S)

    def landed_by(self, time_s: float) -> int:
        return sum(num_bytes for _, landed_s, num_bytes in self.pulls if landed_s <= time_s)

    @property
    def total(self) -> int:
        return sum(num_bytes for _, _, num_bytes in self.pulls)


@dataclass(frozen=True, slots=True)
class Reading:
    """How one prompt was read and moved."""

    wire: Wire
    #: When the first token reached the gateway: after the last chunk's step.
    first_token_s: float
    block_bytes: int


def read(num_tokens: int, *, chunk_tokens: int, block_tokens: int) -> Reading:
    """Serves one request of that prompt on an otherwise idle cluster; its tokens are the right ones."""

    async def main(program: Program) -> Reading:
        wire = Wire()
        spec = ClusterSpec(
            roles=ROLES,
            num_blocks=256,
            max_context_tokens=4096,
            block_tokens=block_tokens,
            max_batch_tokens=chunk_tokens,
            timing=StepTiming(floor_s=STEP_S, per_new_token_s=0, per_context_token_s=0, per_sequence_s=0),
            fate=wire.fate,
        )
        prompt = tuple(program.rng("prompt").randrange(1000) for _ in range(num_tokens))
        sampling = SamplingParams(temperature=0.0, max_tokens=OUTPUT)
        times: list[float] = []
        tokens: list[int] = []
        async with SimulatedCluster(program, spec) as cluster:
            # Workers measure the way to each other first.
            await asyncio.sleep(PROBED_S)
            wire.pulls.clear()
            submission = Submission(token_ids=prompt, sampling=sampling, deadline_s=600.0)
            async with cluster.core.submit(submission) as stream:
                async for delta in stream:
                    times.append(asyncio.get_running_loop().time())
                    tokens.extend(delta.token_ids)
            audits = await cluster.audits()
        assert tokens == expected_tokens(prompt, sampling, OUTPUT)
        assert all(audit.problems == () for audit in audits.values())
        block_bytes = 2 * 1 * 1 * 2 * 4 * block_tokens
        return Reading(wire=wire, first_token_s=times[0], block_bytes=block_bytes)

    return run(main, seed=1)


def check_overlap(num_tokens: int, chunk_tokens: int, block_tokens: int) -> None:
    reading = read(num_tokens, chunk_tokens=chunk_tokens, block_tokens=block_tokens)
    num_blocks = -(-num_tokens // block_tokens)
    assert reading.wire.total == num_blocks * reading.block_bytes, "every block crosses once"
    num_chunks = -(-num_tokens // chunk_tokens)
    # The first token leaves when the last step ends; a message takes far less than half of one.
    in_last_step_s = reading.first_token_s - STEP_S / 2
    early_blocks = (num_chunks - 1) * chunk_tokens // block_tokens
    assert reading.wire.landed_by(in_last_step_s) == early_blocks * reading.block_bytes
    # And each chunk's blocks crossed during the next chunk, not later.
    for done in range(1, num_chunks):
        in_next_step_s = in_last_step_s - (num_chunks - 1 - done) * STEP_S
        assert reading.wire.landed_by(in_next_step_s) == done * chunk_tokens // block_tokens * reading.block_bytes


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("chunk_tokens", "block_tokens"), [(16, 16), (32, 8), (64, 16), (128, 16)])
def test_of_c_chunks_all_bytes_but_one_cth_have_left_before_the_last_is_computed(
    num_chunks: int, chunk_tokens: int, block_tokens: int
) -> None:
    num_tokens = num_chunks * chunk_tokens
    reading = read(num_tokens, chunk_tokens=chunk_tokens, block_tokens=block_tokens)
    landed = reading.wire.landed_by(reading.first_token_s - STEP_S / 2)
    assert reading.wire.total == num_tokens // block_tokens * reading.block_bytes
    assert landed * num_chunks == reading.wire.total * (num_chunks - 1)


@pytest.mark.parametrize(
    ("num_tokens", "chunk_tokens", "block_tokens"),
    [(100, 24, 16), (97, 32, 16), (130, 48, 32), (7, 2, 4), (33, 16, 16), (64, 10, 64)],
)
def test_where_chunks_and_blocks_do_not_meet_every_full_block_has_left(
    num_tokens: int, chunk_tokens: int, block_tokens: int
) -> None:
    check_overlap(num_tokens, chunk_tokens, block_tokens)


@settings(max_examples=25)
@given(
    num_tokens=st.integers(1, 400), chunk_tokens=st.integers(8, 128), block_tokens=st.sampled_from([1, 4, 7, 16, 32])
)
def test_whatever_the_sizes_the_bound_is_exact(num_tokens: int, chunk_tokens: int, block_tokens: int) -> None:
    if -(-num_tokens // block_tokens) <= 200:
        check_overlap(num_tokens, chunk_tokens, block_tokens)
