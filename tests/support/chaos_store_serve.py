"""`tandem` whose workers are those of `tests.support.chaos_worker` and whose store is that of
`tests.support.chaos_store`: `python -m tests.support.chaos_store_serve serve …`."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import cluster.local
from cluster.cli import main
from cluster.node_agent import NodeAgent, WorkerPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = (sys.executable, "-m", "tests.support.chaos_store_serve")


def _meddled(plan: WorkerPlan) -> WorkerPlan:
    module = "tests.support.chaos_store" if plan.launch.role == "store" else "tests.support.chaos_worker"
    return replace(plan, command=(sys.executable, "-m", module))


class MeddlingAgent(NodeAgent):
    def __init__(self, plans: Sequence[WorkerPlan], **limits: Any) -> None:
        super().__init__([_meddled(plan) for plan in plans], **limits)


if __name__ == "__main__":
    with mock.patch.object(cluster.local, "NodeAgent", MeddlingAgent):
        main()
