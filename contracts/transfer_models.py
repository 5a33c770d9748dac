"""How long KV takes between workers, how much of that a request sees, and when recomputing is faster."""

from __future__ import annotations

import math
from dataclasses import dataclass

#: Mooncake's estimate of prefill work per layer (FAST'25, equation 2): `4 p^2 d + 22 p d^2` operations.
_ATTENTION_FLOP = 4
_LINEAR_FLOP = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTransfer:
    """`latency_s + num_bytes / rate`: the flows that share a link get equal parts of what it delivers.

    Follows `contracts.latency.TransferModel`. Raises ValueError for a link that delivers nothing.
    """

    #: Of one transfer, whatever its size.
    latency_s: float
    #: Of the narrower end, in one direction.
    bandwidth_bytes_s: float
    #: Share of the bandwidth that transfers reach.
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.latency_s < math.inf and self.bandwidth_bytes_s > 0 and 0 < self.efficiency <= 1):
            raise ValueError(f"a link needs finite latency_s >= 0, bandwidth_bytes_s > 0, efficiency in (0, 1]: {self}")

    def transfer_s(self, num_bytes: int, active_flows: int) -> float:
        return self.latency_s + num_bytes * active_flows / (self.bandwidth_bytes_s * self.efficiency)


def exposed_transfer_s(transfer_s: float, prefill_s: float, num_layers: int) -> float:
    """What a request waits beyond its prefill when each layer's KV leaves as soon as it is computed.

    Exact for equal layers: either the last layer's part alone is late, or the link is the bottleneck and only
    the first layer's computation precedes it. `transfer_s` is that of all layers.
    """
    return max(transfer_s / num_layers, transfer_s - prefill_s * (num_layers - 1) / num_layers)


def break_even_bandwidth_bytes_s(kv_token_bytes: float, prefill_s_per_token: float) -> float:
    """Fetching a prefix beats computing it on links faster than this."""
    return kv_token_bytes / prefill_s_per_token


def reuse_break_even_bandwidth_bytes_s(
    *, prefix_tokens: int, hidden_size: int, queries_per_kv_head: int, element_bytes: int, flop_s: float
) -> float:
    """As `break_even_bandwidth_bytes_s`, from a model's dimensions: Mooncake (FAST'25), equation 2.

    A prefix of p tokens is `2 p d s / gqa` bytes a layer, and `4 p^2 d + 22 p d^2` operations. `flop_s` is what
    the prefill instance computes, over all its devices.
    """
    bytes_per_token = 2.0 * hidden_size * element_bytes / queries_per_kv_head
    flop_per_token = _ATTENTION_FLOP * prefix_tokens * hidden_size + _LINEAR_FLOP * hidden_size**2
    return flop_s * bytes_per_token / flop_per_token
