"""From the configuration to what compares the workload with the plan."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cluster.planner_child import ChildPlanner
from coordinator.replan_terms import PartlyExpected, ReplanRules
from coordinator.replanner import Replanner
from coordinator.split_question import split_question

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from contracts.clock import Clock
    from contracts.config import ClusterConfig
    from coordinator.conductor import Conductor
    from coordinator.costs import CostSource
    from coordinator.replan_terms import Ask, Split
    from coordinator.replanner import Planner
    from coordinator.split_question import SplitQuestion
    from workload.slo import SloClass


@asynccontextmanager
async def replanning(
    config: ClusterConfig,
    conductor: Conductor,
    costs: CostSource,
    slos: Mapping[str, SloClass],
    clock: Clock,
    log: Callable[[str], None],
    *,
    planner: Planner | None = None,
    apply: Callable[[Split], None] | None = None,
) -> AsyncGenerator[Replanner | None]:
    """Yields what is to hear of decisions; None where replanning is off. `planner`: None for one in a process of its
    own. `apply` begins to carry a split out."""
    if config.coordinator.replan.mode == "off":
        yield None
        return
    max_sequences = min(pool.max_sequences or config.engine.max_sequences for pool in config.pools)

    def class_of(name: str) -> str | None:
        return name if name in slos else config.default_slo_class

    def question(ask: Ask, classes: Sequence[str | None]) -> SplitQuestion:
        fleet = conductor.fleet
        return split_question(
            ask,
            [fleet.info_at(row) for row in range(len(fleet))],
            costs,
            slos=tuple(slos.values()),
            classes=classes,
            max_sequences=max_sequences,
            max_batch_tokens=config.engine.max_batch_tokens,
        )

    replanner = Replanner(
        clock,
        replan_rules(config),
        expected_workload(config),
        answers=conductor.fleet.answer_lengths,
        class_of=class_of,
        question=question,
        planner=planner or ChildPlanner(),
        tell=log,
        apply=apply,
    )
    async with replanner:
        yield replanner


def replan_rules(config: ClusterConfig) -> ReplanRules:
    replan = config.coordinator.replan
    return ReplanRules(mode=replan.mode, window_s=replan.window_s, drift=replan.drift)


def expected_workload(config: ClusterConfig) -> PartlyExpected:
    expected = config.coordinator.replan.expected
    return PartlyExpected(
        rate_rps=expected.rate_rps,
        mean_prompt_tokens=expected.prompt_tokens,
        p95_prompt_tokens=expected.p95_prompt_tokens,
        mean_output_tokens=expected.answer_tokens,
    )
