"""What workers told of themselves, as rows for `coordinator.policy.virtual_usage`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from coordinator.policy.fleet_view import count_of
from coordinator.policy.virtual_usage import WorkerUse, usage_view

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from contracts.ids import WorkerId
    from contracts.messages import WorkerInfo, WorkerLoad
    from coordinator.conductor import Conductor
    from coordinator.membership import Standing
    from coordinator.policy.virtual_usage import UsageView


class Expected(NamedTuple):
    """What was asked of a worker and is in no report of it yet."""

    moving_out: int = 0
    moving_in: int = 0
    arriving_blocks: int = 0
    #: Prompts, and what reading them takes: more where they are to come, fewer where they are to leave.
    prompts: int = 0
    reading_s: float = 0.0

    def plus(self, other: Expected) -> Expected:
        return Expected(
            self.moving_out + other.moving_out,
            self.moving_in + other.moving_in,
            self.arriving_blocks + other.arriving_blocks,
            self.prompts + other.prompts,
            self.reading_s + other.reading_s,
        )


NOTHING = Expected()


def use_of(
    info: WorkerInfo,
    load: WorkerLoad,
    *,
    kv_class: int = 0,
    model_class: int = 0,
    is_up: bool = True,
    is_draining: bool = False,
    keeps_answers: bool = False,
    queue_s: float = 0.0,
    expected: Expected = NOTHING,
) -> WorkerUse:
    """`queue_s`: until it will have read the prompts that it has. `is_draining`: it drains, whatever it tells;
    `keeps_answers`: only its prompts are to leave then."""
    writes, reads = info.role in ("decode", "mixed"), info.role in ("prefill", "mixed")
    preempted, waiting_prompts = count_of(load.preempted_answers), count_of(load.waiting_prompts)
    return WorkerUse(
        worker_id=info.worker_id,
        total_blocks=count_of(info.total_blocks),
        available_blocks=count_of(load.available_blocks),
        block_tokens=info.identity.layout.block_tokens,
        kv_class=kv_class,
        model_class=model_class,
        reads=reads,
        writes=writes,
        is_up=is_up,
        is_draining=is_draining or load.draining,
        keeps_answers=keeps_answers,
        priorities=load.priorities,
        preempted_answers=preempted,
        head_blocks=count_of(load.head_demand_blocks),
        queued_blocks=count_of(load.queued_demand_blocks),
        # What its holder has on offer waits for this worker and no other.
        head_moves=preempted > 0 or (waiting_prompts > 0 and not load.waiting_offers),
        waiting_prompts=max(0, waiting_prompts + expected.prompts),
        queue_s=max(0.0, queue_s + expected.reading_s),
        moving_out=count_of(load.moving_out) + expected.moving_out,
        moving_in=count_of(load.moving_in) + expected.moving_in,
        arriving_blocks=expected.arriving_blocks,
    )


def usage_of(
    conductor: Conductor,
    standing: Standing,
    closed: frozenset[WorkerId],
    expected: Mapping[WorkerId, Expected],
    now_s: float,
    *,
    keep_answers: Collection[WorkerId] = (),
) -> UsageView:
    """The workers that have told of their load, in order of their ids. Suspects, and whoever is not heard, are not up;
    those in `closed` drain, but the answers of those in `keep_answers` stay."""
    fleet = conductor.fleet
    outlook = fleet.outlook()
    queue_s = outlook.queue_s(-1, now_s).tolist()
    kv_class = fleet.view().kv_class.tolist()
    model_classes: dict[str, int] = {}
    away = standing.suspects | standing.unheard
    uses: list[WorkerUse] = []
    for row, load in enumerate(fleet.loads):
        info = fleet.info_at(row)
        if load is None or info.role == "store":
            continue
        uses.append(
            use_of(
                info,
                load,
                kv_class=kv_class[row],
                model_class=model_classes.setdefault(info.identity.model_fingerprint, len(model_classes)),
                is_up=info.worker_id not in away,
                is_draining=info.worker_id in closed,
                keeps_answers=info.worker_id in keep_answers,
                queue_s=queue_s[row] if outlook.knows_reading else 0.0,
                expected=expected.get(info.worker_id, NOTHING),
            )
        )
    return usage_view(uses)
