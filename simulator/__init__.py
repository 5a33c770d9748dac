"""The simulating composition root: virtual time, a modelled engine, and programs that repeat exactly."""

from __future__ import annotations

from simulator.clock import VirtualClock
from simulator.engine import ModelledEngine, ModelTiming, StepCosts, StepTiming, expected_tokens, modelled_identity
from simulator.loop import LimitReached, SimulationError, StuckProgram, ThreadsRefused, VirtualLoop
from simulator.program import Program, Trace, run

__all__ = [
    "LimitReached",
    "ModelTiming",
    "ModelledEngine",
    "Program",
    "SimulationError",
    "StepCosts",
    "StepTiming",
    "StuckProgram",
    "ThreadsRefused",
    "Trace",
    "VirtualClock",
    "VirtualLoop",
    "expected_tokens",
    "modelled_identity",
    "run",
]
