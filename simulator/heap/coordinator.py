"""What the coordinator does in a study: it decides with the production policies, by what workers told it so far.

Heartbeats come staggered, and what enters or leaves a prefix cache is told a little later, as live. So decisions rest
on figures and hints that are as old here as there.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.messages import DispatchItem, Peer, PrefixPlan, TtftTally, WorkerInfo
from coordinator.autoscaler import Autoscaler
from coordinator.conductor import Conductor
from coordinator.decision import Refused
from coordinator.membership import ALL_UP
from coordinator.usage_rows import usage_of
from simulator.heap.costs import StudyCosts
from simulator.heap.load import load_of
from simulator.heap.operator import HeapClock
from simulator.heap.rebalancing import Rebalancing
from simulator.heap.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.layout import KvIdentity
    from coordinator.decision import Chosen
    from coordinator.policy.fleet_view import Flags
    from coordinator.policy.virtual_usage import UsageView
    from coordinator.scaling_settings import AutoscaleSettings
    from simulator.heap.context import Context
    from simulator.heap.operator import StudyOperator
    from simulator.heap.request import Request
    from simulator.heap.store import Holder, Store


class Coordinator:
    def __init__(
        self,
        context: Context,
        workers: Sequence[Worker],
        store: Store | None,
        identity: KvIdentity,
        is_over: Callable[[], bool],
    ) -> None:
        """`is_over`: nothing is left to be decided."""
        spec = context.spec
        self._identity = identity
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
            if worker.is_up:
                self._conductor.add(self._info_of(worker), 0.0)
        if store is not None:
            self._conductor.add(_info_of_store(store, identity), 0.0)
        self._fleet = self._conductor.fleet
        #: From one heartbeat to the next.
        self._pause_s = spec.heartbeat_interval_s + 2 * spec.message_s
        self._by_id = {WorkerId(worker.worker_id): worker for worker in workers}
        self._holders_by_id: dict[str, Holder] = {worker.worker_id: worker for worker in workers}
        if store is not None:
            self._holders_by_id[store.worker_id] = store
        #: By row of the fleet, store included: who is there. And who may be given requests; None: all.
        self._holders: list[Holder] = []
        self._usable: Flags | None = None
        self._note_rows()
        self._autoscaler: Autoscaler | None = None
        self.rebalancing: Rebalancing | None = None
        if spec.moves is not None:
            self.rebalancing = Rebalancing(
                context,
                spec.moves,
                self._conductor,
                self._by_id,
                is_over=is_over,
            )

    def _info_of(self, worker: Worker) -> WorkerInfo:
        return WorkerInfo(
            worker_id=WorkerId(worker.worker_id),
            incarnation=Incarnation(1),
            role=worker.role,
            address=worker.worker_id,
            model="modelled",
            identity=self._identity,
            total_blocks=worker.num_blocks,
            max_context_tokens=self._spec.max_context_tokens,
            max_batch_tokens=worker.max_batch_tokens,
            max_sequences=worker.max_sequences,
            handoff_blocks=worker.handoff_blocks,
        )

    def changed(self, worker: Worker) -> None:
        """A worker came, begins to drain, changed its role or went."""
        worker_id, fleet = WorkerId(worker.worker_id), self._conductor.fleet
        is_member = self._is_member(worker)
        if is_member and not (worker.is_up and fleet.info_at(fleet.row_of(worker_id)).role == worker.role):
            self._conductor.remove(worker_id)
            is_member = False
            if self.rebalancing is not None:
                self.rebalancing.gone(worker_id)
        if worker.is_up and not is_member:
            self._conductor.add(self._info_of(worker), self._heap.now_s)
        self._note_rows()

    def _is_member(self, holder: Holder) -> bool:
        return any(each is holder for each in self._holders)

    def _note_rows(self) -> None:
        self._holders = [self._holders_by_id[info.worker_id] for info in self._conductor.fleet.view().infos]
        drains = [isinstance(holder, Worker) and holder.is_draining for holder in self._holders]
        self._usable = ~np.array(drains, np.bool_) if any(drains) else None

    def autoscaler(self, settings: AutoscaleSettings, operator: StudyOperator) -> Autoscaler:
        """The production one, which is told of all decisions; whoever has it calls `look`."""

        def usage() -> UsageView:
            draining = frozenset(worker_id for worker_id, worker in self._by_id.items() if worker.is_draining)
            return usage_of(self._conductor, ALL_UP, draining, {}, self._heap.now_s)

        self._autoscaler = Autoscaler(
            HeapClock(self._heap), settings, self._conductor, operator, usage=usage, log=lambda _: None
        )
        return self._autoscaler

    def start(self) -> None:
        """The first heartbeats, evenly spread."""
        interval_s = self._spec.heartbeat_interval_s
        for number, worker in enumerate(self._by_id[worker_id] for worker_id in sorted(self._by_id)):
            self._heap.at(interval_s * (number + 1) / len(self._by_id), self._beat, worker)
        if self.rebalancing is not None:
            self.rebalancing.start()

    def _beat(self, worker: Worker) -> None:
        """Load as of the moment in which the coordinator hears it; a worker pauses from when it is answered."""
        if self._is_over():
            self._heap.overtaken()
            return
        if worker.is_up:
            worker_id = WorkerId(worker.worker_id)
            self._fleet.report(self._fleet.row_of(worker_id), load_of(worker), self._heap.now_s)
            if self.rebalancing is not None:
                self.rebalancing.heard(worker_id)
        self._heap.after(self._pause_s, self._beat, worker)

    def cache_changed(self, holder: Holder) -> None:
        """Something came into its prefixes, or left them, for the first time since that was told last."""
        if not holder.tells_blocks:
            holder.tells_blocks = True
            self._heap.after(self._spec.block_events_s + self._spec.message_s, self._hear_blocks, holder)

    def _hear_blocks(self, holder: Holder) -> None:
        cache = holder.prefix_cache
        holder.tells_blocks = False
        if cache is None or self._is_over() or not self._is_member(holder):
            self._heap.overtaken()
            return
        stored, dropped = cache.take_changes()
        directory = self._conductor.directory
        number = self._conductor.number_of(WorkerId(holder.worker_id))
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
        tally = TtftTally.of(slo.name, predicted.ttft_s / target_s, is_late=is_late)
        self._conductor.margins.note(tally)
        if self._autoscaler is not None:
            self._autoscaler.judged(tally, self._heap.now_s)

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
        decision = self._conductor.decide(item, now_s, self._usable)
        if self._autoscaler is not None:
            self._autoscaler.decided(item, decision, now_s)
        if isinstance(decision, Refused):
            request.predicted = None if decision.best is None else decision.best.predicted
            return decision
        self._take(request, decision)
        return None

    def _worker_at(self, row: int) -> Worker:
        return self._by_id[self._fleet.info_at(row).worker_id]

    def _take(self, request: Request, chosen: Chosen) -> None:
        request.predicted = chosen.predicted
        request.prefill = self._worker_at(chosen.prefill_row)
        request.decode = self._worker_at(chosen.decode_row)
        request.prefix_plan = request.fetch_from = None
        if chosen.source_row >= 0:
            source = request.fetch_from = self._holders[chosen.source_row]
            request.prefix_plan = PrefixPlan(
                local_blocks=chosen.local_blocks,
                source=Peer(worker_id=WorkerId(source.worker_id), incarnation=Incarnation(1), address=source.worker_id),
                source_blocks=chosen.source_blocks,
            )


def _info_of_store(store: Store, identity: KvIdentity) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(store.worker_id),
        incarnation=Incarnation(1),
        role="store",
        address=store.worker_id,
        model="modelled",
        identity=identity,
        total_blocks=store.num_blocks,
        max_context_tokens=0,
    )
