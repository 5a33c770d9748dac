"""Every message and pull of a simulated cluster as one line of fixed width in the program's trace."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rpc.memory import Fate

if TYPE_CHECKING:
    import random

    from kvtransfer.memory import FateModel, PullFate, PullInfo
    from rpc.memory import Latency, Message
    from simulator.program import Trace


def logged_messages(decide: Latency, trace: Trace) -> Latency:
    """`decide`, telling the trace what becomes of each message."""

    def decide_and_tell(message: Message, rng: random.Random) -> Fate | float | None:
        fate = decide(message, rng)
        method = message.method.rpartition("/")[2]
        trace.add(
            f"{message.source:14s} > {message.target:12s} {method:10s} {message.kind:8s} {message.num_bytes:>6d} B  "
            f"{_fate_of_message(fate)}"
        )
        return fate

    return decide_and_tell


def logged_pulls(decide: FateModel, trace: Trace) -> FateModel:
    """`decide`, telling the trace what will become of each pull."""

    def decide_and_tell(info: PullInfo) -> PullFate:
        fate = decide(info)
        end = "lands" if fate.error is None else f"fails after {fate.num_landed} of {fate.num_pieces} pieces"
        deaf = "" if fate.heeds_stop else ", deaf"
        trace.add(
            f"{info.holder:14s} > {info.reader:12s} {'pull':10s} {'kv':8s} {info.num_bytes:>6d} B  "
            f"{1e3 * fate.duration_s:9.3f} ms {end}{deaf}"
        )
        return fate

    return decide_and_tell


def _fate_of_message(fate: Fate | float | None) -> str:
    if fate is None:
        return f"{'':9s}    lost"
    if not isinstance(fate, Fate):
        return f"{1e3 * fate:9.3f} ms"
    repeat = "" if fate.repeat_after_s is None else f", again after {1e3 * fate.repeat_after_s:.3f} ms"
    return f"{1e3 * fate.delay_s:9.3f} ms {'' if fate.outcome == 'arrives' else fate.outcome}{repeat}".rstrip()
