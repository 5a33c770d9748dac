"""Sequences that each write one token in every step, as a whole: their context and their blocks after any number of
steps, without looking at each.

A member's length is its offset plus the steps done, so n members hold `sum(offset) + n * steps` tokens. Its blocks
are `ceil((offset + steps) / b)`; how many members begin a block in a step depends on the offsets modulo b alone, so
counting members by that residue is enough.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simulator.heap.request import Request


class Lockstep:
    """A group of decoding sequences. `ahead` is in steps from now: the step with `ahead` = 0 is the next."""

    __slots__ = ("_block_tokens", "_finishes", "_offsets", "_residues", "_whole_blocks", "members", "size", "step")

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        #: Steps done.
        self.step = 0
        #: By sequence id.
        self.members: dict[int, Request] = {}
        self.size = 0
        #: Sums over members of offset and of offset // block_tokens; members by offset % block_tokens.
        self._offsets = 0
        self._whole_blocks = 0
        self._residues = [0] * block_tokens
        #: (last step, sequence id, membership, member) of each member, and of some that left.
        self._finishes: list[tuple[int, int, int, Request]] = []

    def join(self, request: Request) -> None:
        """From the next step on."""
        request.offset = request.num_tokens - self.step
        request.finish_step = self.step + request.output_tokens - request.num_written
        request.membership += 1
        self.members[request.sequence_id] = request
        self._count(request.offset, 1)
        heappush(self._finishes, (request.finish_step, request.sequence_id, request.membership, request))

    def leave(self, request: Request) -> None:
        """After the last step done; brings `num_written` up to date."""
        del self.members[request.sequence_id]
        request.membership += 1
        request.num_written = request.output_tokens - (request.finish_step - self.step)
        self._count(request.offset, -1)

    def _count(self, offset: int, sign: int) -> None:
        whole, residue = divmod(offset, self._block_tokens)
        self.size += sign
        self._offsets += sign * offset
        self._whole_blocks += sign * whole
        self._residues[residue] += sign

    def context_tokens(self, ahead: int) -> int:
        """Sum of the lengths that the step reads and writes."""
        return self._offsets + self.size * (self.step + ahead)

    def num_blocks(self, ahead: int) -> int:
        """Blocks of all members in that step."""
        whole, rest = divmod(self.step + ahead, self._block_tokens)
        residues = self._residues
        blocks = self._whole_blocks + self.size * (whole + 1)
        return blocks + sum(residues[self._block_tokens - rest + 1 :]) if rest else blocks - residues[0]

    def blocks_of(self, request: Request, ahead: int) -> int:
        """Blocks of one member in that step."""
        return -(-(request.offset + self.step + ahead) // self._block_tokens)

    def steps_within(self, num_blocks: int, most: int) -> int:
        """The last `ahead`, at most `most`, of a step in which all members' blocks are no more than `num_blocks`; the
        next step (0) must be."""
        spare = num_blocks - self.num_blocks(0)
        cycles, spare = divmod(spare, self.size)
        ahead = cycles * self._block_tokens
        while ahead < most:
            spare -= self._residues[-(self.step + ahead) % self._block_tokens]
            if spare < 0:
                break
            ahead += 1
        return min(ahead, most)

    def steps_to_finish(self) -> int:
        """How many steps until the first member has written its last token; there must be a member."""
        finishes = self._finishes
        while finishes[0][2] != finishes[0][3].membership:
            heappop(finishes)
        return finishes[0][0] - self.step

    def finished(self) -> list[Request]:
        """Members that have written their last token, by sequence id."""
        finishes = self._finishes
        found: list[Request] = []
        while finishes and finishes[0][0] <= self.step:
            _, _, membership, request = heappop(finishes)
            if membership == request.membership:
                found.append(request)
        return found
