"""Decisions as messages, with their reasons in words: for logs, clients and people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.messages import Peer, Placement, PrefixPlan, Rejection
from coordinator.policy.fleet_view import prefill_tokens
from coordinator.policy.pairing import least, wished

if TYPE_CHECKING:
    from contracts.messages import DispatchItem, WorkerInfo
    from coordinator.decision import Chosen, Refused
    from coordinator.policy.admission import Limits
    from coordinator.policy.fleet_view import Flags, FleetView


#: Of a target: that much is not told apart from all of it.
_NEARLY_WHOLE = 0.97


def placement(item: DispatchItem, chosen: Chosen, view: FleetView, policy: str) -> Placement:
    """`view` with this placement booked."""
    reader, writer = view.infos[chosen.prefill_row], view.infos[chosen.decode_row]
    source = None if chosen.source_row < 0 else view.infos[chosen.source_row]
    prefix = None
    if chosen.local_blocks or source is not None:
        prefix = PrefixPlan(
            local_blocks=chosen.local_blocks,
            source=None if source is None else _peer(source),
            source_blocks=chosen.source_blocks,
        )
    return Placement(
        request_id=item.request_id,
        prefill=_peer(reader),
        decode=_peer(writer),
        reason=f"{policy}: {_reason(item, chosen, view)}",
        prefix=prefix,
        predicted=chosen.predicted,
    )


def _reason(item: DispatchItem, chosen: Chosen, view: FleetView) -> str:
    parts: list[str] = []
    predicted = chosen.predicted
    if predicted is None:
        parts.append(
            f"{view.prefill_load_tokens[chosen.prefill_row] - prefill_tokens(item)} prompt tokens pending, "
            f"{view.decode_load_tokens[chosen.decode_row]} context tokens with this request"
        )
    else:
        fetching = f" + fetching {predicted.transfer_s:.3g}" if predicted.transfer_s else ""
        parts.append(
            f"TTFT {predicted.ttft_s:.3g} s = waited {predicted.waited_s:.3g} + queue {predicted.queue_s:.3g}"
            f"{fetching} + prefill {predicted.prefill_s:.3g}, TPOT {predicted.tpot_s * 1e3:.3g} ms"
        )
    if chosen.local_blocks:
        parts.append(f"{chosen.local_blocks} blocks are there")
    if chosen.source_row >= 0:
        source = view.infos[chosen.source_row]
        kind = "a store" if source.role == "store" else f"a {source.role} worker"
        parts.append(f"{chosen.source_blocks} blocks from {source.worker_id}, {kind}")
    if chosen.is_withheld:
        parts.append("nothing is copied from other prefill workers: its share of copies is used up")
    if chosen.decode_blocks:
        parts.append(f"{chosen.decode_blocks} blocks are at {view.infos[chosen.decode_row].worker_id} already")
    if item.avoid:
        rows = dict.fromkeys((chosen.prefill_row, chosen.decode_row))
        again = [view.infos[row].worker_id for row in rows if view.infos[row].worker_id in item.avoid]
        if again:
            parts.append(f"nobody else than {', '.join(again)}, to be avoided")
    return "; ".join(parts)


def rejection(
    item: DispatchItem, refused: Refused, view: FleetView, usable: Flags | None, limits: Limits | None
) -> Rejection:
    """`limits`: what its predictions could be at most; None where its class has no targets."""
    match refused.why:
        case "too_long":
            message = _too_long(item, view, usable)
        case "full":
            message = _full(item, view, usable)
        case "no_prefill":
            message = _nobody("prefill", view, usable)
        case "no_decode":
            message = _nobody("decode", view, usable)
        case "ttft" | "tpot":
            message = _misses(refused, limits)
    return Rejection(
        request_id=item.request_id,
        code=refused.code,
        message=message,
        retry_after_s=refused.retry_after_s,
        reason=refused.why,
        predicted=None if refused.best is None else refused.best.predicted,
    )


def _misses(refused: Refused, limits: Limits | None) -> str:
    predicted = None if refused.best is None else refused.best.predicted
    if predicted is None or limits is None:
        return "the targets of its class are out of reach"
    if refused.why == "ttft":
        return (
            f"predicted time to first token {predicted.ttft_s * 1e3:.0f} ms (waited {predicted.waited_s * 1e3:.0f}, "
            f"queue {predicted.queue_s * 1e3:.0f}, fetching {predicted.transfer_s * 1e3:.0f}, prefill "
            f"{predicted.prefill_s * 1e3:.0f}) is above the {limits.ttft_s * 1e3:.0f} ms that its class "
            f"allows{_of_target(limits.ttft_s, limits.ttft_target_s)}"
        )
    return (
        f"predicted time per output token {predicted.tpot_s * 1e3:.1f} ms is above the {limits.tpot_s * 1e3:.1f} ms "
        f"that its class allows{_of_target(limits.tpot_s, limits.tpot_target_s)}"
    )


def _of_target(limit_s: float, target_s: float) -> str:
    share = limit_s / target_s
    return "" if share > _NEARLY_WHOLE else f", {share:.0%} of its target for now"


def _nobody(role: str, view: FleetView, usable: Flags | None) -> str:
    present = ", ".join(
        f"{info.worker_id} ({info.role})"
        for row, info in enumerate(view.infos)
        if view.computes[row] and (usable is None or usable[row])
    )
    return f"no {role} worker can take the request (workers up: {present or 'none'})"


def _too_long(item: DispatchItem, view: FleetView, usable: Flags | None) -> str:
    tokens = view.max_prompt_tokens if usable is None else view.max_prompt_tokens[usable]
    return (
        f"a prompt of {item.prompt_tokens} tokens and an answer fit into no worker; "
        f"the largest holds {tokens.max() + 1} tokens"
    )


def _full(item: DispatchItem, view: FleetView, usable: Flags | None) -> str:
    load_tokens, readers = view.prefill_load_tokens, view.fits(item) & view.can_read
    if usable is not None:
        readers = readers & usable
    best = readers & (load_tokens == load_tokens[readers].min())
    row = least(load_tokens, wished(best, ~view.rows_of(item.avoid)))
    return (
        f"all {np.count_nonzero(readers)} prefill workers have full queues; the least loaded, "
        f"{view.infos[row].worker_id}, has {view.waiting_requests[row]} requests and {load_tokens[row]} prompt tokens "
        f"waiting"
    )


def _peer(info: WorkerInfo) -> Peer:
    return Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address)
