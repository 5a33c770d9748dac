"""Where a study takes its latencies from: a profile, a roofline, or a published fit. One line says which."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

from contracts.errors import ConfigError
from contracts.latency_models import DISTSERVE_OPT
from contracts.profile import load_profile
from contracts.roofline import DEVICES, MODELS, Efficiencies, Roofline, kv_blocks_that_fit, shape_from_config
from simulator.heap.spec import MESSAGE_S, MESSAGES_OF_HANDOFF, MESSAGES_TO_FIRST_TOKEN
from workload.nearest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.latency import LatencyModel
    from contracts.profile import LatencyProfile
    from contracts.roofline import DeviceSpec, ModelShape
    from contracts.transfer_models import LinkTransfer
    from simulator.study.flags import LatencyFlags

_Name = TypeVar("_Name", bound=str)
_Value = TypeVar("_Value")

#: The roofline's shares when nothing is said: about what DistServe's published fits of OPT on A100 reach of the
#: data sheet (compute 49 to 81 %, weights read at 35 to 63 % of the bandwidth).
DEFAULT_COMPUTE_EFFICIENCY = 0.6
DEFAULT_MEMORY_EFFICIENCY = 0.5
DEFAULT_MODEL = "llama-3-8b"
DEFAULT_DEVICE = "h100-sxm"

#: DistServe has a second fit for larger batches, which is not in here.
_DISTSERVE_MAX_SEQUENCES = 94

#: Flags that say something of a roofline alone.
_OF_ROOFLINE = ("device", "tensor_parallel", "compute_efficiency", "memory_efficiency", "step_overhead_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What steps cost, and what the same source says of a worker."""

    #: One line for people; and plain data that repeats it.
    text: str
    facts: Mapping[str, object]
    latency: LatencyModel
    kv_token_bytes: int
    #: Tokens that a worker's KV pool holds, where the cluster file does not say.
    kv_tokens: int
    #: Of one worker.
    num_devices: int = 1
    max_context_tokens: int | None = None
    #: Fields of a `StudySpec`.
    between_steps_s: float = 0.0
    gateway_s: float = 0.0
    message_s: float = MESSAGE_S
    #: Measured between two workers, where it was.
    transfer: LinkTransfer | None = None
    #: Larger batches than this are extrapolated; None: as far as known the costs hold for all.
    max_fitted_sequences: int | None = None
    warnings: tuple[str, ...] = ()


def choose_costs(flags: LatencyFlags, *, config_model: str | None) -> Costs:
    """`config_model` is the cluster file's model, if there is a file. Raises ConfigError that names the flag."""
    given = [name for name in ("profile", "model", "latency") if getattr(flags, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]}: latencies come from one of them")
    if flags.profile is not None or flags.latency is not None:
        useless = [name for name in _OF_ROOFLINE if getattr(flags, name) is not None]
        if useless:
            raise ConfigError(f"--{useless[0].replace('_', '-')}: belongs to a roofline, not to --{given[0]}")
    if flags.profile is not None:
        return _profiled(flags.profile)
    if flags.latency is not None:
        return _published(flags.latency)
    return _roofline(flags, config_model)


def _profiled(path: Path) -> Costs:
    profile = load_profile(path)
    around = _around_steps(profile)
    return Costs(
        text=(
            f"profile of {profile.model} ({profile.engine}, {profile.hardware}, measured {profile.measured_at}); "
            f"held-out error {profile.errors.prefill:.1%} prefill, {profile.errors.decode:.1%} decode"
        ),
        facts={
            "source": "profile",
            "file": str(path),
            "model": profile.model,
            "model_fingerprint": profile.model_fingerprint,
            "engine": profile.engine,
            "hardware": profile.hardware,
            "measured_at": profile.measured_at,
            "coefficients": profile.latency,
            "step_overhead_s": profile.step_overhead_s,
            "serving_overheads": profile.serving,
        },
        latency=profile.latency,
        kv_token_bytes=profile.kv_token_bytes,
        kv_tokens=profile.num_blocks * profile.block_tokens,
        max_context_tokens=profile.max_context_tokens,
        between_steps_s=around.between_steps_s,
        gateway_s=around.gateway_s,
        message_s=around.message_s,
        transfer=around.transfer,
        warnings=around.warnings,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _AroundSteps:
    between_steps_s: float
    gateway_s: float = 0.0
    message_s: float = MESSAGE_S
    transfer: LinkTransfer | None
    warnings: tuple[str, ...] = ()


def _around_steps(profile: LatencyProfile) -> _AroundSteps:
    """So divided that a simulated request that meets no other takes what the measured one took: of what serving
    adds, the study's messages are a part."""
    serving, transfer = profile.serving, profile.transfer
    if serving is None:
        warning = "the profile does not say what serving adds to its engine: measure it without --no-serving"
        return _AroundSteps(between_steps_s=profile.step_overhead_s, transfer=transfer, warnings=(warning,))
    message_s = min(MESSAGE_S, serving.first_token_s / MESSAGES_TO_FIRST_TOKEN, serving.handoff_s / MESSAGES_OF_HANDOFF)
    if transfer is not None:
        # The link's own latency is in what was measured between the first and the second token.
        latency_s = serving.handoff_s - MESSAGES_OF_HANDOFF * message_s
        transfer = replace(transfer, latency_s=max(0.0, latency_s))
    return _AroundSteps(
        between_steps_s=serving.step_s,
        gateway_s=max(0.0, serving.first_token_s - MESSAGES_TO_FIRST_TOKEN * message_s),
        message_s=message_s,
        transfer=transfer,
    )


def _published(text: str) -> Costs:
    family, _, setting = text.partition(":")
    if family != "distserve":
        raise ConfigError(f"--latency {text}: unknown; write distserve:SETTING, such as distserve:opt-13b-tp1")
    fit = _by_name(DISTSERVE_OPT, setting)
    if fit is None:
        raise ConfigError(f"--latency {text}: there is no such setting{did_you_mean(setting, DISTSERVE_OPT)}")
    model, _, devices = setting.rpartition("-tp")
    shape, num_devices = model_shape(model)[1], int(devices)
    return Costs(
        text=f"DistServe's published fit of {model} on {num_devices} x A100-80G",
        facts={"source": "distserve", "setting": setting, "coefficients": fit},
        latency=fit,
        kv_token_bytes=shape.kv_token_bytes,
        kv_tokens=kv_blocks_that_fit(shape, DEVICES["a100-80g"], block_tokens=1, tensor_parallel=num_devices),
        num_devices=num_devices,
        max_fitted_sequences=_DISTSERVE_MAX_SEQUENCES,
    )


def _roofline(flags: LatencyFlags, config_model: str | None) -> Costs:
    name, shape = model_shape(flags.model) if flags.model is not None else _default_model(config_model)
    device_name = flags.device or DEFAULT_DEVICE
    device = device_spec(device_name)
    tensor_parallel = 1 if flags.tensor_parallel is None else flags.tensor_parallel
    reached = efficiencies_of(flags)
    try:
        latency = Roofline(shape, device, reached, tensor_parallel=tensor_parallel)
        kv_tokens = kv_blocks_that_fit(shape, device, block_tokens=1, tensor_parallel=tensor_parallel)
    except (ValueError, ConfigError) as error:
        raise ConfigError(
            f"--model {name} --device {device_name} --tensor-parallel {tensor_parallel}: {error}"
        ) from error
    return Costs(
        text=(
            f"roofline of {name} on {tensor_parallel} x {device_name} at {reached.compute:.0%} of its compute and "
            f"{reached.memory:.0%} of its memory bandwidth"
        ),
        facts={
            "source": "roofline",
            "model": name,
            "shape": shape,
            "device": device_name,
            "tensor_parallel": tensor_parallel,
            "efficiencies": reached,
        },
        latency=latency,
        kv_token_bytes=shape.kv_token_bytes,
        kv_tokens=kv_tokens,
        num_devices=tensor_parallel,
        warnings=(
            "a roofline is not fitted to an engine: engines take 1.2 to 6 times what a data sheet allows. Compare "
            "clusters with it; for times to trust, measure with `tandem profile` and give --profile",
        ),
    )


def efficiencies_of(flags: LatencyFlags) -> Efficiencies:
    """Those of a roofline. Raises ConfigError that names the flags."""
    try:
        return Efficiencies(
            compute=DEFAULT_COMPUTE_EFFICIENCY if flags.compute_efficiency is None else flags.compute_efficiency,
            memory=DEFAULT_MEMORY_EFFICIENCY if flags.memory_efficiency is None else flags.memory_efficiency,
            overhead_s=(flags.step_overhead_ms or 0.0) / 1e3,
        )
    except ValueError as error:
        raise ConfigError(f"--compute-efficiency, --memory-efficiency, --step-overhead-ms: {error}") from error


def _default_model(config_model: str | None) -> tuple[str, ModelShape]:
    if config_model is None:
        return model_shape(DEFAULT_MODEL)
    try:
        return model_shape(config_model)
    except ConfigError as error:
        raise ConfigError(
            f"the cluster file's model {config_model!r} has no roofline: give --profile FILE (from tandem profile), "
            f"--model NAME --device NAME, or --latency distserve:SETTING"
        ) from error


def model_shape(name: str) -> tuple[str, ModelShape]:
    """A known model, or a checkpoint folder, by `--model`. Raises ConfigError that names the flag."""
    shape = _by_name(MODELS, name)
    if shape is not None:
        return name, shape
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"--model {name}: no checkpoint folder, and no known model{did_you_mean(name, MODELS)}")
    try:
        config: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {file}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--model {file}: must be a JSON object")
    return path.resolve().name, shape_from_config(cast("dict[str, object]", config), where=f"--model {file}")


def _by_name(known: Mapping[_Name, _Value], name: str) -> _Value | None:
    return next((value for key, value in known.items() if key == name), None)


def device_spec(name: str) -> DeviceSpec:
    """By `--device`. Raises ConfigError that names the flag."""
    device = _by_name(DEVICES, name)
    if device is None:
        raise ConfigError(f"--device {name}: unknown{did_you_mean(name, DEVICES)}")
    return device
