"""Whether a model that nobody has used for a while is kept compressed. Pure.

After CodeCrunch (ASPLOS'24): what is compressed takes less memory while it is cold, and more time when it is wanted
again. That is a gain only where decompressing is quicker than the tier below, from which the model would have to come
if its memory had been given away; otherwise its memory is better given away. So nothing is decided but by rates
that were measured on this machine: of loads from that tier, and of the codec on some of the copy's own chunks.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Literal

import msgspec

#: Loads of one tier that are remembered.
WINDOW_LOADS = 8


class CodecRates(msgspec.Struct, frozen=True, kw_only=True):
    """What a codec did with some chunks of a copy, by several threads of this machine."""

    #: Bytes of the chunks.
    sampled_bytes: int
    #: Of their records.
    compressed_bytes: int
    #: Of raw bytes.
    compress_bytes_per_s: float
    #: Into memory that had no pages yet, as a load's has none.
    decode_bytes_per_s: float
    num_threads: int

    @property
    def ratio(self) -> float:
        return self.sampled_bytes / max(1, self.compressed_bytes)


class TierRates:
    """How fast this machine's loads were, by the tier that they came from."""

    def __init__(self) -> None:
        #: When each ended, and how fast it was.
        self._seen: dict[str, deque[tuple[float, float]]] = {}

    def observe(self, tier: str, num_bytes: int, seconds: float, now_s: float) -> None:
        """`seconds`: from the first read to the last byte."""
        if seconds > 0:
            self._seen.setdefault(tier, deque(maxlen=WINDOW_LOADS)).append((now_s, num_bytes / seconds))

    def bytes_per_s(self, tier: str, since_s: float = -math.inf) -> float:
        """The median of the last loads; 0 where there was none since then."""
        rates = [rate for at_s, rate in self._seen.get(tier, ()) if at_s >= since_s]
        return median(rates) if rates else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressRules:
    #: A copy that was used since then stays as it is.
    cold_after_s: float = 600.0
    #: Memory is short where not so many more models like the largest one fit.
    models_to_come: int = 2
    #: Less is not worth the processor's time.
    min_ratio: float = 1.1
    #: How many times as fast as the next tier decoding must be: rates vary from load to load.
    min_speedup: float = 1.2

    def __post_init__(self) -> None:
        if self.cold_after_s < 0 or self.models_to_come < 0 or self.min_ratio < 1 or self.min_speedup < 1:
            raise ValueError(f"rules that make no sense: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdView:
    """One copy that nobody uses, and the memory that it lies in."""

    num_bytes: int
    idle_s: float
    #: Of the memory for weights, what is neither taken nor promised.
    free_bytes: int
    #: Of the models that are here, compressed or not, the largest.
    largest_bytes: int
    #: The tier that it would have to come from otherwise.
    next_tier: str
    #: 0: not known.
    next_bytes_per_s: float
    #: Of loads from compressed copies; 0: there was none.
    decoded_bytes_per_s: float = 0.0
    #: Of this copy; None: not tried yet.
    rates: CodecRates | None = None
    #: Memory that the result is to have at most; means nothing without rates.
    bound_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    #: `try`: measure the codec on this copy, and ask again.
    action: Literal["leave", "try", "compress"]
    reason: str


def judge(view: ColdView, rules: CompressRules) -> Verdict:
    """Whether to compress the copy now."""
    if view.idle_s < rules.cold_after_s:
        return Verdict("leave", f"used {view.idle_s:.0f} s ago, less than {rules.cold_after_s:.0f} s")
    if view.free_bytes >= rules.models_to_come * view.largest_bytes:
        return Verdict(
            "leave", f"{_mib(view.free_bytes)} are free, room for {rules.models_to_come} more of the largest model"
        )
    if view.next_bytes_per_s <= 0:
        return Verdict("leave", f"how fast {view.next_tier} is was not measured yet")
    next_tier = f"{view.next_tier}'s {_rate(view.next_bytes_per_s)}"
    if view.decoded_bytes_per_s and view.decoded_bytes_per_s < rules.min_speedup * view.next_bytes_per_s:
        return Verdict(
            "leave", f"compressed copies came at {_rate(view.decoded_bytes_per_s)}, no gain over {next_tier}"
        )
    if view.rates is None:
        return Verdict("try", f"not used for {view.idle_s:.0f} s, and {_mib(view.free_bytes)} are free")
    return _judge_rates(view, view.rates, rules, next_tier)


def _judge_rates(view: ColdView, rates: CodecRates, rules: CompressRules, next_tier: str) -> Verdict:
    how = f"{rates.ratio:.2f} times smaller, decoded at {_rate(rates.decode_bytes_per_s)} ({rates.num_threads} threads)"
    if rates.ratio < rules.min_ratio:
        return Verdict("leave", f"{how}: less than {rules.min_ratio} times is not worth it")
    if rates.decode_bytes_per_s < rules.min_speedup * view.next_bytes_per_s:
        return Verdict("leave", f"{how}: no gain over {next_tier}")
    # What was idle for so long is likely to be idle for as long again, not for longer.
    compress_s = view.num_bytes / max(1.0, rates.compress_bytes_per_s)
    if compress_s > view.idle_s:
        return Verdict("leave", f"{how}: compressing takes {compress_s:.1f} s, it is idle for {view.idle_s:.1f} s")
    if view.bound_bytes > view.free_bytes:
        return Verdict(
            "leave", f"{how}: needs {_mib(view.bound_bytes)} beside itself, {_mib(view.free_bytes)} are free"
        )
    return Verdict("compress", f"{how}, faster than {next_tier}")


def bound_bytes(weight_bytes: int, beside_bytes: int, chunk_bytes: int, rates: CodecRates) -> int:
    """Memory for a result, of which only some chunks are known; `beside_bytes` is what it holds beside its records. One
    that turns out to need more is given up."""
    if rates.sampled_bytes == weight_bytes:
        return beside_bytes + rates.compressed_bytes
    return beside_bytes + int(1.05 * weight_bytes / rates.ratio) + chunk_bytes


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s"
