"""The dispatch policy worker by worker: slow, plain, and the model that the one in columns is compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from contracts.messages import Peer, Placement, Rejection

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contracts.messages import DispatchItem, WorkerInfo, WorkerLoad
    from coordinator.policy import DispatchLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A live worker, as the last heartbeat and the placements since then tell it."""

    info: WorkerInfo
    load: WorkerLoad
    #: Prompt tokens placed here for prefill, not yet in a heartbeat.
    booked_prompt_tokens: int = 0
    #: Context tokens (prompt and allowed output) placed here for decode, not yet in a heartbeat.
    booked_context_tokens: int = 0
    #: Requests among the above that wait for prefill.
    booked_requests: int = 0

    @property
    def peer(self) -> Peer:
        return Peer(worker_id=self.info.worker_id, incarnation=self.info.incarnation, address=self.info.address)

    def can_hold(self, prompt_tokens: int) -> bool:
        """Whether the prompt and one token of an answer fit into all its blocks and into its context."""
        needed = self.info.identity.layout.blocks_for(prompt_tokens + 1)
        return prompt_tokens < self.info.max_context_tokens and needed <= self.info.total_blocks

    @property
    def prefill_load_tokens(self) -> int:
        return self.load.pending_prompt_tokens + self.booked_prompt_tokens

    @property
    def decode_load_tokens(self) -> int:
        return self.load.context_tokens + self.booked_context_tokens

    @property
    def waiting_requests(self) -> int:
        return self.load.waiting_requests + self.booked_requests


def reference_dispatch(
    items: Sequence[DispatchItem], workers: Iterable[WorkerView], limits: DispatchLimits
) -> list[Placement | Rejection]:
    """One verdict for each item, in order. Earlier items of the call count as load for later ones."""
    views = {view.info.worker_id: view for view in workers}
    verdicts: list[Placement | Rejection] = []
    for item in items:
        verdict = _place(item, list(views.values()), limits)
        verdicts.append(verdict)
        if isinstance(verdict, Placement):
            prefill = views[verdict.prefill.worker_id]
            views[prefill.info.worker_id] = replace(
                prefill,
                booked_prompt_tokens=prefill.booked_prompt_tokens + item.prompt_tokens,
                booked_requests=prefill.booked_requests + 1,
            )
            decode = views[verdict.decode.worker_id]
            views[decode.info.worker_id] = replace(
                decode,
                booked_context_tokens=decode.booked_context_tokens + item.prompt_tokens + item.max_tokens,
            )
    return verdicts


def _place(item: DispatchItem, views: list[WorkerView], limits: DispatchLimits) -> Placement | Rejection:
    usable = [view for view in views if view.can_hold(item.prompt_tokens)]
    if views and not usable:
        return _too_long(item, views)
    readers = sorted(
        (view for view in usable if view.info.role != "decode"),
        key=lambda view: (view.info.worker_id in item.avoid, view.prefill_load_tokens, view.info.worker_id),
    )
    if not readers:
        return _not_ready(item, "prefill", views, limits)
    open_readers = [view for view in readers if view.waiting_requests < limits.max_waiting_requests]
    if not open_readers:
        return _full(item, min(readers, key=lambda view: view.prefill_load_tokens), len(readers))
    pair = _pair_for(item, open_readers, usable)
    if pair is None:
        return _not_ready(item, "decode", views, limits)
    reader, writer = pair
    again = dict.fromkeys(view.info.worker_id for view in pair if view.info.worker_id in item.avoid)
    reason = (
        f"least loaded: prefill {reader.prefill_load_tokens} tokens pending of {len(readers)} workers, "
        f"decode {writer.decode_load_tokens} context tokens"
        + (f"; nobody else than {', '.join(again)}, to be avoided" if again else "")
    )
    return Placement(request_id=item.request_id, prefill=reader.peer, decode=writer.peer, reason=reason)


def _pair_for(
    item: DispatchItem, readers: list[WorkerView], usable: list[WorkerView]
) -> tuple[WorkerView, WorkerView] | None:
    """The first reader that has a writer, both not avoided; else the pair with the fewest avoided."""
    best: tuple[WorkerView, WorkerView] | None = None
    fewest = 3
    for reader in readers:
        writer = _writer_for(item, reader, usable)
        if writer is None:
            continue
        num_avoided = sum(view.info.worker_id in item.avoid for view in (reader, writer))
        if num_avoided < fewest:
            best, fewest = (reader, writer), num_avoided
        if not fewest:
            break
    return best


def _writer_for(item: DispatchItem, reader: WorkerView, usable: list[WorkerView]) -> WorkerView | None:
    """The decode worker for a prompt read by `reader`: itself when mixed, else the least loaded whose KV
    means the same; not avoided before avoided, one that can hold the whole answer before one that cannot. None
    when there is none."""
    whole_tokens = item.prompt_tokens + item.max_tokens
    if reader.info.role == "mixed":
        return reader
    writers = [
        view
        for view in usable
        if view.info.role == "decode" and reader.info.identity.mismatch(view.info.identity) is None
    ]

    def preference(view: WorkerView) -> tuple[bool, bool, int, str]:
        is_avoided = view.info.worker_id in item.avoid
        too_small = view.info.max_context_tokens < whole_tokens
        return (is_avoided, too_small, view.decode_load_tokens, view.info.worker_id)

    return min(writers, key=preference, default=None)


def _not_ready(item: DispatchItem, role: str, views: list[WorkerView], limits: DispatchLimits) -> Rejection:
    present = ", ".join(f"{view.info.worker_id} ({view.info.role})" for view in views) or "none"
    return Rejection(
        request_id=item.request_id,
        code="not_ready",
        message=f"no {role} worker can take the request (workers up: {present})",
        retry_after_s=limits.not_ready_retry_after_s,
    )


def _too_long(item: DispatchItem, views: list[WorkerView]) -> Rejection:
    largest = max(
        min(view.info.max_context_tokens, view.info.total_blocks * view.info.identity.layout.block_tokens)
        for view in views
    )
    return Rejection(
        request_id=item.request_id,
        code="context_length_exceeded",
        message=(
            f"a prompt of {item.prompt_tokens} tokens and an answer fit into no worker; "
            f"the largest holds {largest} tokens"
        ),
        retry_after_s=0.0,
    )


def _full(item: DispatchItem, least: WorkerView, num_readers: int) -> Rejection:
    return Rejection(
        request_id=item.request_id,
        code="no_capacity",
        message=(
            f"all {num_readers} prefill workers have full queues; the least loaded, {least.info.worker_id}, has "
            f"{least.waiting_requests} requests and {least.prefill_load_tokens} prompt tokens waiting"
        ),
        retry_after_s=1.0,
    )
