"""The worker shell that the live process and the simulation share: step loop, frames, heartbeats, rpc handlers.

A worker holds both sides; its role says which requests the coordinator sends it. `WorkerShell` is put
together by a composition root, which brings engine, transport, network and clock.
"""

from worker.frames import FrameOutbox
from worker.shell import WorkerLimits, WorkerShell
from worker.step_loop import StepLoop
from worker.watchdog import LifeOver, Watchdog, WatchdogLimits

__all__ = ["FrameOutbox", "LifeOver", "StepLoop", "Watchdog", "WatchdogLimits", "WorkerLimits", "WorkerShell"]
