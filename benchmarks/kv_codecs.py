"""What the KV codecs cost and save: size, speed, and what is lost of a trained model's answers.

The demo model recalls facts that were stated earlier, and fails to where KV is damaged. Prompts are read exactly; their
full blocks up to the residual window go through a codec; what comes after is computed over what came out, the answer
is chosen greedily. Perplexity is that of the second half of texts whose first half was stored. The 88 M parameter shape
has random weights, which say nothing of quality: it gives size and speed of larger blocks.

    python -m benchmarks.kv_codecs [--quick]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

import engine
from benchmarks.models import VOCAB, random_88m
from benchmarks.report import finish, print_table
from contracts.ids import BlockId
from contracts.requests import SamplingParams
from engine.demo import corpus
from engine.demo.evaluate import BUCKETS, Demo, held_out_probes, states_value
from engine.ops import select_ops
from engine.plan import SampleSpec, SequenceStep, StepPlan
from engine.runner import EngineOptions, Runner, load_runner
from kvstore.codecs import make_codec
from kvstore.codecs.window import DEFAULT_WINDOW_TOKENS, num_lossy_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from contracts.layout import BlockLayout
    from engine.demo.corpus import Probe

NAMES = ("raw", "zstd", "int8", "int4")
BLOCK_TOKENS = 16
#: Sequences that are read and answered together.
BATCH = 50
MAX_ANSWER_TOKENS = 40
TEXT_TOKENS = 512
GREEDY = SamplingParams(max_tokens=1, temperature=0.0)
BF16_BYTES = 2


class Codec(Protocol):
    """As `kvstore.codecs.BlockCodec`."""

    def encode(self, block: memoryview) -> bytes: ...

    def decode(self, data: bytes, into: memoryview) -> None: ...


@dataclass(slots=True)
class Stored:
    """Bytes of blocks that went through a codec."""

    num_blocks: int = 0
    num_bytes: int = 0

    def ratio(self, layout: BlockLayout) -> float:
        """How many times smaller than the same numbers in bfloat16, whatever they are computed in."""
        numbers = self.num_blocks * int(np.prod(layout.shape))
        return numbers * BF16_BYTES / self.num_bytes if self.num_bytes else 1.0


@dataclass(slots=True)
class Quality:
    right: int = 0
    asked: int = 0
    #: Answers whose every token is that of exact KV.
    same: int = 0
    perplexity: float = 0.0
    size_ratio: float = 1.0

    @property
    def recall(self) -> float:
        return self.right / self.asked


@dataclass(frozen=True, slots=True)
class Speed:
    size_ratio: float
    #: Of the block's own bytes, one thread.
    encode_bytes_per_s: float
    decode_bytes_per_s: float


class Bench:
    """Sequences side by side in one pool; each has its own blocks for as long as it can get."""

    def __init__(self, runner: Runner, batch: int, max_tokens: int) -> None:
        self.runner = runner
        self.layout = runner.pool.layout
        self.pool: NDArray[np.float32] = runner.pool.tensor_NKL2BE.numpy()
        per_sequence = self.layout.blocks_for(max_tokens)
        self._blocks = [[BlockId(s * per_sequence + b) for b in range(per_sequence)] for s in range(batch)]

    def read(self, prompts: Sequence[Sequence[int]]) -> None:
        """Computes KV of everything but each prompt's last token."""
        for s, prompt in enumerate(prompts):
            self.runner.run(StepPlan((self._step(s, prompt[:-1], 0, samples=False),)))

    def pass_through(self, codec: Codec, lengths: Sequence[int], stored: Stored) -> None:
        """Puts the first blocks of each sequence into the codec and takes them out again."""
        for s, num_blocks in enumerate(lengths):
            for block_id in self._blocks[s][:num_blocks]:
                block = memoryview(self.pool[block_id]).cast("B")
                data = codec.encode(block)
                codec.decode(data, block)
                stored.num_blocks += 1
                stored.num_bytes += len(data)

    def recompute(self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> None:
        """What comes after the stored blocks, over them."""
        for s, (prompt, num_blocks) in enumerate(zip(prompts, lengths, strict=True)):
            start = num_blocks * self.layout.block_tokens
            if start < len(prompt) - 1:
                self.runner.run(StepPlan((self._step(s, prompt[start:-1], start, samples=False),)))

    def answers(self, prompts: Sequence[Sequence[int]], end_id: int | None) -> list[list[int]]:
        """Greedy, up to the end token."""
        tokens = [list(prompt) for prompt in prompts]
        running = list(range(len(prompts)))
        for _ in range(MAX_ANSWER_TOKENS):
            steps = tuple(self._step(s, tokens[s][-1:], len(tokens[s]) - 1, samples=True) for s in running)
            sampled = self.runner.run(StepPlan(steps)).sampled
            for s in running:
                tokens[s].append(sampled[s].token_id)
            running = [s for s in running if tokens[s][-1] != end_id]
            if not running:
                break
        return [all_[len(prompt) :] for all_, prompt in zip(tokens, prompts, strict=True)]

    def log_losses(self, prompts: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> list[float]:
        """Minus the log probability of each target token, one after another over the prompts; equally many each."""
        losses: list[float] = []
        tokens = [list(prompt) for prompt in prompts]
        for at in range(len(targets[0])):
            steps = tuple(self._step(s, tokens[s][-1:], len(tokens[s]) - 1, samples=True) for s in range(len(tokens)))
            logits = self.runner.logits(StepPlan(steps))
            for s, target in enumerate(targets):
                losses.append(-float(logits[s].log_softmax(-1)[target[at]]))
                tokens[s].append(target[at])
        return losses

    def _step(self, s: int, token_ids: Sequence[int], start: int, *, samples: bool) -> SequenceStep:
        spec = SampleSpec(params=GREEDY, output_index=0, history=(), num_prompt_tokens=0) if samples else None
        return SequenceStep(sequence_id=s, token_ids=token_ids, start=start, block_ids=self._blocks[s], sample=spec)


def demo_bench(batch: int, max_tokens: int) -> tuple[Bench, Demo]:
    folder = Path(engine.__file__).parent / "demo"
    num_blocks = batch * -(-max_tokens // BLOCK_TOKENS)
    options = EngineOptions(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks)
    return Bench(load_runner(folder, options, select_ops("cpu", log=print)), batch, max_tokens), Demo.load(folder)


def measure_quality(
    names: Sequence[str] = NAMES, *, num_prompts: int = 1000, num_texts: int = 50, window_tokens: int
) -> dict[str, Quality]:
    """By codec, `raw` first: exact KV, to compare with."""
    bench, demo = demo_bench(BATCH, TEXT_TOKENS)
    probes = [probe for bucket in BUCKETS for probe in held_out_probes(demo, bucket, num_prompts // len(BUCKETS))]
    found = {name: Quality() for name in names}
    stored = {name: Stored() for name in names}
    codecs = {name: make_codec(name, bench.layout) for name in names}
    for start in range(0, len(probes), BATCH):
        measure_recall(bench, demo, probes[start : start + BATCH], codecs, found, stored, window_tokens)
    losses: dict[str, list[float]] = {name: [] for name in names}
    rng = random.Random(3)
    for _ in range(0, num_texts, BATCH):
        texts = [_text(demo, rng) for _ in range(BATCH)]
        _perplexity(bench, texts, losses, window_tokens)
    for name, quality in found.items():
        quality.perplexity = float(np.exp(np.mean(losses[name])))
        quality.size_ratio = stored[name].ratio(bench.layout)
    return found


def measure_recall(
    bench: Bench,
    demo: Demo,
    probes: Sequence[Probe],
    codecs: Mapping[str, Codec],
    found: Mapping[str, Quality],
    stored: Mapping[str, Stored],
    window_tokens: int,
) -> None:
    """Adds what the answers to at most `BATCH` probes are worth with each codec; the first of them is exact."""
    prompts = [demo.encode(corpus.render_prompt(probe.turns)) for probe in probes]
    end_id = demo.tokenizer.token_to_id(corpus.END)
    lengths = [num_lossy_blocks(len(prompt), BLOCK_TOKENS, window_tokens) for prompt in prompts]
    bench.read(prompts)
    exact = bench.pool.copy()
    reference: list[list[int]] | None = None
    for name, codec in codecs.items():
        quality = found[name]
        bench.pool[:] = exact
        bench.pass_through(codec, lengths, stored[name])
        bench.recompute(prompts, lengths)
        answers = bench.answers(prompts, end_id)
        reference = reference or answers
        for probe, answer, wanted in zip(probes, answers, reference, strict=True):
            quality.asked += 1
            quality.right += states_value(demo.tokenizer.decode(answer), probe.expected)
            quality.same += answer == wanted


def _perplexity(
    bench: Bench, texts: Sequence[Sequence[int]], losses: dict[str, list[float]], window_tokens: int
) -> None:
    half = TEXT_TOKENS // 2
    prompts, targets = [text[:half] for text in texts], [text[half:] for text in texts]
    lengths = [num_lossy_blocks(half, BLOCK_TOKENS, window_tokens)] * len(texts)
    bench.read(prompts)
    exact = bench.pool.copy()
    for name, found in losses.items():
        bench.pool[:] = exact
        bench.pass_through(make_codec(name, bench.layout), lengths, Stored())
        bench.recompute(prompts, lengths)
        found.extend(bench.log_losses(prompts, targets))


def _text(demo: Demo, rng: random.Random) -> list[int]:
    """Conversations that recall, as the model was trained on, with other facts: `TEXT_TOKENS` tokens."""
    tokens: list[int] = []
    while len(tokens) < TEXT_TOKENS:
        spans = corpus.recall_conversation(rng, TEXT_TOKENS)
        tokens += demo.encode("".join(span.text for span in spans))
    return tokens[:TEXT_TOKENS]


def measure_speed(layout: BlockLayout, blocks: Sequence[memoryview], name: str, *, rounds: int) -> Speed:
    """The median of `rounds` over all blocks, in seconds of one thread: a busy machine changes them little."""
    codec = make_codec(name, layout)
    into = memoryview(bytearray(layout.block_bytes))
    encode_s: list[float] = []
    decode_s: list[float] = []
    data: list[bytes] = []
    for _ in range(rounds):
        start_s = time.thread_time()
        data = [codec.encode(block) for block in blocks]
        middle_s = time.thread_time()
        for one in data:
            codec.decode(one, into)
        encode_s.append(middle_s - start_s)
        decode_s.append(time.thread_time() - middle_s)
    num_bytes = layout.block_bytes * len(blocks)
    stored = Stored(len(blocks), sum(map(len, data)))
    return Speed(stored.ratio(layout), num_bytes / float(np.median(encode_s)), num_bytes / float(np.median(decode_s)))


def random_blocks(folder: Path, num_tokens: int) -> tuple[BlockLayout, list[memoryview]]:
    """KV of the 88 M parameter shape, of a random prompt."""
    num_blocks = num_tokens // BLOCK_TOKENS
    options = EngineOptions(block_tokens=BLOCK_TOKENS, num_blocks=num_blocks)
    runner = load_runner(random_88m(folder), options, select_ops("cpu", log=print))
    rng = random.Random(5)
    step = SequenceStep(
        sequence_id=0,
        token_ids=[rng.randrange(3, VOCAB) for _ in range(num_tokens)],
        start=0,
        block_ids=[BlockId(block) for block in range(num_blocks)],
        sample=None,
    )
    runner.run(StepPlan((step,)))
    as_bytes = runner.pool.tensor_NKL2BE.view(torch.int16).numpy()
    return runner.pool.layout, [memoryview(block).cast("B") for block in as_bytes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the prompts")
    parser.add_argument("--window", type=int, default=DEFAULT_WINDOW_TOKENS, help="newest tokens that stay exact")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    qualities = measure_quality(
        num_prompts=200 if given.quick else 1000, num_texts=50 if given.quick else 200, window_tokens=given.window
    )
    exact = qualities["raw"]
    rows = [
        [name, one.size_ratio, 100 * one.recall, 100 * (exact.recall - one.recall), one.perplexity, one.same]
        for name, one in qualities.items()
    ]
    print_table(
        f"demo model, {exact.asked} prompts of 50 to 400 tokens, the newest {given.window} tokens exact",
        ["codec", "times smaller than bf16", "recall %", "points lost", "perplexity", "same answers"],
        rows,
    )
    figures = {
        "int4_size_ratio": qualities["int4"].size_ratio,
        "int4_recall_points_lost": 100 * (exact.recall - qualities["int4"].recall),
        "int4_perplexity_ratio": qualities["int4"].perplexity / exact.perplexity,
        "int8_size_ratio": qualities["int8"].size_ratio,
        "int8_recall_points_lost": 100 * (exact.recall - qualities["int8"].recall),
    }
    with tempfile.TemporaryDirectory() as folder:
        layout, blocks = random_blocks(Path(folder) / "88m", 1024)
    speeds = {name: measure_speed(layout, blocks, name, rounds=3 if given.quick else 9) for name in NAMES}
    print_table(
        f"88 M shape (random weights), blocks of {layout.block_bytes} bytes bf16, one thread",
        ["codec", "times smaller", "encode GB/s", "decode GB/s"],
        [
            [name, one.size_ratio, one.encode_bytes_per_s / 1e9, one.decode_bytes_per_s / 1e9]
            for name, one in speeds.items()
        ],
    )
    for name in ("int8", "int4", "zstd"):
        figures[f"{name}_88m_size_ratio"] = speeds[name].size_ratio
        figures[f"{name}_encode_gb_per_s"] = speeds[name].encode_bytes_per_s / 1e9
        figures[f"{name}_decode_gb_per_s"] = speeds[name].decode_bytes_per_s / 1e9
    finish("kv_codecs", figures)


if __name__ == "__main__":
    main()
