"""Runs a capacity study."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.ids import Incarnation, WorkerId
from contracts.messages import WorkerInfo
from coordinator.fleet import Fleet
from coordinator.membership import MembershipLimits
from simulator.engine import modelled_identity
from simulator.heap.context import Context
from simulator.heap.events import EventHeap
from simulator.heap.gateway import Gateway
from simulator.heap.recorder import Recorder, Sampler
from simulator.heap.results import StudyResult
from simulator.heap.wires import Wires
from simulator.heap.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from contracts.layout import KvIdentity
    from simulator.heap.request import Request
    from simulator.heap.results import Outcome
    from simulator.heap.spec import StudySpec
    from workload.request import WorkloadRequest


def simulate(
    spec: StudySpec,
    requests: Iterable[WorkloadRequest],
    *,
    progress: Callable[[float, int], None] | None = None,
) -> StudyResult:
    """Serves the workload to its end. `requests` are taken one by one, as they arrive; equal arguments give equal
    results. `progress` is called at every sample with the virtual seconds and the number of requests that ended.

    Every request ends exactly once, and every worker ends empty: anything else is a bug and raises InvariantBroken.

    Raises ValueError for a spec without workers or of a pipeline that decodes, for requests out of order, and for
    steps that take no time.
    """
    return _Study(spec, requests, progress).run()


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
        context = Context(
            spec=spec,
            layout=identity.layout,
            heap=heap,
            wires=Wires(heap, spec.transfer, spec.block_tokens * spec.kv_token_bytes),
            recorder=Recorder(),
            on_end=self._on_end,
            on_refused=self._on_refused,
        )
        self._context = context
        self._progress = progress
        self._workers: list[Worker] = []
        fleet = Fleet(MembershipLimits().booking_grace_s)
        for group in spec.groups:
            for number in range(group.count):
                worker = Worker(context, group, f"{group.name}-{number}", len(self._workers))
                self._workers.append(worker)
                fleet.add(_info(spec, worker, identity))
        by_id = {worker.worker_id: worker for worker in self._workers}
        in_rows = [by_id[info.worker_id] for info in fleet.view().infos]
        self._gateway = Gateway(context, fleet, in_rows, iter(requests))
        self._sampler = Sampler(self._workers)

    def run(self) -> StudyResult:
        context, gateway = self._context, self._gateway
        gateway.start()
        context.heap.at(context.spec.sample_interval_s, self._sample, None)
        context.heap.run()
        for worker in self._workers:
            worker.check_empty()
        return StudyResult(
            spec=context.spec,
            requests=context.recorder.columns(),
            slo_classes=context.recorder.slo_classes,
            itl_s=context.recorder.itl_s,
            workers=tuple(worker.usage(gateway.end_s) for worker in self._workers),
            time_line=self._sampler.time_line(),
            transfer_bytes=context.wires.num_bytes,
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

    def _on_end(self, request: Request, outcome: Outcome) -> None:
        self._gateway.end(request, outcome)

    def _on_refused(self, request: Request, retry_after_s: float) -> None:
        self._gateway.refuse(request, retry_after_s)


def _info(spec: StudySpec, worker: Worker, identity: KvIdentity) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(worker.worker_id),
        incarnation=Incarnation(1),
        role=worker.role,
        address=worker.worker_id,
        model="modelled",
        identity=identity,
        total_blocks=worker.num_blocks,
        max_context_tokens=spec.max_context_tokens,
    )


def _check(spec: StudySpec) -> None:
    if not spec.groups or not all(group.count > 0 for group in spec.groups):
        raise ValueError("a study needs at least one group, and at least one worker in each")
    names = [group.name for group in spec.groups]
    if len(set(names)) < len(names):
        raise ValueError(f"groups must have names of their own: {', '.join(names)}")
    for group in spec.groups:
        if group.pipeline_stages < 1 or (group.pipeline_stages > 1 and group.role != "prefill"):
            raise ValueError(f"group {group.name} ({group.role}) with {group.pipeline_stages} pipeline stages")
