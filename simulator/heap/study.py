"""Runs a capacity study."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from simulator.engine import modelled_identity
from simulator.heap.context import Context
from simulator.heap.coordinator import Coordinator
from simulator.heap.events import EventHeap
from simulator.heap.gateway import Gateway
from simulator.heap.recorder import Recorder, Sampler
from simulator.heap.results import StudyResult
from simulator.heap.wires import Wires
from simulator.heap.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

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
        coming = iter(requests)
        first = next(coming, None)
        context = Context(
            spec=spec,
            layout=identity.layout,
            hash_block_tokens=0 if first is None else first.hash_block_tokens,
            heap=heap,
            wires=Wires(heap, spec.transfer, spec.block_tokens * spec.kv_token_bytes),
            recorder=Recorder(),
            on_end=self._on_end,
            on_first_token=self._on_first_token,
            on_refused=self._on_refused,
            on_cache_changed=self._on_cache_changed,
        )
        self._context = context
        self._progress = progress
        self._workers: list[Worker] = []
        for group in spec.groups:
            for number in range(group.count):
                self._workers.append(Worker(context, group, f"{group.name}-{number}", len(self._workers)))
        self._coordinator = Coordinator(context, self._workers, identity, lambda: self._gateway.done)
        self._gateway = Gateway(context, self._coordinator.place, chain(() if first is None else (first,), coming))
        self._sampler = Sampler(self._workers, spec)

    def run(self) -> StudyResult:
        context, gateway = self._context, self._gateway
        gateway.start()
        self._coordinator.start()
        context.heap.at(context.spec.sample_interval_s, self._sample, None)
        context.heap.run()
        for worker in self._workers:
            worker.check_empty()
        fetched_blocks = sum(worker.prompts.fetched_blocks for worker in self._workers)
        return StudyResult(
            spec=context.spec,
            requests=context.recorder.columns(),
            slo_classes=context.recorder.slo_classes,
            itl_s=context.recorder.itl_s,
            workers=tuple(worker.usage(gateway.end_s) for worker in self._workers),
            time_line=self._sampler.time_line(),
            transfer_bytes=context.wires.num_bytes - fetched_blocks * context.wires.block_bytes,
            fetched_bytes=fetched_blocks * context.wires.block_bytes,
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

    def _on_first_token(self, request: Request) -> None:
        self._coordinator.note_first_token(request)

    def _on_end(self, request: Request, outcome: Outcome) -> None:
        self._gateway.end(request, outcome)

    def _on_refused(self, request: Request, retry_after_s: float) -> None:
        self._gateway.refuse(request, retry_after_s)

    def _on_cache_changed(self, worker: Worker) -> None:
        self._coordinator.cache_changed(worker)


def _check(spec: StudySpec) -> None:
    if not spec.groups or not all(group.count > 0 for group in spec.groups):
        raise ValueError("a study needs at least one group, and at least one worker in each")
    names = [group.name for group in spec.groups]
    if len(set(names)) < len(names):
        raise ValueError(f"groups must have names of their own: {', '.join(names)}")
    if spec.default_slo is not None and all(slo.name != spec.default_slo for slo in spec.slos):
        raise ValueError(f"the default class {spec.default_slo!r} is none of {', '.join(s.name for s in spec.slos)}")
    for group in spec.groups:
        if group.pipeline_stages < 1 or (group.pipeline_stages > 1 and group.role != "prefill"):
            raise ValueError(f"group {group.name} ({group.role}) with {group.pipeline_stages} pipeline stages")
