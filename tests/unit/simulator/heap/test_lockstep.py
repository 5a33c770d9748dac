"""A group counted by residues against its members looked at one by one."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulator.heap.lockstep import Lockstep
from simulator.heap.request import Request

BLOCK_TOKENS = 4
MEMBERS = st.lists(st.tuples(st.integers(1, 40), st.integers(2, 30)), min_size=1, max_size=12)


def group_of(shapes: list[tuple[int, int]], *, steps_before: int) -> tuple[Lockstep, list[Request]]:
    """Members by (prompt, output), each with its first token; they join one after the other."""
    group = Lockstep(BLOCK_TOKENS)
    members: list[Request] = []
    for index, (prompt_tokens, output_tokens) in enumerate(shapes):
        member = Request(index, 0.0, prompt_tokens, output_tokens, 0.0)
        member.sequence_id, member.num_written = index, 1
        group.step += steps_before
        group.join(member)
        members.append(member)
    return group, members


def blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_TOKENS)


@given(shapes=MEMBERS, ahead=st.integers(0, 40))
def test_context_and_blocks_are_the_members(shapes: list[tuple[int, int]], ahead: int) -> None:
    group, members = group_of(shapes, steps_before=0)
    lengths = [prompt_tokens + 1 + ahead for prompt_tokens, _ in shapes]
    assert group.context_tokens(ahead) == sum(lengths)
    assert group.num_blocks(ahead) == sum(map(blocks_for, lengths))
    assert [group.blocks_of(member, ahead) for member in members] == [blocks_for(length) for length in lengths]


@given(shapes=MEMBERS, spare=st.integers(0, 60), most=st.integers(0, 100))
def test_steps_within_blocks_are_those_that_fit(shapes: list[tuple[int, int]], spare: int, most: int) -> None:
    group, _ = group_of(shapes, steps_before=0)
    limit = group.num_blocks(0) + spare
    found = group.steps_within(limit, most)
    assert 0 <= found <= most
    assert group.num_blocks(found) <= limit
    assert found == most or group.num_blocks(found + 1) > limit


@given(shapes=MEMBERS, steps_before=st.integers(0, 3), leaving=st.data())
def test_members_finish_and_leave_with_what_they_wrote(
    shapes: list[tuple[int, int]], steps_before: int, leaving: st.DataObject
) -> None:
    # Each joins when the others have gone some steps already: offsets may be negative.
    group, members = group_of(shapes, steps_before=0)
    early = leaving.draw(st.sampled_from(members))
    wanted = min(each.output_tokens - 1 for each in members)
    assert group.steps_to_finish() == wanted
    group.step += min(wanted, steps_before)
    done = min(wanted, steps_before)
    group.leave(early)
    assert early.num_written == 1 + done
    finished: dict[int, int] = {}
    while group.size:
        steps = group.steps_to_finish()
        group.step += steps
        done += steps
        for member in group.finished():
            group.leave(member)
            assert member.num_written == member.output_tokens
            finished[member.row] = done
    assert finished == {each.row: each.output_tokens - 1 for each in members if each is not early}
    assert group.context_tokens(7) == group.num_blocks(7) == 0
