"""The machines, models and loads of studies of cold starts, after ServerlessLLM (OSDI'24, section 7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from workload.lengths import PUBLISHED_LENGTHS, Lengths, LogNormal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coldstart.estimate import Tier

GB = 10**9
PlacementName = Literal["ours", "random", "locality_only", "shepherd", "nearest_stopping"]
LoadName = Literal["gsm8k", "sharegpt"]

#: FLOP/s of one A40 in half precision, and what of it a prompt gets: not published, an assumption made here.
_DEVICE_FLOPS = 149.7e12 * 0.4
_DEVICE_BYTES_PER_S = 696e9 * 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    num_bytes: int
    num_devices: int
    #: Steps of one request on an A40: all weights are read once.
    token_s: float
    #: Of reading a prompt, and of reading again what was there before.
    prompt_token_s: float

    @classmethod
    def of_parameters(cls, billions: float, num_devices: int) -> ModelSpec:
        """Half precision; devices share all work evenly."""
        num_bytes = round(2 * billions * GB)
        return cls(
            num_bytes=num_bytes,
            num_devices=num_devices,
            token_s=num_bytes / (_DEVICE_BYTES_PER_S * num_devices),
            prompt_token_s=2 * billions * 1e9 / (_DEVICE_FLOPS * num_devices),
        )


#: How many models of each kind there are, as published; an A40 has 48 GB, so 30B takes two.
PUBLISHED_MODELS: Mapping[str, tuple[int, ModelSpec]] = {
    "opt-6.7b": (32, ModelSpec.of_parameters(6.7, 1)),
    "opt-13b": (16, ModelSpec.of_parameters(13.0, 1)),
    "opt-30b": (8, ModelSpec.of_parameters(30.0, 2)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """As published: 4 servers with 4 A40 each, 512 GB of memory, 10 Gbit/s between them."""

    num_nodes: int = 4
    devices_per_node: int = 4
    #: For checkpoints; something is left to processes.
    dram_bytes: int = 460 * GB
    ssd_bytes: int = 2000 * GB
    #: Of the path from there to the device. The published loader reads 12 GB/s from two striped NVMe disks.
    bytes_per_s: Mapping[Tier, float] = field(
        default_factory=lambda: {"dram": 20.0 * GB, "ssd": 12.0 * GB, "remote": 1.25 * GB}
    )
    #: Standard deviation of the logarithm of what a load takes.
    load_sigma: float = 0.05
    #: Of a model whose bytes are in place.
    init_s: float = 0.2
    #: To go on elsewhere, beside reading the tokens again (the released b).
    resume_s: float = 0.1
    #: Of a moved request, its last tokens are read while it stands still (the released gap).
    gap_tokens: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSpec:
    lengths: LoadName = "sharegpt"
    rate_rps: float = 0.8
    num_requests: int = 1000
    #: Of the gaps between arrivals for one model: each has bursts of its own.
    cv: float = 8.0
    #: The k-th model has popularity 1 / k^zipf.
    zipf: float = 1.0
    #: Of all requests: what the first ones find is no steady state, and they are not counted.
    warm_up: float = 0.2
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySpec:
    placement: PlacementName = "ours"
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    load: LoadSpec = field(default_factory=LoadSpec)
    models: Mapping[str, tuple[int, ModelSpec]] = field(default_factory=lambda: PUBLISHED_MODELS)


def lengths_of(name: LoadName) -> tuple[Lengths, Lengths]:
    """Of prompts and answers. GSM8K: short questions and worked answers; log-normals of the data set's usual means."""
    match name:
        case "sharegpt":
            return PUBLISHED_LENGTHS["sharegpt"].prompts, PUBLISHED_LENGTHS["sharegpt"].outputs
        case "gsm8k":
            return LogNormal.from_mean(60.0, 0.4, 2048), LogNormal.from_mean(125.0, 0.5, 2048)
