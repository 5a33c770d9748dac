"""From flags to a workload that can be read again and again: its items in time, its classes, what to know about it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from contracts.errors import ConfigError
from workload.asked import resolve
from workload.chats import Chat
from workload.flatten import flatten
from workload.named import MAX_REQUESTS
from workload.sources import MAX_PROMPT_TOKENS, open_source
from workload.transform import ContextClip, at_speed, scaled_block_tokens, scaled_lengths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from workload.asked import Asked
    from workload.cancel import Cancellations
    from workload.flags import WorkloadFlags
    from workload.request import WorkloadRequest
    from workload.slo import SloClass
    from workload.sources import Source

#: From the first arrival to the last: an idle simulated cluster still has heartbeats.
MAX_SPAN_S = 366 * 86_400.0
#: Beyond this all come at once, and say so better.
MAX_RATE_RPS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Of one pass over a workload."""

    #: Turns of chats are requests.
    num_requests: int
    num_chats: int
    #: Lone requests, and chats.
    num_items: int
    #: From the first item's arrival to the last one's. A chat arrives with its first turn.
    span_s: float
    #: Of a chat's later turns with all that was said before.
    prompt_tokens: int
    output_tokens: int

    @property
    def rate_rps(self) -> float | None:
        """Of requests, while items arrive; None where all come at once."""
        if self.span_s <= 0:
            return None
        return (self.num_items - 1) / self.span_s * (self.num_requests / self.num_items)


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """A workload that can be read again and again, also faster or slower than asked for."""

    text: str
    #: Plain data that repeats it.
    facts: dict[str, object]
    slos: tuple[SloClass, ...]
    #: As asked for.
    totals: Totals
    warnings: tuple[str, ...]
    #: None: every client stays to the end.
    cancel: Cancellations | None
    #: Before `--speed` or `--rate`, which make time run so many times faster.
    source: Callable[[], Iterable[WorkloadRequest | Chat]]
    speed: float

    def items(self, factor: float = 1.0) -> Iterable[WorkloadRequest | Chat]:
        """By arrival, at `factor` times the rate that was asked for. Chats come as often, and think as long as ever."""
        speed = self.speed * factor
        return self.source() if speed == 1.0 else at_speed(self.source(), speed)

    def requests(self, factor: float = 1.0) -> Iterable[WorkloadRequest]:
        """The same with turns of chats as lone requests, each at a time that is assumed: see `flatten`."""
        items = self.items(factor)
        if not self.totals.num_chats:
            return cast("Iterable[WorkloadRequest]", items)
        return flatten(cast("Iterable[Chat]", items), {slo.name: slo for slo in self.slos})


def build_traffic(flags: WorkloadFlags, count_tokens: Callable[[str], int] | None = None) -> Traffic:
    """`count_tokens` of a conversation's texts; None: about four characters are taken for one.

    Raises ConfigError that names the flag, `file: key` of a workload file, or `file:line` of a trace.
    """
    asked = resolve(flags)
    source = open_source(asked, count_tokens)
    _check_lengths(asked, source)
    clip = _clip(asked)
    totals = _totals(_fitted(source, asked, clip), asked)
    speed = _speed(asked, totals)
    totals = replace(totals, span_s=totals.span_s / speed)
    _check_time(totals)
    return Traffic(
        text=_text(asked, source, totals, speed),
        facts=_facts(asked, source, totals, speed),
        slos=asked.slos,
        totals=totals,
        warnings=(*source.warnings, *_clipped(asked, clip, totals)),
        cancel=asked.cancel,
        source=lambda: _fitted(source, asked, _clip(asked)),
        speed=speed,
    )


def _check_lengths(asked: Asked, source: Source) -> None:
    if asked.scale_lengths is not None and source.hash_block_tokens:
        try:
            scaled_block_tokens(source.hash_block_tokens, asked.scale_lengths)
        except ValueError as error:
            raise ConfigError(f"{asked.said('scale_lengths')}: {error}") from error
    if asked.system_prompts is not None and asked.max_context_tokens is not None:
        tokens = asked.system_prompts.tokens * (asked.scale_lengths or 1.0)
        if asked.max_context_tokens < tokens + 3:
            raise ConfigError(f"{asked.said('max_context')}: leaves no room behind system prompts of {tokens:g} tokens")


def _clip(asked: Asked) -> ContextClip | None:
    return None if asked.max_context_tokens is None else ContextClip(asked.max_context_tokens)


def _fitted(source: Source, asked: Asked, clip: ContextClip | None) -> Iterable[WorkloadRequest | Chat]:
    """One pass, scaled and clipped."""
    items = source.items()
    if asked.scale_lengths is not None:
        items = scaled_lengths(items, asked.scale_lengths)
    return items if clip is None else clip.apply(items)


def _totals(items: Iterable[WorkloadRequest | Chat], asked: Asked) -> Totals:
    num_requests = num_chats = num_items = prompt_tokens = output_tokens = 0
    first_s = last_s = 0.0
    for item in items:
        if num_items == 0:
            first_s = item.arrival_s
        num_items += 1
        last_s = item.arrival_s
        if isinstance(item, Chat):
            prompts = item.prompt_tokens()
            num_chats += 1
            num_requests += len(prompts)
            longest = prompts[-1]
            prompt_tokens += sum(prompts)
            output_tokens += sum(turn.output_tokens for turn in item.turns)
        else:
            num_requests += 1
            longest = item.prompt_tokens
            prompt_tokens += longest
            output_tokens += item.output_tokens
        if longest > MAX_PROMPT_TOKENS:
            raise ConfigError(f"a prompt of {longest:,} tokens: at most {MAX_PROMPT_TOKENS:,} can be")
    if num_requests == 0:
        raise ConfigError(f"{asked.said('duration')}: no request arrives before it is over")
    if num_requests > MAX_REQUESTS:
        raise ConfigError(f"{asked.said('duration')}: brings more than {MAX_REQUESTS:,} requests")
    return Totals(
        num_requests=num_requests,
        num_chats=num_chats,
        num_items=num_items,
        span_s=last_s - first_s,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
    )


def _speed(asked: Asked, totals: Totals) -> float:
    if asked.rate_rps is None:
        return asked.speed or 1.0
    if totals.rate_rps is None:
        raise ConfigError(f"{asked.said('rate')}: all requests of the workload come at once, it has no rate to scale")
    return asked.rate_rps / totals.rate_rps


def _check_time(totals: Totals) -> None:
    if totals.span_s > MAX_SPAN_S:
        raise ConfigError(
            f"the requests arrive over {totals.span_s / 86_400:,.4g} days: at most {MAX_SPAN_S / 86_400:g} are "
            f"allowed; --speed, --rate or --duration shorten them"
        )
    if totals.rate_rps is not None and totals.rate_rps > MAX_RATE_RPS:
        raise ConfigError(f"{totals.rate_rps:.4g} requests per second: at most {MAX_RATE_RPS:g} are allowed")


def _text(asked: Asked, source: Source, totals: Totals, speed: float) -> str:
    name = source.name if asked.file is None else f"{asked.file.stem}: {source.name}"
    chats = f" of {totals.num_chats:,} chats" if totals.num_chats else ""
    rate = "all at once" if totals.rate_rps is None else f"in {totals.span_s:,.1f} s ({totals.rate_rps:,.3f}/s)"
    lengths = "" if asked.scale_lengths is None else f", lengths scaled {asked.scale_lengths:.4g} times"
    scaled = "" if speed == 1.0 else f", time scaled {speed:.4g} times"
    prompt_tokens = totals.prompt_tokens / totals.num_requests
    output_tokens = totals.output_tokens / totals.num_requests
    return (
        f"{name}: {totals.num_requests:,} requests{chats} {rate}{scaled}{lengths}, on average {prompt_tokens:,.0f} "
        f"prompt and {output_tokens:,.0f} output tokens"
    )


def _facts(asked: Asked, source: Source, totals: Totals, speed: float) -> dict[str, object]:
    return {
        "workload_file": None if asked.file is None else str(asked.file),
        **source.facts,
        "num_requests": totals.num_requests,
        "num_chats": totals.num_chats,
        "start_s": asked.start_s,
        "duration_s": asked.duration_s,
        "speed": speed,
        "scale_lengths": asked.scale_lengths,
        "max_context_tokens": asked.max_context_tokens,
        "cancel": asked.cancel,
        "seed": asked.seed,
        "slos": asked.slos,
        "slo_mix": asked.slo_mix,
    }


def _clipped(asked: Asked, clip: ContextClip | None, totals: Totals) -> tuple[str, ...]:
    if clip is None or not (clip.num_clipped or clip.num_dropped_turns):
        return ()
    dropped = f", and {clip.num_dropped_turns:,} turns of chats left out" if clip.num_dropped_turns else ""
    return (
        f"{clip.num_clipped:,} of {totals.num_requests:,} requests cut to a context of {asked.max_context_tokens:,} "
        f"tokens: {clip.clipped_prompt_tokens:,} prompt and {clip.clipped_output_tokens:,} output tokens less{dropped}",
    )
