"""How an answer moves: its KV is copied, or its tokens are read again. Pure.

(ServerlessLLM, OSDI'24, section 5, moves tokens; Llumnix, OSDI'24, section 4.2, moves KV. Which is less work depends on
the link, the device and the length.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from contracts.messages import MoveMode

ChosenMode = Literal["kv", "tokens", "stop_and_copy", "stop_and_read"]

#: What a copy takes beyond its bytes: offer, first and last announcement, confirmation.
COPY_OVERHEAD_S = 0.005
#: Where nothing is known of the link.
ASSUMED_COPY_S = 0.25
#: Growth during a copy is provided for so many times over, and with so many tokens to spare.
GROWTH_FACTOR = 2.0
SPARE_TOKENS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveCosts:
    """Of one answer; None: not known."""

    #: From source to destination, the whole of it.
    copy_s: float | None
    #: Reading all of its tokens.
    read_s: float | None


def costs_of(
    num_tokens: int, kv_token_bytes: int, bandwidth_bytes_per_s: float | None, read_s: float | None
) -> MoveCosts:
    copy_s = None
    if bandwidth_bytes_per_s:
        copy_s = COPY_OVERHEAD_S + num_tokens * kv_token_bytes / bandwidth_bytes_per_s
    return MoveCosts(copy_s=copy_s, read_s=read_s)


def choose_mode(costs: MoveCosts, wanted: MoveMode) -> tuple[ChosenMode, str]:
    """With the reason. KV where either is not known: copying takes nothing from the destination's steps."""
    if wanted != "auto":
        return wanted, "as asked"
    if costs.copy_s is None or costs.read_s is None:
        return "kv", "what reading or copying takes is not known"
    if costs.read_s < costs.copy_s:
        return "tokens", f"reading takes {costs.read_s * 1e3:.1f} ms, copying {costs.copy_s * 1e3:.1f} ms"
    return "kv", f"copying takes {costs.copy_s * 1e3:.1f} ms, reading {costs.read_s * 1e3:.1f} ms"


def spare_blocks(costs: MoveCosts, step_s: float | None, left_tokens: int, block_tokens: int) -> int:
    """Blocks that an answer may grow into while it is copied, of the `left_tokens` that it may still write."""
    copy_s = ASSUMED_COPY_S if costs.copy_s is None else costs.copy_s
    tokens = SPARE_TOKENS + (GROWTH_FACTOR * copy_s / step_s if step_s else 0.0)
    return max(1, math.ceil(min(tokens, max(left_tokens, 1)) / block_tokens))
