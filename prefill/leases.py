"""The leases of prompts that are read for other workers: opened with the prompt, and in the books until they end.

What is read whole and not taken is counted, because it has a budget (`prefill.admission`). Not thread-safe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from contracts.errors import TandemError
from contracts.failpoints import RarePath
from contracts.messages import Seal
from prefill.block_tally import BlockTally

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import LeaseId
    from contracts.messages import HandoffReply, LeaseTerms, Peer
    from contracts.requests import GenerateRequest, TokenDelta
    from engine.room import Room
    from kvtransfer import HolderService, LeaseOutcome
    from prefill.prompts import Prompt

#: How long after its deadline a prompt's lease may stand at most: `PrefillQueue.expire` is called more often.
DEADLINE_SLACK_S = 5.0

_PARTIAL_TAIL = RarePath("prefill.partial_tail", "a lease was sealed whose last block is not full")


class SendOffer(Protocol):
    """Pushes an offer to its reader."""

    async def __call__(
        self, reader: Peer, terms: LeaseTerms, request: GenerateRequest, timeout_s: float
    ) -> HandoffReply: ...


class PromptLeases:
    def __init__(
        self,
        *,
        holder: HolderService,
        room: Room,
        block_tokens: int,
        send_offer: SendOffer,
        on_ended: Callable[[Prompt, LeaseId, LeaseOutcome, str], None],
    ) -> None:
        """`on_ended` hears once of each lease that was not withdrawn how it ended; it is out of the books then."""
        self._holder = holder
        self._room = room
        self._block_tokens = block_tokens
        self._send_offer = send_offer
        self._on_ended = on_ended
        #: All and only prompts whose lease has not ended.
        self._prompts: dict[LeaseId, Prompt] = {}
        #: Blocks of all of them.
        self.lent = BlockTally()
        #: Those that are sealed, and their blocks.
        self.untaken_count = 0
        self.untaken = BlockTally()

    def open(self, prompt: Prompt, reader: Peer, now_s: float) -> None:
        """Offers the prompt's blocks to who will write its answer; those found at its beginning are final already."""
        request = prompt.sequence.request

        async def send(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            try:
                reply = await self._send_offer(reader, terms, request, timeout_s)
            except TandemError as error:
                prompt.refusal = error
                raise
            prompt.refusal, prompt.accepted = None, True
            return reply

        # A reader without room is asked again until the request's deadline; `expire` comes first and says so.
        max_age_s = prompt.sequence.deadline_s - now_s + DEADLINE_SLACK_S
        lease_id = self._holder.open(
            prompt.sequence.block_ids,
            reader,
            send_offer=send,
            on_ended=self._ended,
            num_final_blocks=prompt.num_cached,
            max_age_s=max_age_s,
        )
        prompt.lease_id = lease_id
        prompt.lent = tuple(prompt.sequence.block_ids)
        self._prompts[lease_id] = prompt
        self._room.lend(self.lent.add(prompt.lent))

    def advance(self, prompt: Prompt, num_final_blocks: int) -> None:
        """So many leading blocks will never be written again. Of a prompt without a lease: nothing."""
        if prompt.lease_id is not None:
            self._holder.advance(prompt.lease_id, num_final_blocks)

    def seal(self, prompt: Prompt, first_delta: TokenDelta) -> None:
        """It is read whole; only the lease needs its blocks from now on."""
        assert prompt.lease_id is not None, "one that this worker writes itself is not sealed"
        sequence = prompt.sequence
        if sequence.num_computed % self._block_tokens:
            _PARTIAL_TAIL.reached()
        prompt.sealed = True
        self.untaken_count += 1
        self.untaken.add(prompt.lent)
        seal = Seal(num_tokens=sequence.num_computed, first_delta=first_delta)
        self._holder.seal(prompt.lease_id, len(sequence.block_ids), seal)

    def withdraw(self, prompt: Prompt, reason: str) -> None:
        """Takes a lease back, and out of the books. Of a prompt without one: nothing."""
        if prompt.lease_id is not None:
            lease_id = prompt.lease_id
            self._remove(lease_id)
            self._holder.withdraw(lease_id, reason)

    def _remove(self, lease_id: LeaseId) -> Prompt | None:
        """None where it is out already."""
        prompt = self._prompts.pop(lease_id, None)
        if prompt is not None:
            prompt.lease_id = None
            self._room.take_back(self.lent.remove(prompt.lent))
            if prompt.sealed:
                self.untaken_count -= 1
                self.untaken.remove(prompt.lent)
            prompt.lent = ()
        return prompt

    def _ended(self, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
        """The holder's one report of how a lease ended; its pins are dropped already."""
        prompt = self._remove(lease_id)
        if prompt is not None:
            self._on_ended(prompt, lease_id, outcome, reason)
