"""What people read while a cluster starts. Pure: statuses in, lines out."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from cluster.supervision import State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cluster.launch import Loading
    from cluster.node_agent import WorkerStatus
    from contracts.ids import WorkerId
    from contracts.messages import MemberRole

#: How often a growing fraction of one stage is told.
INTERVAL_S = 1.0


class ProgressLines:
    """Tells each worker's loading: each stage as it begins, and how far it is at most once a second."""

    def __init__(self) -> None:
        #: Stage, text and time of what was told last of each worker.
        self._told: dict[WorkerId, tuple[str, str, float]] = {}

    def update(self, workers: Sequence[WorkerStatus], now_s: float) -> list[str]:
        lines: list[str] = []
        for worker in workers:
            if worker.state is not State.STARTING or worker.loading is None:
                continue
            text = doing(worker.loading)
            stage, last_text, at_s = self._told.get(worker.worker_id, ("", "", 0.0))
            if worker.loading.what != stage or (text != last_text and now_s - at_s >= INTERVAL_S):
                self._told[worker.worker_id] = (worker.loading.what, text, now_s)
                lines.append(f"{worker.worker_id}: {text}")
        return lines


def doing(loading: Loading) -> str:
    """'loading weights 40%'."""
    text = f"{'waiting for' if loading.is_waiting else 'loading'} {loading.what}"
    return f"{text} {loading.fraction:.0%}" if loading.fraction else text


def starting_line(model_name: str, roles: Sequence[MemberRole]) -> str:
    """'starting demo: 1 prefill worker, 2 decode workers, 1 store'."""
    counts = Counter(roles)
    names = {role: "store" if role == "store" else f"{role} worker" for role in counts}
    parts = (f"{count} {names[role]}{'s' if count > 1 else ''}" for role, count in counts.items())
    return f"starting {model_name}: {', '.join(parts)}"


def can_serve(roles: Sequence[MemberRole]) -> bool:
    """Whether workers of these roles can finish a request together. A store takes no part in that."""
    return "mixed" in roles or {"prefill", "decode"} <= set(roles)


def settled(workers: Sequence[WorkerStatus]) -> bool:
    """Every worker of a model that is waited for is ready or given up: waiting longer brings nothing."""
    return all(worker.state in (State.READY, State.GIVEN_UP) for worker in awaited(workers))


def is_ready(workers: Sequence[WorkerStatus]) -> bool:
    """The same without those given up, but for a store: what it would have kept is computed."""
    return all(
        worker.state is State.READY or (worker.role == "store" and worker.state is State.GIVEN_UP)
        for worker in awaited(workers)
    )


def awaited(workers: Sequence[WorkerStatus]) -> list[WorkerStatus]:
    """Of one model: those that should run. A store learns from workers what KV is; where none is to come it waits."""
    wanted = [worker for worker in workers if worker.is_wanted]
    return wanted if any(worker.role != "store" for worker in wanted) else []


def why_hopeless(workers: Sequence[WorkerStatus]) -> str | None:
    """Set when the workers could finish a request together, but for those that are given up: says who is missing and
    why. Not where some were never started, or stopped on purpose."""
    wanted = [worker for worker in workers if worker.is_wanted]
    if can_serve([worker.role for worker in wanted if worker.state is not State.GIVEN_UP]):
        return None
    if not can_serve([worker.role for worker in wanted]):
        return None
    lost = [f"{w.worker_id} ({w.role}): {w.problem}" for w in workers if w.state is State.GIVEN_UP]
    return "the remaining workers cannot serve; given up were " + "; ".join(lost)


def curl_line(base_url: str, model_name: str, *, with_key: bool) -> str:
    key = " -H 'Authorization: Bearer YOUR_API_KEY'" if with_key else ""
    chat = {"model": model_name, "messages": [{"role": "user", "content": "Hello!"}], "stream": True}
    body = json.dumps(chat)
    return f"curl -N {base_url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'"
