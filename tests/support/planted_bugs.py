"""Classic bugs of disaggregated serving, planted in the production classes for the time of a trial.

Each is a subclass as a tired developer would have written it, put in the place of the class that a worker is made
of; nothing in production code knows of it. `python -m tests.support.planted_bugs --bug NAME --seeds N` says which
chaos seed finds it first, and by what.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import coordinator.autoscaler
import coordinator.pool_views
import decode.batch
import kvtransfer.holder_service
import kvtransfer.reader_service
import prefill.queue
import worker.shell
import worker.store_offers
import worker.store_shell
from contracts.errors import TandemError
from contracts.ids import LeaseId
from contracts.messages import ConfirmReply
from coordinator.policy.scaling import decide
from decode import DecodeBatch
from decode.prefixes import AnswerPrefixes
from engine.sequence import request_key
from kvstore.prefix_cache import PrefixCache
from kvstore.tiers.machine import StoreMachine
from kvstore.write_back import Wanted, WriteBack
from kvtransfer.holder import Holder
from kvtransfer.holder_events import Answer
from kvtransfer.reader import Reader
from kvtransfer.reader_events import StopPull
from prefill import PrefillQueue
from prefill.turns import PromptTurns
from simulator.chaos import Verdict, draw, try_seed
from worker.registration import Registration

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from types import ModuleType

    from contracts.ids import BlockId
    from contracts.messages import ConfirmRequest, PrefillRequest
    from coordinator.policy.scaling_terms import PoolView, ScaleDecision, ScaleMemory, ScaleRules, StartingWorker
    from decode.incoming import Incoming
    from engine.plan import Sampled
    from kvstore.tiers.events import ReadDisk
    from kvstore.write_back import WriteBackEvent, WriteBackInstruction
    from kvtransfer.holder_events import Refuse
    from kvtransfer.reader_events import AbortReason, ReaderInstruction
    from kvtransfer.reader_lease import ReaderLease
    from prefill.prefixes import Found
    from prefill.prompts import Prompt
    from simulator.cluster import ClusterSpec


class SkipsGenerationCheck(Holder):
    """Confirms whatever it is asked: the lease may have ended and its blocks belong to others by now.

    SGLang #24527 (a page was reused before the transfer from it had ended); most systems have no such question at
    all. Shows as an answer that is computed from blocks that were let go before they were read: sooner or later wrong.
    """

    def _confirm(self, body: ConfirmRequest, now_s: float) -> Answer | Refuse:
        answer = super()._confirm(body, now_s)
        return Answer(ConfirmReply(stands=True)) if isinstance(answer, Answer) else answer


class FreesWithoutQuarantine(Reader):
    """Asks the pull of an aborted lease to stop and takes it for ended: its last bytes land in blocks that are free,
    or somebody else's.

    vLLM and SGLang over NIXL (releasing a handle does not stop what is under way); SGLang #24527. Shows as a pull
    that writes what it was not given, and as wrong tokens.
    """

    def _abort(
        self, lease: ReaderLease, reason: AbortReason, error: TandemError, now_s: float
    ) -> list[ReaderInstruction]:
        if not lease.pull_in_flight:
            return super()._abort(lease, reason, error, now_s)
        self._ledger.end_pull(lease.lease_id)
        return [StopPull(lease.lease_id), *super()._abort(lease, reason, error, now_s)]


class ForgetsToFreeOnCancel(DecodeBatch):
    """Strikes an answer that was cancelled during a step off the books when the step ends, without its blocks.

    vLLM #46283, dynamo #14775: KV stranded by a cancel. Shows as blocks that nobody ever frees.
    """

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        answer = self._answer(sequence_id)
        if answer.doomed:
            answer.sequence.block_ids = []
        super().apply(sequence_id, num_tokens, sampled, now_s)


class StartsTwice(PrefillQueue):
    """Takes a Prefill whose first answer was lost for a new one, and starts the try again.

    The classic of retried rpcs without memory of what was done. Shows as tokens that are computed twice.
    """

    def submit(self, ask: PrefillRequest, now_s: float) -> None:
        known = self._prompts.pop(request_key(ask.request), None)
        super().submit(ask, now_s)
        if known is not None:
            self._prompts.setdefault(known.sequence.key, known)


def _id_without_life(text: str) -> LeaseId:
    """Numbers leases within a worker, and begins at one again in each of its lives.

    vLLM #36958 (ids that did not match leaked KV), and what follows from ids that outlive their process. Shows as
    handoffs that readers refuse, since they remember those ids as ended: long after the restart requests fail.
    """
    worker_id, _, number = text.split("/")
    return LeaseId(f"{worker_id}/{number}")


class LosesHeartbeatTimer(Registration):
    """Arms the next heartbeat when the last one is answered: after one that is not there is no other.

    Shows as a worker that lives, and that the coordinator does not know for good.
    """

    async def _beat(self) -> bool:
        try:
            return await super()._beat()
        except TandemError:
            return await asyncio.Event().wait()


class AnnouncesBlockBeingWritten(PrefillQueue):
    """Advances a lease over the block in which a chunk ends, too, which the next chunk writes on.

    Rounding up where it must be down. Shows as a wrong token: the reader pulled half a block.
    """

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        super().apply(sequence_id, num_tokens, sampled, now_s)
        prompt = self._running.get(sequence_id)
        if prompt is not None and prompt.lease_id is not None:
            self._leases.advance(prompt, self._layout.blocks_for(prompt.sequence.num_computed))


class NamesWhatIsScheduled(PromptTurns):
    """Gives a prompt's blocks their keys when they are allocated: whoever finds them reads on behind tokens that are
    not there yet, or never will be.

    Right where one step computes both in order, as in vLLM; not here, and wrong there too once the first one is
    cancelled. Shows as wrong tokens of another prompt with the same beginning.
    """

    def take_blocks(self, prompt: Prompt, found: Found, now_s: float) -> None:
        super().take_blocks(prompt, found, now_s)
        sequence = prompt.sequence
        num_computed, sequence.num_computed = sequence.num_computed, len(sequence.token_ids)
        self._prefixes.name_final(prompt)
        sequence.num_computed = num_computed


class WaitsWhileHolding(Reader):
    """An offer that waits takes what blocks there are, and holds them until the rest comes free.

    LMCache #1215 (three that each waited for another). Shows as a standstill: the offer waits for an answer that was
    preempted, and that one for the blocks of the offer, until a deadline ends them.
    """

    def _reserve_waiting(self, now_s: float) -> list[ReaderInstruction]:
        for lease_id in self._waiting:
            self._ledger.release_all(lease_id)
        instructions = super()._reserve_waiting(now_s)
        for lease in self._waiting.values():
            self._ledger.allocate(lease.lease_id, min(lease.terms.num_blocks, self._ledger.available_blocks))
        return instructions

    def _abort(
        self, lease: ReaderLease, reason: AbortReason, error: TandemError, now_s: float
    ) -> list[ReaderInstruction]:
        self._ledger.release_all(lease.lease_id)
        return super()._abort(lease, reason, error, now_s)


class NamesBeforeItIsRead(StoreMachine):
    """Gives blocks their keys when their read from disk is ordered, so that the next fetch need not read them again.

    Shows as a disk that writes what is named already; now and then as wrong tokens of a prompt that was served in
    between, or where the read failed.
    """

    def _load(
        self, keys: Sequence[bytes], places: Sequence[int], first_block: int, *, is_ahead: bool
    ) -> ReadDisk | None:
        load = super()._load(keys, places, first_block, is_ahead=is_ahead)
        if load is not None:
            for place, key, block in zip(places, load.keys, load.blocks, strict=False):
                self.dram.name(block, key, first_block + place)
        return load


class SkipsOneBlockTooMany(AnswerPrefixes):
    """Says of a handoff that it has one block more than it has: the length of what it found, counted from one.

    LMCache and vLLM had several such (hit lengths rounded differently on both sides). Shows as wrong tokens: a block
    of the prompt is neither shared nor pulled.
    """

    def hold(self, offer: Incoming, found: list[BlockId]) -> None:
        super().hold(offer, found)
        if len(found) < min(len(offer.chain), offer.num_blocks):
            extra = self._ledger.allocate(offer.holder, 1) or []
            offer.shared = [*found, *extra]
            offer.num_new_blocks -= len(extra)


class KeepsByBlockId(WriteBack):
    """Notes where the blocks of what ended stand, and lets go of them: when their turn comes they may be others'.

    Shows as an offer of free blocks, and as blocks of one key that differ between worker and store.
    """

    def __init__(self, prefixes: PrefixCache, *rest: Any) -> None:
        self._noted = _NotedPlaces(prefixes)
        super().__init__(self._noted, *rest)

    def handle(self, event: WriteBackEvent, now_s: float) -> list[WriteBackInstruction]:
        if isinstance(event, Wanted):
            self._noted.note(event.keys)
        return super().handle(event, now_s)


class _NotedPlaces(PrefixCache):
    """A prefix cache that is not looked at again."""

    def __init__(self, prefixes: PrefixCache) -> None:
        self._prefixes = prefixes
        self._places: dict[bytes, BlockId] = {}

    def note(self, keys: Sequence[bytes]) -> None:
        self._places.update(zip(keys, self._prefixes.match(keys), strict=False))

    def match(self, keys: Iterable[bytes]) -> list[BlockId]:
        return [self._places[key] for key in itertools.takewhile(self._places.__contains__, keys)]

    def num_held(self, blocks: Iterable[BlockId]) -> int:
        return self._prefixes.num_held(blocks)


def _counts_no_starts(*_: Any) -> tuple[StartingWorker, ...]:
    """Of a pool: only who is ready counts, so that every look before a start has ended starts more.

    What autoscalers without start-up times do in a burst (the Kubernetes HPA's readiness delay is for this). Shows as
    a pool that is larger than it may be.
    """
    return ()


def _forgets_who_asked(
    view: PoolView, rules: ScaleRules, now_s: float, memory: ScaleMemory
) -> tuple[ScaleDecision, ScaleMemory]:
    """Scales by the load of workers that there are, and nobody tells it of requests that found none.

    The classic of scaling from zero: an empty pool has no load. Shows as requests that wait until they fail.
    """
    return decide(replace(view, unserved_requests=0), rules, now_s, memory)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlantedBug:
    #: Where production code finds what it is made of, under which name, and what it finds there instead.
    module: ModuleType
    attribute: str
    instead: Any
    #: What a problem that it causes says, as a regular expression.
    symptom: str
    #: Only trials with a store are played: it is in what those alone run, or shows there first.
    of_stores: bool = False
    #: Only trials whose pools follow the load are played.
    of_pools: bool = False


_WRONG_TOKEN = r"token \d+ is \d+, not \d+"
_DIFFER = r"have one key, and differ|has a key, and is not written to the end"
_LEAK = r"\d+ of \d+ blocks are in use"

BUGS: Mapping[str, PlantedBug] = {
    "skip-generation-check": PlantedBug(
        of_stores=True,
        module=kvtransfer.holder_service,
        attribute="Holder",
        instead=SkipsGenerationCheck,
        symptom=rf"which was pulled when its holder had let it go|{_WRONG_TOKEN}",
    ),
    "free-without-quarantine": PlantedBug(
        module=kvtransfer.reader_service,
        attribute="Reader",
        instead=FreesWithoutQuarantine,
        symptom=r"a pull writes block \d+, which is",
    ),
    "forget-to-free-on-cancel": PlantedBug(
        module=worker.shell, attribute="DecodeBatch", instead=ForgetsToFreeOnCancel, symptom=_LEAK
    ),
    "commit-twice": PlantedBug(
        module=worker.shell, attribute="PrefillQueue", instead=StartsTwice, symptom=r"computed twice"
    ),
    "reuse-lease-id": PlantedBug(
        module=kvtransfer.holder_service,
        attribute="LeaseId",
        instead=_id_without_life,
        symptom=r"asked after recovery: .* has ended here",
    ),
    "lose-heartbeat-timer": PlantedBug(
        module=worker.shell,
        attribute="Registration",
        instead=LosesHeartbeatTimer,
        symptom=r"the coordinator does not know \w+",
    ),
    "announce-block-being-written": PlantedBug(
        module=worker.shell, attribute="PrefillQueue", instead=AnnouncesBlockBeingWritten, symptom=_WRONG_TOKEN
    ),
    "name-what-is-scheduled": PlantedBug(
        module=prefill.queue, attribute="PromptTurns", instead=NamesWhatIsScheduled, symptom=_WRONG_TOKEN
    ),
    "wait-while-holding": PlantedBug(
        module=kvtransfer.reader_service,
        attribute="Reader",
        instead=WaitsWhileHolding,
        symptom=r"stood still for \d+\.\d+ s",
    ),
    "name-before-it-is-read": PlantedBug(
        of_stores=True,
        module=worker.store_shell,
        attribute="StoreMachine",
        instead=NamesBeforeItIsRead,
        symptom=r"the disk writes block \d+, which has a key already",
    ),
    "skip-one-too-many": PlantedBug(
        module=decode.batch, attribute="AnswerPrefixes", instead=SkipsOneBlockTooMany, symptom=_WRONG_TOKEN
    ),
    "keep-by-block-id": PlantedBug(
        of_stores=True,
        module=worker.store_offers,
        attribute="WriteBack",
        instead=KeepsByBlockId,
        symptom=rf"pin for lease|{_DIFFER}",
    ),
    "count-no-starts": PlantedBug(
        of_pools=True,
        module=coordinator.pool_views,
        attribute="_starting",
        instead=_counts_no_starts,
        symptom=r"pool \w+ has \d+ workers, \d+ at most",
    ),
    "forget-who-asked": PlantedBug(
        of_pools=True,
        module=coordinator.autoscaler,
        attribute="decide",
        instead=_forgets_who_asked,
        symptom=r"request \d+: failed with (not_ready|deadline_exceeded)|asked after recovery: .*one is being started",
    ),
}


@contextmanager
def planted(name: str) -> Generator[None, None, None]:
    """For the time of the `with` block, workers are made with this bug."""
    bug = BUGS[name]
    sound = getattr(bug.module, bug.attribute)
    setattr(bug.module, bug.attribute, bug.instead)
    try:
        yield
    finally:
        setattr(bug.module, bug.attribute, sound)


def shows(name: str, verdict: Verdict) -> bool:
    """Whether a verdict has the symptom of this bug, not just any problem."""
    return any(re.search(BUGS[name].symptom, problem) for problem in verdict.problems)


def find(name: str, seeds: Iterable[int], *, on_verdict: Callable[[Verdict], None] | None = None) -> Verdict | None:
    """The verdict of the first seed that shows the bug; None where none does. Seeds that cannot are passed over."""
    with planted(name):
        for seed in seeds:
            if not _may_show(BUGS[name], draw(seed).cluster):
                continue
            verdict = try_seed(seed)
            if on_verdict is not None:
                on_verdict(verdict)
            if shows(name, verdict):
                return verdict
    return None


def _may_show(bug: PlantedBug, cluster: ClusterSpec) -> bool:
    return bool(cluster.stores or not bug.of_stores) and (cluster.elastic is not None or not bug.of_pools)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.planted_bugs", description=__doc__)
    parser.add_argument("--bug", choices=sorted(BUGS), required=True)
    parser.add_argument("--seeds", type=int, default=200, help="play at most so many (default 200)")
    parser.add_argument("--first", type=int, default=1, help="the first of them (default 1)")
    arguments = parser.parse_args()
    verdict = find(arguments.bug, range(arguments.first, arguments.first + arguments.seeds))
    if verdict is None:
        print(f"{arguments.bug}: not found in {arguments.seeds} seeds")
        return 1
    print(f"{arguments.bug}: found by seed {verdict.seed}: {verdict.scenario}")
    for problem in verdict.problems:
        print(f"  ! {problem}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
