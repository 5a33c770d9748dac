"""What workers of any parallelism cost: the table that a planner's studies are built from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from contracts.latency import DecodeTerms
from contracts.latency_models import DISTSERVE_OPT
from contracts.roofline import DEVICES, Roofline, kv_blocks_that_fit
from contracts.transfer_models import LinkTransfer
from coordinator.planner.plans import Parallelism
from simulator.heap.spec import MESSAGE_S
from simulator.study.costs import (
    DEFAULT_DEVICE,
    DEFAULT_MODEL,
    choose_costs,
    device_spec,
    efficiencies_of,
    model_shape,
)
from simulator.study.setup import DEFAULT_LINK_BYTES_S, DEFAULT_LINK_LATENCY_S, DEFAULT_MAX_CONTEXT_TOKENS
from workload.nearest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.latency import LatencyModel, StepWork
    from contracts.roofline import DeviceSpec, ModelShape
    from simulator.study.costs import Costs
    from simulator.study.flags import LatencyFlags

#: What DistServe's simulator adds for each stage of a pipeline.
_DISTSERVE_HOP_S = 1e-3


@dataclass(frozen=True, slots=True)
class PipelinedLatency:
    """Follows `contracts.latency.LatencyModel`: a pass through all stages of a pipeline takes what one stage's devices
    would take for the whole model, and the hops between stages."""

    whole: LatencyModel
    num_hops: int
    #: Of one hop: in any case, and for each token's activations.
    hop_s: float
    hop_token_s: float

    def step_s(self, work: StepWork) -> float:
        num_tokens = work.prefill_tokens + work.num_decodes
        return self.whole.step_s(work) + (self._hops_s(num_tokens) if num_tokens else 0.0)

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        base_s, per_context_token_s = self.whole.decode_terms(num_decodes)
        return DecodeTerms(base_s + self._hops_s(num_decodes), per_context_token_s)

    def _hops_s(self, num_tokens: int) -> float:
        return self.num_hops * (self.hop_s + num_tokens * self.hop_token_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """One model on one kind of device, by parallelism."""

    #: One line for people.
    text: str
    #: What a cluster file calls the model.
    model: str
    #: 1 and 1 where nothing else than one device is known.
    num_heads: int
    num_layers: int
    kv_token_bytes: int
    max_context_tokens: int
    #: Of one worker's link to others.
    transfer: LinkTransfer
    #: Fields of a `StudySpec`.
    between_steps_s: float = 0.0
    gateway_s: float = 0.0
    message_s: float
    #: Sequences of one worker's step at most, where nothing else is asked.
    max_sequences: int
    #: Of one worker's whole step; raises ConfigError or ValueError where the parallelism cannot be.
    latency: Callable[[Parallelism], LatencyModel]
    #: Tokens that the KV pool of a whole worker holds; raises likewise, also where nothing fits.
    kv_tokens: Callable[[Parallelism], int]
    warnings: tuple[str, ...] = ()

    def why_not(self, parallel: Parallelism) -> str | None:
        """Why there is no such worker; None where there is."""
        try:
            self.latency(parallel)
            self.kv_tokens(parallel)
        except (ConfigError, ValueError) as error:
            return str(error)
        return None


def cost_table(flags: LatencyFlags, *, node_devices: int, fast_fabric: bool) -> CostTable:
    """By `--profile`, `--latency` or `--model`; beside a profile the model is only a name. Raises ConfigError that
    names the flag."""
    if flags.profile is not None:
        costs = choose_costs(replace(flags, model=None), config_model=None)
        return _of_one_device(costs, flags.model or str(costs.facts["model"]))
    if flags.latency is not None:
        return _published(flags, fast_fabric=fast_fabric)
    return _roofline(flags, node_devices=node_devices, fast_fabric=fast_fabric)


def _of_one_device(costs: Costs, model: str) -> CostTable:
    def latency(parallel: Parallelism) -> LatencyModel:
        if parallel != Parallelism():
            raise ValueError("a profile holds for the one device that was measured")
        return costs.latency

    return CostTable(
        text=costs.text,
        model=model,
        num_heads=1,
        num_layers=1,
        kv_token_bytes=costs.kv_token_bytes,
        max_context_tokens=costs.max_context_tokens or DEFAULT_MAX_CONTEXT_TOKENS,
        transfer=costs.transfer or _link(DEFAULT_LINK_BYTES_S),
        between_steps_s=costs.between_steps_s,
        gateway_s=costs.gateway_s,
        message_s=costs.message_s,
        # As far as a profile measures.
        max_sequences=64,
        latency=latency,
        kv_tokens=lambda _: costs.kv_tokens,
        warnings=costs.warnings,
    )


def _published(flags: LatencyFlags, *, fast_fabric: bool) -> CostTable:
    family, _, model = (flags.latency or "").partition(":")
    models = sorted({setting.rpartition("-tp")[0] for setting in DISTSERVE_OPT})
    if family != "distserve" or model not in models:
        near = did_you_mean(model, models) if family == "distserve" else ""
        raise ConfigError(
            f"--latency {flags.latency}: unknown{near}; write distserve:MODEL, with a model of {', '.join(models)}"
        )
    # Refuses what belongs to a roofline, and other sources beside this one.
    first = next(setting for setting in DISTSERVE_OPT if setting.startswith(f"{model}-tp"))
    costs = choose_costs(replace(flags, latency=f"distserve:{first}"), config_model=None)
    shape, device = model_shape(model)[1], DEVICES["a100-80g"]

    def latency(parallel: Parallelism) -> LatencyModel:
        fit = DISTSERVE_OPT.get(f"{model}-tp{parallel.tensor}")
        if fit is None:
            raise ValueError(f"DistServe published no fit of {model} with tensor parallelism {parallel.tensor}")
        return _pipelined(fit, parallel, _DISTSERVE_HOP_S, 0.0)

    return CostTable(
        text=f"DistServe's published fits of {model} on A100-80G, with 1 ms for each hop of a pipeline",
        model=model,
        num_heads=shape.num_heads,
        num_layers=shape.num_layers,
        kv_token_bytes=shape.kv_token_bytes,
        max_context_tokens=DEFAULT_MAX_CONTEXT_TOKENS,
        transfer=_link(DEFAULT_LINK_BYTES_S if fast_fabric else device.link_bytes_s),
        message_s=costs.message_s,
        max_sequences=256,
        latency=latency,
        kv_tokens=lambda parallel: _kv_tokens(shape, device, parallel),
        warnings=(
            f"the fits hold for batches of at most {costs.max_fitted_sequences} sequences; larger ones are "
            f"extrapolated",
        ),
    )


def _roofline(flags: LatencyFlags, *, node_devices: int, fast_fabric: bool) -> CostTable:
    name, shape = model_shape(flags.model or DEFAULT_MODEL)
    device_name = flags.device or DEFAULT_DEVICE
    device, reached = device_spec(device_name), efficiencies_of(flags)

    def latency(parallel: Parallelism) -> LatencyModel:
        whole = Roofline(shape, device, reached, tensor_parallel=parallel.tensor)
        row_bytes = shape.hidden_size * shape.element_bytes
        within_node = parallel.num_devices <= node_devices
        hop_bytes_s = device.link_bytes_s if within_node else DEFAULT_LINK_BYTES_S
        return _pipelined(whole, parallel, device.link_latency_s, row_bytes / hop_bytes_s)

    return CostTable(
        text=(
            f"roofline of {name} on {device_name}, assumed to reach {reached.compute:.0%} of its compute and "
            f"{reached.memory:.0%} of its memory bandwidth"
        ),
        model=name if flags.model is None else flags.model,
        num_heads=shape.num_heads,
        num_layers=shape.num_layers,
        kv_token_bytes=shape.kv_token_bytes,
        max_context_tokens=DEFAULT_MAX_CONTEXT_TOKENS,
        transfer=_link(DEFAULT_LINK_BYTES_S if fast_fabric else device.link_bytes_s),
        message_s=MESSAGE_S,
        max_sequences=256,
        latency=latency,
        kv_tokens=lambda parallel: _kv_tokens(shape, device, parallel),
        warnings=(
            "a roofline is not fitted to an engine: engines take 1.2 to 6 times what a data sheet allows. Compare "
            "plans with it; for rates to trust, measure with `tandem profile` and give --profile",
        ),
    )


def _pipelined(whole: LatencyModel, parallel: Parallelism, hop_s: float, hop_token_s: float) -> LatencyModel:
    if parallel.pipeline == 1:
        return whole
    return PipelinedLatency(whole, parallel.pipeline - 1, hop_s, hop_token_s)


def _kv_tokens(shape: ModelShape, device: DeviceSpec, parallel: Parallelism) -> int:
    return kv_blocks_that_fit(
        shape, device, block_tokens=1, tensor_parallel=parallel.tensor, pipeline_parallel=parallel.pipeline
    )


def _link(bandwidth_bytes_s: float) -> LinkTransfer:
    return LinkTransfer(latency_s=DEFAULT_LINK_LATENCY_S, bandwidth_bytes_s=bandwidth_bytes_s)
