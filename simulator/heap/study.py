"""Runs a capacity study."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from simulator.engine import modelled_identity
from simulator.heap.context import Context
from simulator.heap.coordinator import Coordinator
from simulator.heap.events import EventHeap
from simulator.heap.gateway import Gateway
from simulator.heap.lifecycle import Lifecycle
from simulator.heap.moves import Moves
from simulator.heap.operator import StudyOperator
from simulator.heap.recorder import Recorder, Sampler
from simulator.heap.results import StudyResult
from simulator.heap.store import STORE_ID, Store
from simulator.heap.wires import Wires
from simulator.heap.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from coordinator.autoscaler import Autoscaler
    from simulator.heap.request import Request
    from simulator.heap.results import Outcome
    from simulator.heap.spec import StudySpec
    from simulator.heap.store import Holder
    from workload.request import WorkloadRequest


def simulate(
    spec: StudySpec,
    requests: Iterable[WorkloadRequest],
    *,
    progress: Callable[[float, int], None] | None = None,
    script: Callable[[Controls], None] | None = None,
) -> StudyResult:
    """Serves the workload to its end. `requests` are taken one by one, as they arrive; equal arguments give equal
    results. `progress` is called at every sample with the virtual seconds and the number of requests that ended,
    `script` before the start: what it has the controls do at some time is done then.

    Every request ends exactly once, and every worker ends empty: anything else is a bug and raises InvariantBroken.

    Raises ValueError for a spec without workers or of a pipeline that decodes, for requests out of order, and for
    steps that take no time.
    """
    study = _Study(spec, requests, progress)
    if script is not None:
        script(study.controls())
    return study.run()


@dataclass(frozen=True, slots=True, kw_only=True)
class Controls:
    """What operators can do in the midst of a study."""

    heap: EventHeap
    moves: Moves
    lifecycle: Lifecycle
    workers: dict[str, Worker]


class _Study:
    def __init__(
        self,
        spec: StudySpec,
        requests: Iterable[WorkloadRequest],
        progress: Callable[[float, int], None] | None,
    ) -> None:
        _check(spec)
        identity = modelled_identity(block_tokens=spec.block_tokens)
        heap = EventHeap()
        coming = iter(requests)
        first = next(coming, None)
        wires = Wires(heap, spec.transfer, spec.block_tokens * spec.kv_token_bytes)
        context = Context(
            spec=spec,
            layout=identity.layout,
            hash_block_tokens=0 if first is None else first.hash_block_tokens,
            heap=heap,
            wires=wires,
            recorder=Recorder(),
            moves=Moves(spec, heap, wires),
            on_end=self._on_end,
            on_first_token=self._on_first_token,
            on_refused=self._on_refused,
            on_cache_changed=self._on_cache_changed,
            on_read=self._on_read,
        )
        self._context = context
        self._progress = progress
        self._workers: list[Worker] = []
        for group in spec.groups:
            for number in range(group.count):
                is_up = group.initial is None or number < group.initial
                name = f"{group.name}-{number}"
                self._workers.append(Worker(context, group, name, len(self._workers), is_up=is_up))
        has_store = 0 < context.hash_block_tokens <= spec.store_tokens
        self._store = Store(context, spec.store_tokens) if has_store else None

        def is_over() -> bool:
            return self._gateway.done

        self._coordinator = Coordinator(context, self._workers, self._store, identity, is_over)
        self._lifecycle = Lifecycle(
            context,
            self._workers,
            is_named=lambda worker, role: self._gateway.names(worker, role),
            on_changed=self._coordinator.changed,
            is_over=is_over,
        )
        self._operator: StudyOperator | None = None
        self._autoscaler: Autoscaler | None = None
        if spec.autoscale is not None:
            self._operator = StudyOperator(heap, self._lifecycle, spec.autoscale)
            self._autoscaler = self._coordinator.autoscaler(spec.autoscale, self._operator)
        self._gateway = Gateway(context, self._coordinator.place, chain(() if first is None else (first,), coming))
        self._sampler = Sampler(self._workers, spec)

    def controls(self) -> Controls:
        return Controls(
            heap=self._context.heap,
            moves=self._context.moves,
            lifecycle=self._lifecycle,
            workers={worker.worker_id: worker for worker in self._workers},
        )

    def run(self) -> StudyResult:
        context, gateway = self._context, self._gateway
        gateway.start()
        self._coordinator.start()
        if self._autoscaler is not None:
            context.heap.after(0.0, self._look_at_scale, self._autoscaler)
        context.heap.at(context.spec.sample_interval_s, self._sample, None)
        context.heap.run()
        for worker in self._workers:
            worker.check_empty()
        fetched_blocks = sum(worker.prompts.fetched_blocks for worker in self._workers)
        stored_blocks = 0 if self._store is None else self._store.stored_blocks
        moves = context.moves
        return StudyResult(
            spec=context.spec,
            requests=context.recorder.columns(),
            slo_classes=context.recorder.slo_classes,
            itl_s=context.recorder.itl_s,
            workers=tuple(worker.usage(gateway.end_s) for worker in self._workers),
            time_line=self._sampler.time_line(),
            transfer_bytes=context.wires.num_bytes
            - (fetched_blocks + stored_blocks + moves.tallies.blocks) * context.wires.block_bytes,
            moved_bytes=moves.tallies.blocks * context.wires.block_bytes,
            moves=moves.tallies,
            move_pause_s=moves.pause_s,
            worker_s=self._lifecycle.worker_s(gateway.end_s),
            operations=() if self._operator is None else tuple(self._operator.begun),
            fetched_bytes=fetched_blocks * context.wires.block_bytes,
            stored_bytes=stored_blocks * context.wires.block_bytes,
            duration_s=gateway.end_s,
            num_events=context.heap.num_events,
            num_steps=sum(worker.num_steps for worker in self._workers),
        )

    def _sample(self, _: None) -> None:
        if self._gateway.done:
            self._context.heap.overtaken()
            return
        now_s = self._context.heap.now_s
        self._sampler.take(now_s)
        if self._progress is not None:
            self._progress(now_s, self._gateway.num_ended)
        self._context.heap.after(self._context.spec.sample_interval_s, self._sample, None)

    def _look_at_scale(self, autoscaler: Autoscaler) -> None:
        settings = self._context.spec.autoscale
        if settings is None or self._gateway.done:
            self._context.heap.overtaken()
            return
        autoscaler.look()
        self._context.heap.after(settings.interval_s, self._look_at_scale, autoscaler)

    def _on_first_token(self, request: Request) -> None:
        self._coordinator.note_first_token(request)

    def _on_end(self, request: Request, outcome: Outcome) -> None:
        self._gateway.end(request, outcome)

    def _on_refused(self, request: Request, retry_after_s: float) -> None:
        self._gateway.refuse(request, retry_after_s)

    def _on_cache_changed(self, holder: Holder) -> None:
        self._coordinator.cache_changed(holder)

    def _on_read(self, request: Request, worker: Worker) -> None:
        if self._store is not None:
            self._store.offer(request, worker)


def _check(spec: StudySpec) -> None:
    if not spec.groups or not all(group.count > 0 for group in spec.groups):
        raise ValueError("a study needs at least one group, and at least one worker in each")
    names = [group.name for group in spec.groups]
    if spec.store_tokens and STORE_ID.rpartition("-")[0] in names:
        raise ValueError(f"no group can be named as the store is: {', '.join(names)}")
    if len(set(names)) < len(names):
        raise ValueError(f"groups must have names of their own: {', '.join(names)}")
    if spec.default_slo is not None and all(slo.name != spec.default_slo for slo in spec.slos):
        raise ValueError(f"the default class {spec.default_slo!r} is none of {', '.join(s.name for s in spec.slos)}")
    for group in spec.groups:
        if group.pipeline_stages < 1 or (group.pipeline_stages > 1 and group.role != "prefill"):
            raise ValueError(f"group {group.name} ({group.role}) with {group.pipeline_stages} pipeline stages")
