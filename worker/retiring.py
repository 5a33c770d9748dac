"""How a worker leaves that was told to from outside (SIGTERM): it drains, within the time that it has.

Its requests are moved away by the coordinator, as those of any worker that drains; what is still here when the time is
over fails, and gateways replay it elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.control_messages import OPERATE, DrainOperation, OperateRequest
from contracts.errors import TandemError

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from rpc import Network
    from worker.standing import Standing

#: Between looks at what is left.
LOOK_INTERVAL_S = 0.05
#: Empty for so long: what was placed here before the drain was known has come by then, and gone.
SETTLE_S = 1.0
#: Of telling the coordinator.
ASK_TIMEOUT_S = 1.0


async def retire(
    standing: Standing,
    *,
    reason: str,
    within_s: float,
    network: Network,
    coordinator_address: str,
    clock: Clock,
    log: Callable[[str], None],
) -> bool:
    """Returns when nothing is left here, or `within_s` is over; whether nothing is left. Never raises."""
    worker_id, until_s = standing.info.worker_id, clock.now_s() + within_s
    standing.leave(reason)
    log(f"{worker_id} leaves within {within_s:g} s ({reason}): {standing.open_work()} are open")
    ask = OperateRequest(operation=DrainOperation(worker_id=worker_id, within_s=within_s, force=True), by=worker_id)
    try:
        await network.channel(coordinator_address).call(OPERATE, ask, timeout_s=min(within_s, ASK_TIMEOUT_S))
    except TandemError as error:
        # Heartbeats say that it drains, too; another operation may have it already.
        log(f"the coordinator does not look after the leaving of {worker_id}: {error.message}")
    empty_since_s: float | None = None
    while (now_s := clock.now_s()) < until_s:
        if not standing.is_drained:
            empty_since_s = None
        elif empty_since_s is None:
            empty_since_s = now_s
        elif now_s - empty_since_s >= SETTLE_S:
            log(f"{worker_id} has nothing left")
            return True
        await clock.sleep(LOOK_INTERVAL_S)
    log(f"{worker_id} leaves with {standing.open_work()} open")
    return not any(standing.open_work())
