"""What the coordinator does in a study: it decides with the production policies, by what workers told it so far.

Heartbeats come staggered, and what enters or leaves a prefix cache is told a little later, as live. So decisions rest
on figures and hints that are as old here as there.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.messages import DispatchItem, Peer, PrefixPlan, TtftTally, WorkerInfo
from coordinator.conductor import Conductor
from coordinator.decision import Refused
from simulator.heap.costs import StudyCosts
from simulator.heap.load import load_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.layout import KvIdentity
    from coordinator.decision import Chosen
    from simulator.heap.context import Context
    from simulator.heap.request import Request
    from simulator.heap.worker import Worker


class Coordinator:
    def __init__(
        self, context: Context, workers: Sequence[Worker], identity: KvIdentity, is_over: Callable[[], bool]
    ) -> None:
        """`is_over`: nothing is left to be decided."""
        spec = context.spec
        self._heap = context.heap
        self._spec = spec
        self._slos = {slo.name: slo for slo in spec.slos}
        self._default_slo = None if spec.default_slo is None else self._slos[spec.default_slo]
        self._is_over = is_over
        self._conductor = Conductor(
            costs=StudyCosts(spec),
            slos={slo.name: slo for slo in spec.slos},
            default_slo=spec.default_slo,
            settings=spec.settings(context.hash_block_tokens),
            rng=random.Random(spec.seed),
        )
        for worker in workers:
            info = WorkerInfo(
                worker_id=WorkerId(worker.worker_id),
                incarnation=Incarnation(1),
                role=worker.role,
                address=worker.worker_id,
                model="modelled",
                identity=identity,
                total_blocks=worker.num_blocks,
                max_context_tokens=spec.max_context_tokens,
                max_batch_tokens=worker.max_batch_tokens,
                max_sequences=worker.max_sequences,
                handoff_blocks=worker.handoff_blocks,
            )
            self._conductor.add(info, 0.0)
        self._fleet = self._conductor.fleet
        #: From one heartbeat to the next.
        self._pause_s = spec.heartbeat_interval_s + 2 * spec.message_s
        by_id = {worker.worker_id: worker for worker in workers}
        #: By row of the fleet.
        self._workers = [by_id[info.worker_id] for info in self._conductor.fleet.view().infos]

    def start(self) -> None:
        """The first heartbeats, evenly spread."""
        interval_s = self._spec.heartbeat_interval_s
        for row in range(len(self._workers)):
            self._heap.at(interval_s * (row + 1) / len(self._workers), self._beat, row)

    def _beat(self, row: int) -> None:
        """Load as of the moment in which the coordinator hears it; a worker pauses from when it is answered."""
        if self._is_over():
            self._heap.overtaken()
            return
        self._fleet.report(row, load_of(self._workers[row]), self._heap.now_s)
        self._heap.after(self._pause_s, self._beat, row)

    def cache_changed(self, worker: Worker) -> None:
        """Something came into its prefix cache, or left it, for the first time since that was told last."""
        if not worker.tells_blocks:
            worker.tells_blocks = True
            self._heap.after(self._spec.block_events_s + self._spec.message_s, self._hear_blocks, worker)

    def _hear_blocks(self, worker: Worker) -> None:
        cache = worker.prefix_cache
        worker.tells_blocks = False
        if cache is None or self._is_over():
            self._heap.overtaken()
            return
        stored, dropped = cache.take_changes()
        directory = self._conductor.directory
        number = self._conductor.number_of(WorkerId(worker.worker_id))
        if len(dropped):
            directory.drop(number, dropped)
        if len(stored):
            directory.store(number, stored)

    def note_first_token(self, request: Request) -> None:
        """As gateways tell what became of those that were accepted."""
        predicted, slo = request.predicted, self._slos.get(request.slo_class, self._default_slo)
        if predicted is None or slo is None or request.history.num_replays:
            return
        target_s = slo.ttft_ms / 1e3
        is_late = request.first_token_s - request.arrival_s > target_s
        self._conductor.margins.note(TtftTally.of(slo.name, predicted.ttft_s / target_s, is_late=is_late))

    def place(self, request: Request) -> Refused | None:
        """Chooses its workers, books it there and tells it; or says why not."""
        now_s = self._heap.now_s
        item = DispatchItem(
            request_id=RequestId(str(request.row)),
            prompt_tokens=request.prompt_tokens,
            max_tokens=self._spec.max_output_tokens or request.output_tokens,
            avoid=request.history.avoid,
            slo_class=request.slo_class,
            priority=request.priority,
            tenant=request.tenant,
            block_keys=request.block_keys,
            waited_s=now_s - request.arrival_s,
            was_accepted=request.was_accepted,
        )
        decision = self._conductor.decide(item, now_s)
        if isinstance(decision, Refused):
            request.predicted = None if decision.best is None else decision.best.predicted
            return decision
        self._take(request, decision)
        return None

    def _take(self, request: Request, chosen: Chosen) -> None:
        request.predicted = chosen.predicted
        request.prefill = self._workers[chosen.prefill_row]
        request.decode = self._workers[chosen.decode_row]
        request.prefix_plan = request.fetch_from = None
        if chosen.source_row >= 0:
            source = request.fetch_from = self._workers[chosen.source_row]
            request.prefix_plan = PrefixPlan(
                local_blocks=chosen.local_blocks,
                source=Peer(worker_id=WorkerId(source.worker_id), incarnation=Incarnation(1), address=source.worker_id),
                source_blocks=chosen.source_blocks,
            )
