"""Measures the stored demo model: ``python -m engine.demo.evaluate [--prompts 200]``.

Every prompt is a held-out conversation (see ``corpus.probe``). The model answers by greedy decoding
with its stored weights, and an answer is right when it holds the expected value exactly, not as part
of a longer word or number. ``--chat`` prints sample conversations instead.
"""

import argparse
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer

from engine.demo import corpus
from engine.demo.corpus import Probe, Turn
from engine.demo.model import LlamaForCausalLM, load_network

BUCKETS: Final = ((50, 100), (100, 200), (200, 300), (300, 400))
LONG_BUCKETS: Final = ((400, 700), (700, 1000), (1000, 1900))
SEED: Final = 777_000_001

SAMPLE_CHATS: Final = (
    ("Hello!", "Who are you?", "What can you do?"),
    ("Tell me a short story about a dog.", "Thank you!"),
    ("Tell me a story about Anna.",),
    ("Remember: Anna's locker number is 4821. Ben's locker number is 7304. What is Anna's locker number?",),
    ("My name is Emma and I live in Rome. My door code is 3906.", "How are you?", "What is my door code?"),
    ("Ida's favourite colour is green. Tom's favourite colour is pink.", "What is Tom's favourite colour?"),
    ("What is the capital of France?",),
)
SAMPLE_TEXTS: Final = ("Once upon a time there was a", "One day Leo went to the market.")


@dataclass(frozen=True, slots=True)
class Demo:
    """The stored model with its tokenizer."""

    network: LlamaForCausalLM
    tokenizer: Tokenizer

    @classmethod
    def load(cls, folder: Path) -> "Demo":
        """Read the model folder."""
        return cls(load_network(folder), Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, text: str) -> list[int]:
        """Tokens of a text in which control tokens are already spelt out."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def complete(self, prompt: str, max_new_tokens: int) -> str:
        """Greedy continuation up to the end token."""
        end_id = self.tokenizer.token_to_id(corpus.END)
        prompt_ids = self.encode(prompt)
        ids = list(prompt_ids)
        while len(ids) - len(prompt_ids) < max_new_tokens:
            hidden_BTD = self.network.model(torch.tensor([ids]))
            next_id = int(self.network.logits(hidden_BTD[0, -1]).argmax())
            if next_id == end_id:
                break
            ids.append(next_id)
        return self.tokenizer.decode(ids[len(prompt_ids) :], skip_special_tokens=False)


def states_value(answer: str, value: str) -> bool:
    """Whether the answer holds the value as whole words or as a whole number."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", answer) is not None


def held_out_probes(demo: Demo, bucket: tuple[int, int], count: int) -> list[Probe]:
    """Probes whose rendered prompts lie in the bucket; the same ones every time."""
    rng = random.Random(SEED + bucket[0])
    probes: list[Probe] = []
    while len(probes) < count:
        probe = corpus.probe(rng, rng.randint(*bucket), lambda text: len(demo.encode(text)))
        if bucket[0] <= len(demo.encode(corpus.render_prompt(probe.turns))) <= bucket[1]:
            probes.append(probe)
    return probes


def report_recall(demo: Demo, buckets: Sequence[tuple[int, int]], prompts: int, *, verbose: bool) -> None:
    """Print the share of right answers for every bucket and over all."""
    right_total = asked_total = 0
    for bucket in buckets:
        probes = held_out_probes(demo, bucket, prompts // len(buckets))
        right = 0
        for probe in probes:
            answer = demo.complete(corpus.render_prompt(probe.turns), max_new_tokens=40)
            correct = states_value(answer, probe.expected)
            right += correct
            if verbose and not correct:
                print(f"    expected {probe.answer!r}, got {answer!r}", flush=True)
        right_total += right
        asked_total += len(probes)
        print(
            f"{bucket[0]:5d}-{bucket[1]:<5d} tokens: {right:3d}/{len(probes)} = {right / len(probes):.1%}",
            flush=True,
        )
    print(f"all: {right_total}/{asked_total} = {right_total / asked_total:.1%}")


def report_chats(demo: Demo) -> None:
    """Print sample conversations and continuations."""
    for messages in SAMPLE_CHATS:
        turns: list[Turn] = []
        for message in messages:
            turns.append(corpus.plain_turn("user", message))
            answer = demo.complete(corpus.render_prompt(turns), max_new_tokens=120)
            turns.append(corpus.plain_turn("assistant", answer))
            print(f"user:      {message}\nassistant: {answer}")
        print()
    for text in SAMPLE_TEXTS:
        print(f"text: {text}[{demo.complete(corpus.BOS + text, max_new_tokens=120)}]")


def main() -> None:
    """Read the command line and print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="model folder")
    parser.add_argument("--prompts", type=int, default=200, help="prompts over all length buckets")
    parser.add_argument("--long", action="store_true", help="measure prompts beyond 400 tokens")
    parser.add_argument("--verbose", action="store_true", help="print every wrong answer")
    parser.add_argument("--chat", action="store_true", help="print sample conversations instead")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    demo = Demo.load(options.model)
    if options.chat:
        report_chats(demo)
    else:
        buckets = LONG_BUCKETS if options.long else BUCKETS
        report_recall(demo, buckets, options.prompts, verbose=options.verbose)


if __name__ == "__main__":
    main()
