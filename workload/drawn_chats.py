"""Chats drawn from distributions: how many turns, how long they think, which system prompt they begin with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from workload.chats import Chat, ChatTurn
from workload.checks import require_not_negative, require_positive
from workload.roots import growing_root
from workload.synthetic import generator, slo_classes

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator, Mapping

    from workload.arrivals import Arrivals
    from workload.lengths import Lengths

DEFAULT_THINK_S = 30.0
#: Longest conversation, and most system prompts.
MAX_TURNS = 1000
MAX_SYSTEM_PROMPTS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemPrompts:
    """Different system prompts, all of one length; the k-th has popularity 1 / k^`zipf_exponent`."""

    count: int
    tokens: int
    zipf_exponent: float = 1.0

    def __post_init__(self) -> None:
        require_positive(count=self.count, tokens=self.tokens)
        require_not_negative(zipf_exponent=self.zipf_exponent)
        if self.count > MAX_SYSTEM_PROMPTS:
            raise ValueError(f"count must be at most {MAX_SYSTEM_PROMPTS:,}, got {self.count}")

    def draw(self, rng: random.Random) -> Iterator[int]:
        """Numbers from 0 on, without end."""
        popularity = list(accumulate(rank**-self.zipf_exponent for rank in range(1, self.count + 1)))
        while True:
            yield rng.choices(range(self.count), cum_weights=popularity)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """A geometric number of turns, cut at `max_turns`, with the mean `mean_turns` after the cut."""

    mean_turns: float
    max_turns: int = 32
    #: Mean of the exponential time between an answer's end and the next turn; 0: none.
    mean_think_s: float = DEFAULT_THINK_S

    def __post_init__(self) -> None:
        require_not_negative(mean_think_s=self.mean_think_s)
        if not 1 <= self.max_turns <= MAX_TURNS:
            raise ValueError(f"max_turns must be between 1 and {MAX_TURNS}, got {self.max_turns}")
        if not 1 <= self.mean_turns <= self.max_turns:
            raise ValueError(f"mean_turns must be between 1 and max_turns {self.max_turns}, got {self.mean_turns}")

    @property
    def goes_on(self) -> float:
        """Probability that a turn before the last possible one is followed by another."""
        return growing_root(lambda share: _mean_turns(share, self.max_turns) - self.mean_turns, 0.0, 1.0)


def _mean_turns(goes_on: float, max_turns: int) -> float:
    return sum(goes_on**turn for turn in range(max_turns))


def draw_chats(
    *,
    arrivals: Arrivals,
    prompts: Lengths,
    outputs: Lengths,
    shape: ChatShape,
    seed: int,
    num_requests: int | None = None,
    duration_s: float | None = None,
    system_prompts: SystemPrompts | None = None,
    slo_mix: Mapping[str, float] | None = None,
) -> Iterator[Chat]:
    """Chats by arrival of their first turn; at least one bound must be given.

    `arrivals` say how often *requests* come: chats come at `1 / mean_turns` of that rate, so that turns have it on
    average, once as many chats end as begin. `prompts` are the new tokens of a turn. `num_requests` counts turns, and
    cuts the last chat; `duration_s` bounds when chats begin, not when they end.

    Arrivals, turns, lengths, thinking, system prompts and classes draw from generators of their own. Raises ValueError
    for bounds or weights that cannot be.
    """
    if num_requests is None and duration_s is None:
        raise ValueError("a synthetic workload needs num_requests or duration_s")
    if num_requests is not None:
        require_positive(num_requests=num_requests)
    if duration_s is not None:
        require_positive(duration_s=duration_s)
    times = arrivals.scaled(1.0 / shape.mean_turns).times(generator(seed, "arrivals"))
    conversations = _turns(prompts, outputs, shape, seed)
    classes = slo_classes(slo_mix or {"default": 1.0}, generator(seed, "slo_classes"))
    numbers = _numbers(system_prompts, generator(seed, "system_prompts"))
    tokens = system_prompts.tokens if system_prompts else 0
    endless = (
        Chat(arrival_s, turns, number, tokens, slo_class)
        for arrival_s, turns, number, slo_class in zip(times, conversations, numbers, classes, strict=False)
    )
    return bounded_chats(endless, num_requests, duration_s)


def bounded_chats(chats: Iterator[Chat], num_requests: int | None, duration_s: float | None) -> Iterator[Chat]:
    """Those that begin before `duration_s`, until they have `num_requests` turns; the last one is cut to that."""
    left = num_requests
    while left is None or left > 0:
        chat = next(chats, None)
        if chat is None or (duration_s is not None and chat.arrival_s >= duration_s):
            return
        yield chat if left is None or len(chat.turns) <= left else chat._replace(turns=chat.turns[:left])
        left = None if left is None else left - len(chat.turns)


def think_times(mean_think_s: float, rng: random.Random) -> Callable[[int], float]:
    """(number of a turn in its chat) -> drawn time before it; 0 before the first."""
    return lambda turn: rng.expovariate(1.0 / mean_think_s) if turn and mean_think_s else 0.0


def _numbers(system_prompts: SystemPrompts | None, rng: random.Random) -> Iterator[int]:
    if system_prompts is not None:
        yield from system_prompts.draw(rng)
    while True:
        yield 0


def _turns(prompts: Lengths, outputs: Lengths, shape: ChatShape, seed: int) -> Iterator[tuple[ChatTurn, ...]]:
    """One chat's turns after another, without end."""
    lengths, counts = generator(seed, "lengths"), generator(seed, "turns")
    think_s = think_times(shape.mean_think_s, generator(seed, "thinking"))
    goes_on = shape.goes_on
    while True:
        num_turns = 1
        while num_turns < shape.max_turns and counts.random() < goes_on:
            num_turns += 1
        yield tuple(
            ChatTurn(prompts.sample(lengths), outputs.sample(lengths), think_s(turn)) for turn in range(num_turns)
        )
