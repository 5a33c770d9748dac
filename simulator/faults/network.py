"""The network of a simulated cluster, with faults that come and go: for calls and for pulls alike."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from contracts.errors import WorkerUnavailable
from kvtransfer.memory import PullFate
from rpc.memory import BROKEN_AFTER_S, Fate
from simulator.faults.rules import ANY, Between, Clog, Trip

if TYPE_CHECKING:
    import random

    from contracts.errors import TandemError
    from kvtransfer.memory import FateModel, PullInfo
    from rpc.memory import Latency, Message
    from simulator.faults.rules import Rule
    from simulator.program import Program

#: How often a pull that stands still looks whether it can go on.
_LOOK_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class SoundLink:
    """Any link without faults. The delays of messages are lognormal, cut at `longest_s`."""

    median_s: float = 0.0002
    #: Of the logarithm; at 0.6 one message in a hundred takes four times the median.
    sigma: float = 0.6
    longest_s: float = 0.02
    #: Of pulls. The bytes of a message take no time.
    pull_bytes_per_s: float = 4e9
    #: In how many instants the blocks of one pull land.
    pull_pieces: int = 4

    def message_delay_s(self, message: Message, rng: random.Random) -> float:
        """A `rpc.memory.Latency`."""
        return min(self.longest_s, self.median_s * math.exp(rng.gauss(0.0, self.sigma)))

    def pull_fate(self, info: PullInfo) -> PullFate:
        """A `kvtransfer.memory.FateModel`."""
        return PullFate(duration_s=self.median_s + info.num_bytes / self.pull_bytes_per_s, num_pieces=self.pull_pieces)


class FaultyNetwork:
    """What becomes of each message (`message_fate` of a MemoryNetwork) and each pull (`pull_fate` of a MemoryFabric).

    `latency_s` and `fate` say what they would be without faults. Rules are added and removed while the cluster runs;
    each draws from a random stream of its own, so that one rule more changes nothing about the others. Changes go to
    the program's trace. Hosts are those of the network; a transport is on the host that its name gives before "@".
    What a host sends to itself knows no faults.
    """

    def __init__(self, program: Program, *, latency_s: Latency, fate: FateModel) -> None:
        self._program = program
        self._latency_s = latency_s
        self._fate = fate
        #: With their random streams, in the order added.
        self._rules: dict[Rule, random.Random] = {}
        #: How often a rule of this class and scope was added.
        self._num_added: Counter[str] = Counter()

    def add(self, rule: Rule) -> None:
        assert rule not in self._rules, f"added twice: {_described(rule)}"
        stream = f"{type(rule).__name__} {rule.scope}"
        self._num_added[stream] += 1
        self._rules[rule] = self._program.rng(f"faults/network/{stream}/{self._num_added[stream]}")
        self._note(_described(rule))

    def remove(self, rule: Rule) -> None:
        """Of a rule that is not there: nothing. What was sent before keeps its fate."""
        if self._rules.pop(rule, None) is not None:
            self._note(f"over: {_described(rule)}")

    def heal(self) -> None:
        """Removes all rules."""
        for rule in list(self._rules):
            self.remove(rule)

    def clog(self, host: str, duration_s: float) -> Clog:
        """Holds back what goes to and from a host, for so long (or until it is removed: for what is sent later)."""
        loop = asyncio.get_running_loop()
        rule = Clog(Between(host, ANY), loop.time() + duration_s)
        self.add(rule)
        loop.call_later(duration_s, self.remove, rule)
        return rule

    def describe(self) -> list[str]:
        """The active rules, for people."""
        return [_described(rule) for rule in self._rules]

    def message_fate(self, message: Message, rng: random.Random) -> Fate | float | None:
        """A `rpc.memory.Latency`. Rules change nothing about messages that are no plain delay without them."""
        sound = self._latency_s(message, rng)
        if not self._rules or sound is None or isinstance(sound, Fate):
            return sound
        trip = self._travel(message.source, message.target, message.num_bytes, sound, is_pull=False)
        if trip.outcome == "arrives" and trip.repeat_after_s is None:
            return trip.delay_s
        return Fate(delay_s=trip.delay_s, outcome=trip.outcome, repeat_after_s=trip.repeat_after_s)

    def pull_fate(self, info: PullInfo) -> PullFate:
        """A `kvtransfer.memory.FateModel`. Rules change nothing about pulls that fail without them."""
        sound = self._fate(info)
        holder, reader = _host(info.holder), _host(info.reader)
        if sound.error is not None or holder == reader:
            return sound
        # Even without rules now: some may come while it is under way.
        sound = replace(sound, obstacle=_Standstill(self, holder, reader))
        if not self._rules:
            return sound
        trip = self._travel(holder, reader, info.num_bytes, sound.duration_s, is_pull=True)
        heeds_stop = sound.heeds_stop and trip.heeds_stop
        if trip.outcome == "arrives":
            return replace(sound, duration_s=trip.delay_s, heeds_stop=heeds_stop)
        noticed_s = BROKEN_AFTER_S if trip.outcome == "lost" else 0.0
        return replace(
            sound,
            duration_s=trip.delay_s * trip.landed_share + noticed_s,
            error=WorkerUnavailable(f"pull from {info.holder}: the connection broke ({trip.outcome})"),
            heeds_stop=heeds_stop,
            num_landed=int(sound.num_pieces * trip.landed_share),
        )

    def blocked(self, source: str, target: str) -> bool:
        """Whether nothing passes between two hosts, in one of the two directions at least."""
        return any(
            rule.blocks() and (rule.scope.covers(source, target) or rule.scope.covers(target, source))
            for rule in self._rules
        )

    def _note(self, text: str) -> None:
        self._program.trace.add(f"{'network':14s} {text}")

    def _travel(self, source: str, target: str, num_bytes: int, delay_s: float, *, is_pull: bool) -> Trip:
        now_s = asyncio.get_running_loop().time()
        trip = Trip(source=source, target=target, num_bytes=num_bytes, is_pull=is_pull, now_s=now_s, delay_s=delay_s)
        if source == target:
            return trip
        for rule, rng in self._rules.items():
            if rule.scope.covers(source, target):
                rule.affect(trip, rng)
                if trip.outcome != "arrives":
                    break
        return trip


class _Standstill:
    """The obstacle of one pull: it waits out short interruptions; a long one breaks the connection."""

    def __init__(self, network: FaultyNetwork, holder: str, reader: str) -> None:
        self._network = network
        self._holder = holder
        self._reader = reader
        self._silent_s = 0.0

    def __call__(self) -> float | TandemError | None:
        if not self._network.blocked(self._holder, self._reader):
            self._silent_s = 0.0
            return None
        if self._silent_s >= BROKEN_AFTER_S:
            return WorkerUnavailable(f"pull from {self._holder}: no sign of life for {BROKEN_AFTER_S:g} s")
        self._silent_s += _LOOK_S
        return _LOOK_S


def _host(transport: str) -> str:
    return transport.partition("@")[0]


def _described(rule: Rule) -> str:
    return f"{rule.scope}: {rule.describe()}"
