"""`tandem` whose workers are those of `tests.support.chaos_worker`: `python -m tests.support.chaos_serve serve …`."""

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

PROGRAM = (sys.executable, "-m", "tests.support.chaos_serve")


class MeddlingAgent(NodeAgent):
    def __init__(self, plans: Sequence[WorkerPlan], **limits: Any) -> None:
        command = (sys.executable, "-m", "tests.support.chaos_worker")
        super().__init__([replace(plan, command=command) for plan in plans], **limits)


if __name__ == "__main__":
    with mock.patch.object(cluster.local, "NodeAgent", MeddlingAgent):
        main()
