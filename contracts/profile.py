"""A latency profile: what one engine on one device was measured to take, with what it holds for, as a file.

A fit that misses its held-out points is refused, both when a profile is made and when one is read: a planner that
trusts wrong costs does worse than one without.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING, Literal

import msgspec

from contracts.disk import is_full, write_atomically
from contracts.errors import ConfigError, TandemError
from contracts.latency import StepWork
from contracts.latency_models import FittedLatency
from contracts.transfer_models import LinkTransfer

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from contracts.disk import Disk

#: Largest mean relative error over the held-out points with which a fit may be used.
MAX_DECODE_ERROR = 0.05
MAX_PREFILL_ERROR = 0.10

#: Grows whenever a field is added that a study needs.
PROFILE_FORMAT: Literal["tandem-latency-profile-2"] = "tandem-latency-profile-2"

_FORMAT_FAMILY = "tandem-latency-profile-"

StepKind = Literal["prefill", "decode", "mixed"]


class ProfileRefused(TandemError):
    """A fit that is too far from what was measured to plan with."""

    code = "profile_refused"


class ProfilePoint(msgspec.Struct, frozen=True, kw_only=True):
    """One measured step beside what the fit says of it."""

    work: StepWork
    measured_s: float
    #: Relative and signed: positive where the fit takes longer.
    error: float
    held_out: bool

    @property
    def kind(self) -> StepKind:
        if self.work.num_decodes == 0:
            return "prefill"
        return "mixed" if self.work.prefill_tokens else "decode"


class FitErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Mean absolute relative errors over the held-out points of each kind.

    Nothing is fitted to mixed steps, and none is required of them: theirs says how well the rule for them holds.
    """

    prefill: float
    decode: float
    mixed: float

    @classmethod
    def of(cls, points: Iterable[ProfilePoint]) -> FitErrors:
        """Raises ValueError where no point of a kind is held out."""
        by_kind: dict[StepKind, list[float]] = {"prefill": [], "decode": [], "mixed": []}
        for point in points:
            if point.held_out:
                by_kind[point.kind].append(abs(point.error))
        for kind, errors in by_kind.items():
            if not errors:
                raise ValueError(f"no {kind} point is held out")
        return cls(**{kind: fmean(errors) for kind, errors in by_kind.items()})

    def require_usable(self, what: str) -> None:
        """Raises ProfileRefused that begins with `what` and names both figures and limits."""
        if self.decode > MAX_DECODE_ERROR or self.prefill > MAX_PREFILL_ERROR:
            raise ProfileRefused(
                f"{what}: on held-out points the fit is off by {self.decode:.1%} for decode (at most "
                f"{MAX_DECODE_ERROR:.0%}) and {self.prefill:.1%} for prefill (at most {MAX_PREFILL_ERROR:.0%})"
            )


class ServingOverheads(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a cluster adds to its engines' steps, seen by a client whose request meets no other.

    Raises ValueError for negative figures.
    """

    #: To the first token, beyond the step that reads the prompt: HTTP, gateway, placement, and the way back.
    first_token_s: float
    #: To each later token, beyond its decode step.
    step_s: float
    #: To the second token, beyond its decode step and the time that the link takes for the KV's bytes.
    handoff_s: float

    def __post_init__(self) -> None:
        if not all(0 <= seconds < math.inf for seconds in (self.first_token_s, self.step_s, self.handoff_s)):
            raise ValueError(f"an overhead must be finite and not negative: {self}")


class LatencyProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that a study needs to stand for one kind of worker."""

    format: Literal["tandem-latency-profile-2"] = PROFILE_FORMAT
    model: str
    model_fingerprint: str
    kv_token_bytes: int
    block_tokens: int
    #: Of a worker as the configuration that was profiled would start it.
    num_blocks: int
    max_context_tokens: int
    #: Device, kernels and dtype, as the engine says.
    engine: str
    hardware: str
    #: Of the engine's compute threads.
    threads: int
    versions: dict[str, str]
    #: ISO 8601, UTC.
    measured_at: str
    latency: FittedLatency
    #: What a step costs its worker beyond the engine's own time: the way to its thread and back.
    step_overhead_s: float
    #: Of a cluster of one prefill and one decode worker on this machine; None where only the engine was measured.
    serving: ServingOverheads | None = None
    #: Between two workers on this machine, where it was measured.
    transfer: LinkTransfer | None = None
    errors: FitErrors
    points: tuple[ProfilePoint, ...]


class _Format(msgspec.Struct):
    """What every version of a profile begins with."""

    format: str


async def save_profile(profile: LatencyProfile, disk: Disk, name: str) -> None:
    """Replaces the file `name` as a whole or not at all. Raises ConfigError that names it."""
    data = msgspec.json.format(msgspec.json.encode(profile), indent=2)
    try:
        await write_atomically(disk, name, data)
    except OSError as error:
        why = "the disk is full" if is_full(error) else str(error)
        raise ConfigError(f"profile {name}: cannot be written: {why}") from error


def load_profile(path: Path) -> LatencyProfile:
    """Raises ConfigError that names the path and what is wrong in it; ProfileRefused as `require_usable`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"profile {path}: cannot be read: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=_Format).format
        if found != PROFILE_FORMAT and found.startswith(_FORMAT_FAMILY):
            raise ConfigError(
                f"profile {path}: of format {found}, and {PROFILE_FORMAT} is needed: measure again with tandem profile"
            )
        profile = msgspec.json.decode(data, type=LatencyProfile)
    except msgspec.ValidationError as error:
        raise ConfigError(f"profile {path}: not a latency profile: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path}: not whole, or not JSON: {error}") from error
    profile.errors.require_usable(f"profile {path}")
    return profile
