"""SLO classes: the latency targets that a request is to meet, both of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from contracts.config import parse_duration_s
from contracts.errors import ConfigError
from workload.checks import require_positive
from workload.nearest import did_you_mean


@dataclass(frozen=True, slots=True)
class SloClass:
    """Targets of the requests that carry this name."""

    name: str
    #: Time to first token, at most.
    ttft_ms: float
    #: Mean time per output token after the first, at most.
    tpot_ms: float

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("an SLO class needs a name")
        require_positive(ttft_ms=self.ttft_ms, tpot_ms=self.tpot_ms)

    def attained(self, *, ttft_s: float, tpot_s: float | None) -> bool:
        """Whether a finished request met both targets; `tpot_s` is None for an answer of one token, which meets it."""
        return ttft_s * 1e3 <= self.ttft_ms and (tpot_s is None or tpot_s * 1e3 <= self.tpot_ms)


def _presets(*classes: SloClass) -> dict[str, SloClass]:
    return {each.name: each for each in classes}


#: DistServe (OSDI'24, table 1). The authors set them by experience, for A100-80G.
PUBLISHED_SLOS: dict[str, SloClass] = _presets(
    SloClass("distserve-chat-opt-13b", 250.0, 100.0),
    SloClass("distserve-chat-opt-66b", 2_500.0, 150.0),
    SloClass("distserve-chat-opt-175b", 4_000.0, 200.0),
    SloClass("distserve-code-opt-66b", 125.0, 200.0),
    SloClass("distserve-summary-opt-66b", 15_000.0, 150.0),
)


#: Of a class that is given by its targets alone.
UNNAMED = "default"

_FORMS = "NAME:TTFT_MS,TPOT_MS or ttft=250ms,tpot=100ms"


def parse_slo(text: str) -> SloClass:
    """`NAME:TTFT_MS,TPOT_MS`, as in `interactive:300,50`; `ttft=DURATION,tpot=DURATION`, with `NAME:` before it or
    without; or a published name. Raises ConfigError."""
    name, colon, targets = text.partition(":")
    if not colon and "=" in text:
        name, targets = UNNAMED, text
    elif not colon:
        if text in PUBLISHED_SLOS:
            return PUBLISHED_SLOS[text]
        raise ConfigError(f"SLO {text!r}: not {_FORMS}, and no published class{did_you_mean(text, PUBLISHED_SLOS)}")
    ttft, comma, tpot = targets.partition(",")
    if not comma:
        raise ConfigError(
            f"SLO {text!r}: not NAME:TTFT_MS,TPOT_MS, as in interactive:300,50, nor ttft=250ms,tpot=100ms"
        )
    try:
        if "=" in targets:
            return SloClass(name, _named_ms("ttft", ttft), _named_ms("tpot", tpot))
        return SloClass(name, float(ttft), float(tpot))
    except ValueError as error:
        raise ConfigError(f"SLO {text!r}: {error}; the form is {_FORMS}") from error


def _named_ms(name: str, text: str) -> float:
    """`ttft=250ms` -> 250.0; a number without a unit is in seconds."""
    found, _, value = (part.strip() for part in text.partition("="))
    if found != name:
        raise ValueError(f"{text.strip()!r} stands where {name}= should")
    return cast("float", parse_duration_s(value)) * 1e3
