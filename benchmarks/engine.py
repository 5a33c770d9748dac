"""The engine beside Hugging Face transformers, and beside what this machine could do at best.

    python -m benchmarks.engine [--model DIR] [--threads 2] [--quick]

Same weights, same dtype, same threads, one process; repetitions of the two sides and of the limits take
turns, and medians are compared, so that other load on the machine touches all alike. Limits: prefill by the
best rate at which torch or our own linear operator multiplies large matrices; decode by the time in which
the weights' bytes can be read from memory. Prefill work counts the multiplications that the engine performs
(linear layers only; of the last layer, one row beyond its KV).
"""

from __future__ import annotations

import argparse
import importlib
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.models import random_88m
from benchmarks.report import finish, print_table, spread
from contracts.ids import BlockId
from contracts.requests import SamplingParams
from engine.ops import select_ops
from engine.plan import SampleSpec, SequenceStep, StepPlan
from engine.runner import EngineOptions, Runner, load_runner

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from engine.compute_dtype import DtypeChoice
    from engine.ops.api import Ops

PROMPT_TOKENS = 512
BLOCK_TOKENS = 16
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)

#: Rows, in and out of the matrix product that measures the compute limit: 17 GFLOP.
_MATMUL_SHAPE = (1024, 2048, 4096)
_READ_BYTES = 512 << 20
#: Prompt tokens that our side computes in one step.
_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    threads: int
    repetitions: int
    #: Steps of one repetition of a decode measurement.
    decode_steps: int
    batch_sizes: tuple[int, ...]
    #: Larger batches decode from copies of the first prompt's KV, on both sides.
    prefill_batch_max: int


@dataclass(slots=True)
class Samples:
    """Seconds (or units per second, for limits) by name, one per repetition."""

    values: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def add(self, name: str, value: float) -> None:
        self.values.setdefault(name, []).append(value)

    def median(self, name: str) -> float:
        return median(self.values[name])


class OurSide:
    """The engine, stepped without its thread."""

    def __init__(self, model_dir: Path, dtype: DtypeChoice, ops: Ops, settings: Settings) -> None:
        self._per_sequence = -(-(PROMPT_TOKENS + 1) // BLOCK_TOKENS)
        num_blocks = self._per_sequence * max(settings.batch_sizes)
        options = EngineOptions(dtype=dtype, num_blocks=num_blocks, block_tokens=BLOCK_TOKENS)
        self.runner: Runner = load_runner(model_dir, options, ops)

    def prefill(self, prompts: list[list[int]]) -> None:
        steps = [self._step(index, prompt, 0) for index, prompt in enumerate(prompts)]
        width = max(1, _STEP_TOKENS // PROMPT_TOKENS)
        for first in range(0, len(steps), width):
            self.runner.run(StepPlan(tuple(steps[first : first + width])))

    @torch.inference_mode()
    def repeat(self, batch_size: int) -> None:
        """The first sequence's KV for all of them, in place of a prefill."""
        pool = self.runner.pool.tensor_NKL2BE
        for index in range(1, batch_size):
            first = index * self._per_sequence
            pool[first : first + self._per_sequence] = pool[: self._per_sequence]

    def decode(self, batch_size: int, num_tokens: int) -> float:
        """Median seconds of a step after `prefill`: each writes the token after the prompt anew."""
        plan = StepPlan(tuple(self._step(index, [index], PROMPT_TOKENS) for index in range(batch_size)))
        return median(timed(lambda: self.runner.run(plan)) for _ in range(num_tokens))

    def _step(self, index: int, token_ids: list[int], start: int) -> SequenceStep:
        first = index * self._per_sequence
        return SequenceStep(
            sequence_id=index,
            token_ids=token_ids,
            start=start,
            block_ids=[BlockId(block) for block in range(first, first + self._per_sequence)],
            sample=SampleSpec(params=GREEDY, output_index=0, history=token_ids, num_prompt_tokens=PROMPT_TOKENS),
        )


class TheirSide:
    """transformers: a forward pass with a cache for prefill, `generate` on that cache for decode."""

    def __init__(self, model_dir: Path, dtype: DtypeChoice) -> None:
        self._transformers: Any = importlib.import_module("transformers")
        auto = self._transformers.AutoModelForCausalLM
        self._model = auto.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
        self._cache: Any = None

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> None:
        cache = self._transformers.DynamicCache(config=self._model.config)
        ids = torch.tensor(prompts)
        self._cache = self._model(ids, past_key_values=cache, logits_to_keep=1).past_key_values

    def repeat(self, batch_size: int) -> None:
        self._cache.batch_repeat_interleave(batch_size)

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], num_tokens: int) -> float:
        """Median seconds between the tokens of one `generate` on the prefilled cache."""
        ids = torch.tensor([[*prompt, 5] for prompt in prompts])
        clock = _TokenTimes()
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self._cache,
            max_new_tokens=num_tokens + 1,
            min_new_tokens=num_tokens + 1,
            do_sample=False,
            pad_token_id=0,
            logits_processor=self._transformers.LogitsProcessorList([clock]),
        )
        self._cache.crop(PROMPT_TOKENS - self._cache.get_seq_length())
        return median(later - earlier for earlier, later in zip(clock.at_s, clock.at_s[1:], strict=False))


class _TokenTimes:
    """A logits processor that changes nothing and notes when each token is chosen."""

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        self.at_s.append(time.perf_counter())
        return scores


def timed(work: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    work()
    return time.perf_counter() - start_s


class Limits:
    """What this machine can do: large products per second, bytes read per second."""

    def __init__(self, dtype: DtypeChoice, ops: Ops) -> None:
        rows, width, out = _MATMUL_SHAPE
        self._flop = 2.0 * rows * width * out
        self._x = torch.randn(rows, width).to(getattr(torch, dtype))
        self._weight = torch.randn(out, width).to(getattr(torch, dtype))
        self._packed = ops.pack_linear(self._weight, None)
        self._ops = ops
        self._memory = torch.ones(_READ_BYTES // 4)
        # Where torch has no instructions for this dtype it is many times slower: not worth waiting for.
        self._torch_counts = 4 * timed(self._ours) > timed(self._torch)

    def measure(self, samples: Samples) -> None:
        seconds = min(timed(self._ours), timed(self._torch) if self._torch_counts else float("inf"))
        samples.add("matmul_flops", self._flop / seconds)
        samples.add("read_bandwidth", _READ_BYTES / min(timed(self._memory.sum) for _ in range(2)))

    @torch.inference_mode()
    def _ours(self) -> None:
        self._ops.linear(self._x, self._packed)

    @torch.inference_mode()
    def _torch(self) -> None:
        torch.matmul(self._x, self._weight.t())


def compare(model_dir: Path, dtype: DtypeChoice, settings: Settings) -> tuple[Samples, OurSide]:
    """All repetitions for one dtype: samples "<ours|theirs>_<prefill|decode>_<batch>" and the limits."""
    ops = select_ops("cpu", log=lambda line: print(f"{dtype}: {line}"))
    ours, theirs = OurSide(model_dir, dtype, ops, settings), TheirSide(model_dir, dtype)
    limits, samples = Limits(dtype, ops), Samples()
    for batch_size in settings.batch_sizes:
        prompts = [_prompt(index, ours.runner.config.vocab_size) for index in range(batch_size)]
        if batch_size == 1:
            ours.prefill(prompts)
            theirs.prefill(prompts)
        if batch_size > settings.prefill_batch_max:
            ours.repeat(batch_size)
            theirs.repeat(batch_size)
        # Prompts of large batches take long; they are read once.
        for _ in range(_prefill_repetitions(batch_size, settings)):
            samples.add(f"ours_prefill_{batch_size}", timed(partial(ours.prefill, prompts)))
            samples.add(f"theirs_prefill_{batch_size}", timed(partial(theirs.prefill, prompts)))
            limits.measure(samples)
        for _ in range(settings.repetitions):
            samples.add(f"ours_decode_{batch_size}", ours.decode(batch_size, settings.decode_steps))
            samples.add(f"theirs_decode_{batch_size}", theirs.decode(prompts, settings.decode_steps))
            limits.measure(samples)
    return samples, ours


def _prefill_repetitions(batch_size: int, settings: Settings) -> int:
    if batch_size == 1:
        return settings.repetitions
    return int(batch_size <= settings.prefill_batch_max)


def _prompt(index: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(index)
    return [int(token) for token in torch.randint(0, vocab_size, (PROMPT_TOKENS,), generator=generator)]


def shares_of_limit(samples: Samples, runner: Runner) -> dict[str, float]:
    """Prefill of one prompt over the product limit, decode of one sequence over the bandwidth limit."""
    prefill_s = prefill_flop(runner) / samples.median("matmul_flops")
    decode_s = runner.linear_bytes / samples.median("read_bandwidth")
    return {
        "prefill_over_limit": prefill_s / samples.median("ours_prefill_1"),
        "decode_b1_over_limit": decode_s / samples.median("ours_decode_1"),
        "theirs_prefill_over_limit": prefill_s / samples.median("theirs_prefill_1"),
        "theirs_decode_b1_over_limit": decode_s / samples.median("theirs_decode_1"),
    }


def prefill_flop(runner: Runner) -> float:
    """Of the linear layers that one prompt's prefill performs here."""
    config = runner.config
    qkv = config.hidden_size * config.qkv_size
    rest = config.hidden_size * (config.num_heads * config.head_dim + 3 * config.intermediate_size)
    one_row = rest + config.hidden_size * config.vocab_size
    return 2.0 * (PROMPT_TOKENS * (config.num_layers * qkv + (config.num_layers - 1) * rest) + one_row)


def show(dtype: str, samples: Samples, shares: dict[str, float], settings: Settings) -> None:
    rows: list[list[object]] = []
    for batch_size in settings.batch_sizes:
        for phase, tokens in (("prefill", PROMPT_TOKENS * batch_size), ("decode", batch_size)):
            if f"ours_{phase}_{batch_size}" in samples.values:
                share_name = "prefill_over_limit" if phase == "prefill" else "decode_b1_over_limit"
                both = (shares[share_name], shares[f"theirs_{share_name}"]) if batch_size == 1 else None
                rows.append(_row(samples, phase, batch_size, tokens, both))
    columns = ("", "ours ms", "transformers ms", "ours tok/s", "their tok/s", "ratio", "of limit", "theirs")
    print_table(f"{dtype}, prompt of {PROMPT_TOKENS} tokens, {settings.threads} threads", columns, rows)
    print(
        f"limits: {samples.median('matmul_flops') / 1e9:.0f} GFLOP/s matrix products, "
        f"{samples.median('read_bandwidth') / 1e9:.1f} GB/s read"
    )


def _row(
    samples: Samples, phase: str, batch_size: int, tokens: int, shares: tuple[float, float] | None
) -> list[object]:
    ours, theirs = (samples.values[f"{side}_{phase}_{batch_size}"] for side in ("ours", "theirs"))
    return [
        f"{phase}, batch {batch_size}",
        spread([1e3 * value for value in ours]),
        spread([1e3 * value for value in theirs]),
        tokens / median(ours),
        tokens / median(theirs),
        f"{median(theirs) / median(ours):.2f}",
        *(("", "") if shares is None else (f"{share:.0%}" for share in shares)),
    ]


def figures_of(samples: Samples, shares: dict[str, float], settings: Settings) -> dict[str, float]:
    figures = {
        f"decode_b{batch_size}_over_transformers": samples.median(f"theirs_decode_{batch_size}")
        / samples.median(f"ours_decode_{batch_size}")
        for batch_size in settings.batch_sizes
    }
    figures["prefill_over_transformers"] = samples.median("theirs_prefill_1") / samples.median("ours_prefill_1")
    return figures | {name: share for name, share in shares.items() if not name.startswith("theirs")}


def run(model_dir: Path, settings: Settings) -> dict[str, float]:
    figures: dict[str, float] = {}
    dtypes: tuple[DtypeChoice, ...] = ("bfloat16", "float32")
    for dtype in dtypes:
        samples, ours = compare(model_dir, dtype, settings)
        shares = shares_of_limit(samples, ours.runner)
        show(dtype, samples, shares, settings)
        suffix = "" if dtype == "bfloat16" else "_fp32"
        figures |= {f"{name}{suffix}": value for name, value in figures_of(samples, shares, settings).items()}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: random weights, 88 M parameters")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="within 60 s: fewer repetitions, no batch of 32")
    arguments = parser.parse_args()
    settings = Settings(
        threads=arguments.threads,
        repetitions=3 if arguments.quick else 7,
        decode_steps=8 if arguments.quick else 24,
        batch_sizes=(1, 8) if arguments.quick else (1, 8, 32),
        # Where bf16 products are slow, transformers reads 32 prompts for minutes; batch 8 shows the same ratio.
        prefill_batch_max=1 if arguments.quick else 8,
    )
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as scratch:
        figures = run(arguments.model or random_88m(Path(scratch) / "88m"), settings)
    finish("engine", figures)


if __name__ == "__main__":
    main()
