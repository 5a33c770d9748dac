"""What was asked for: the flags, and below them a workload file where one is named. Checked, and nothing drawn yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.config import parse_duration_s
from contracts.errors import ConfigError
from workload.cancel import Cancellations, parse_cancel
from workload.drawn_chats import SystemPrompts
from workload.named import MAX_REQUESTS, find_workload, read_workload
from workload.slo import SloClass, parse_slo
from workload.spec import parse_outputs

if TYPE_CHECKING:
    from pathlib import Path

    from workload.flags import WorkloadFlags
    from workload.named import ChatsSection, WorkloadFile

DEFAULT_SLO = "interactive:1000,50"

_MAX_DURATION_S = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """None: not said."""

    #: The workload file, and what it says it is.
    file: Path | None
    description: str
    trace: Path | None
    arrivals: str | None
    prompts: str | None
    outputs: str | None
    system_prompts: SystemPrompts | None
    chats: ChatsSection | None
    #: Replaces the chats' own.
    think_s: float | None
    slos: tuple[SloClass, ...]
    #: Weight of each class.
    slo_mix: dict[str, float]
    cancel: Cancellations | None
    num_requests: int | None
    start_s: float
    duration_s: float | None
    speed: float | None
    rate_rps: float | None
    scale_lengths: float | None
    max_context_tokens: int | None
    seed: int
    flags: WorkloadFlags

    def said(self, key: str) -> str:
        """How it was said, for errors: a flag and its value, or file and key."""
        value: object = getattr(self.flags, key, None)
        if value is not None or self.file is None:
            return f"--{key.replace('_', '-')} {f'{value:g}' if isinstance(value, float) else value}"
        return f"{self.file}: {key}"


def resolve(flags: WorkloadFlags) -> Asked:
    """Raises ConfigError that names the flag, or the file and its key."""
    _check(flags)
    path = None if flags.workload is None else find_workload(flags.workload)
    file = None if path is None else read_workload(path)
    _check_beside(flags, file)
    slos, slo_mix = _slos(flags, file)
    duration_s = _duration_s("--duration", flags.duration)
    if duration_s == 0:
        raise ConfigError(f"--duration {flags.duration}: must be above 0")
    num_requests, speed, rate_rps = flags.requests, flags.speed, flags.rate
    if file is not None and num_requests is None and duration_s is None:
        num_requests, duration_s = file.requests, file.duration
    if file is not None and speed is None and rate_rps is None and flags.arrivals is None:
        speed, rate_rps = file.speed, file.rate
    start_s = _duration_s("--start", flags.start)
    trace = flags.trace
    if file is not None and file.trace is not None:
        assert path is not None
        trace = path.parent / file.trace
    prompts = file.system_prompts if file else None
    return Asked(
        file=path,
        description=file.description if file else "",
        trace=trace,
        arrivals=flags.arrivals or (file.arrivals if file else None),
        prompts=flags.prompts or (file.prompts if file else None),
        outputs=flags.outputs or (file.outputs if file else None),
        system_prompts=None
        if prompts is None
        else SystemPrompts(count=prompts.count, tokens=prompts.tokens, zipf_exponent=prompts.zipf),
        chats=file.chats if file else None,
        think_s=_duration_s("--think", flags.think),
        slos=slos,
        slo_mix=slo_mix,
        cancel=_cancel(flags, file),
        num_requests=num_requests,
        start_s=(file.start if file and start_s is None else start_s) or 0.0,
        duration_s=duration_s,
        speed=speed,
        rate_rps=rate_rps,
        scale_lengths=flags.scale_lengths or (file.scale_lengths if file else None),
        max_context_tokens=flags.max_context or (file.max_context if file else None),
        seed=flags.seed,
        flags=flags,
    )


def _check(flags: WorkloadFlags) -> None:
    if flags.speed is not None and flags.rate is not None:
        raise ConfigError("--speed and --rate: give one of them")
    for name in ("speed", "rate"):
        value: float | None = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name} {value:g}: must be a number above 0")
    if flags.requests is not None and not 1 <= flags.requests <= MAX_REQUESTS:
        raise ConfigError(f"--requests {flags.requests}: must be between 1 and {MAX_REQUESTS:,}")
    if flags.scale_lengths is not None and not 0 < flags.scale_lengths <= 1:
        raise ConfigError(f"--scale-lengths {flags.scale_lengths:g}: must be above 0 and at most 1")
    if flags.max_context is not None and flags.max_context < 2:
        raise ConfigError(f"--max-context {flags.max_context}: must be at least 2")


def _check_beside(flags: WorkloadFlags, file: WorkloadFile | None) -> None:
    """Flags that need a trace, or that one says already."""
    if file is not None and flags.trace is not None:
        raise ConfigError(f"--trace: --workload {flags.workload} says what is asked; give one of them")
    has_trace = flags.trace is not None or (file is not None and file.trace is not None)
    if flags.spread_ties and not has_trace:
        raise ConfigError("--spread-ties: needs a --trace")
    if has_trace:
        for name in ("prompts", "outputs"):
            if getattr(flags, name) is not None:
                raise ConfigError(f"--{name}: a --trace says this already")
    elif flags.start is not None:
        raise ConfigError("--start: needs a --trace")


def _slos(flags: WorkloadFlags, file: WorkloadFile | None) -> tuple[tuple[SloClass, ...], dict[str, float]]:
    if file is not None and not flags.slo:
        classes = tuple(SloClass(name, section.ttft_ms, section.tpot_ms) for name, section in file.slo.items())
        return classes, {name: section.share for name, section in file.slo.items()}
    slos = tuple(parse_slo(text) for text in flags.slo or (DEFAULT_SLO,))
    if len({slo.name for slo in slos}) < len(slos):
        raise ConfigError(f"--slo: each class needs a name of its own: {', '.join(slo.name for slo in slos)}")
    return slos, {slo.name: 1.0 for slo in slos}


def _cancel(flags: WorkloadFlags, file: WorkloadFile | None) -> Cancellations | None:
    if flags.cancel is not None:
        return parse_cancel(flags.cancel, flags.seed)
    section = file.cancel if file else None
    if section is None:
        return None
    lengths = None if section.after_tokens is None else parse_outputs(section.after_tokens)
    return Cancellations(seed=flags.seed, share=section.share, lengths=lengths)


def _duration_s(flag: str, text: str | None) -> float | None:
    """`None` when not given."""
    if text is None:
        return None
    try:
        duration_s = parse_duration_s(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {error}") from error
    if not isinstance(duration_s, float) or not 0 <= duration_s < _MAX_DURATION_S:
        raise ConfigError(f"{flag} {text}: not a possible time")
    return duration_s
