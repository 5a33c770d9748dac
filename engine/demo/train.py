"""Trains the demo model on generated conversations: ``python -m engine.demo.train --out DIR``.

Four choices make a few million tokens enough on a CPU. Rows start short and grow each time held-out
recall at the present length is high. Every row asks for its facts many times, and the loss weighs
recalled values far above filler. A linear head on a middle layer, dropped afterwards, predicts whose
fact a token belongs to, which forms the heads that bind a value to its owner. Muon (orthogonalised
momentum) trains the matrices, Adam the embeddings and norms.

Progress is measured in CPU time of the process, not in wall-clock time, so that the process may be
stopped and continued, or share its cores, without shortening the schedule.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional

from engine.demo import corpus, vocabulary
from engine.demo.corpus import Kind, Span
from engine.demo.model import (
    CONFIG_FILE,
    LlamaForCausalLM,
    LlamaShape,
    hugging_face_config,
    save_weights,
)

LOSS_WEIGHTS: Final = {
    Kind.GIVEN: 0.0,
    Kind.PROMPT: 0.05,
    Kind.PROSE: 0.5,
    Kind.REPLY: 0.5,
    Kind.RECALL: 4.0,
}
CHOICE_WEIGHT: Final = 12.0  # for the first token of a value, which decides between the facts
SPACE: Final = "\u0120"  # how the byte-level vocabulary spells a space
OWNER_LAYER: Final = 1
OWNER_LOSS_WEIGHT: Final = 0.5
OWNER_NUMBERS: Final = {name: number for number, name in enumerate(corpus.NAMES)}
NO_OWNER: Final = -1
IGNORED_ID: Final = 0  # the padding token, which never occurs in the corpus
PROBE_SEED: Final = 1_000_003


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of the curriculum."""

    row_tokens: int
    promote_at_recall: float


STAGES: Final = (
    Stage(96, 0.8),
    Stage(160, 0.88),
    Stage(288, 0.9),
    Stage(544, 1.1),
)
LONG_ROW_TOKENS: Final = 1056
LONGEST_ROW_TOKENS: Final = 1920
LONG_SHARE: Final = 0.15  # of the time, at the end
FULL_RATE_SHARE: Final = 0.4  # of the time, before the learning rate falls
TOKENS_PER_STEP: Final = 4_096


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: its tokens, their loss weights, and whose fact each token belongs to."""

    ids: list[int]
    weights: list[float]
    owners: list[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of equal length, shifted into inputs and targets."""

    inputs_BT: Tensor
    targets_BT: Tensor
    weights_BT: Tensor
    owners_BT: Tensor  # of the inputs


class RowSource:
    """Draws training rows of equal length."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self._tokenizer = tokenizer
        self._rng = rng
        self._cache: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
            if len(self._cache) < 200_000:
                self._cache[text] = ids
        return ids

    def _tokens_before_owner(self, span: Span) -> int:
        start = max(0, span.text.find(span.owner) - 1)
        return len(self._ids(span.text[:start])) + 1 if span.owner in span.text else 0

    def _row(self, row_tokens: int, plain_share: float) -> Row:
        draw = self._rng.random()
        generate: Callable[[random.Random, int], list[Span]]
        if draw < plain_share:
            generate = corpus.notes
        elif draw < plain_share + 0.12:
            generate = corpus.chat
        elif draw < plain_share + 0.18:
            generate = corpus.stories
        else:
            generate = corpus.recall_conversation
        ids: list[int] = []
        weights: list[float] = []
        owners: list[int] = []
        for span in generate(self._rng, row_tokens + 1):
            span_ids = self._ids(span.text)
            ids.extend(span_ids)
            weights.extend([LOSS_WEIGHTS[span.kind]] * len(span_ids))
            if span.kind is Kind.RECALL:
                # A number's first digit follows a token for the space before it.
                weights[len(ids) - len(span_ids) + int(span.text[1].isdigit())] = CHOICE_WEIGHT
            owner = OWNER_NUMBERS.get(span.owner, NO_OWNER)
            before = self._tokens_before_owner(span) if span.owner else 0
            owners.extend([NO_OWNER] * before + [owner] * (len(span_ids) - before))
        missing = max(0, row_tokens + 1 - len(ids))
        ids.extend([IGNORED_ID] * missing)
        weights.extend([0.0] * missing)
        owners.extend([NO_OWNER] * missing)
        end = row_tokens + 1
        return Row(ids[:end], weights[:end], owners[:end])

    def batch(self, rows: int, row_tokens: int, plain_share: float) -> Batch:
        """Draw rows with their targets."""
        drawn = [self._row(row_tokens, plain_share) for _ in range(rows)]
        tokens_BU = torch.tensor([row.ids for row in drawn])
        weights_BU = torch.tensor([row.weights for row in drawn])
        owners_BU = torch.tensor([row.owners for row in drawn])
        return Batch(tokens_BU[:, :-1].contiguous(), tokens_BU[:, 1:], weights_BU[:, 1:], owners_BU[:, :-1])


def orthogonalise(matrices_NRC: Tensor) -> Tensor:
    """Push all singular values of each matrix towards one (five Newton-Schulz steps)."""
    wide = matrices_NRC.shape[1] <= matrices_NRC.shape[2]
    x_NRC: Tensor = matrices_NRC if wide else matrices_NRC.transpose(1, 2)
    x_NRC = x_NRC / (x_NRC.square().sum(dim=(1, 2), keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        gram_NRR = x_NRC @ x_NRC.transpose(1, 2)
        polynomial_NRR = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=-4.7750, alpha=2.0315)
        x_NRC = torch.baddbmm(x_NRC, polynomial_NRR, x_NRC, beta=3.4445)
    return x_NRC if wide else x_NRC.transpose(1, 2)


class Muon:
    """Momentum whose update is orthogonalised, for the matrices of the layers."""

    def __init__(self, matrices: Iterable[nn.Parameter], momentum: float, weight_decay: float) -> None:
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            self._groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self._velocity = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}
        self._momentum = momentum
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Apply the present gradients."""
        for shape, group in self._groups.items():
            gradient_NRC = torch.stack([_gradient(matrix) for matrix in group])
            velocity_NRC = self._velocity[shape]
            velocity_NRC.lerp_(gradient_NRC, 1 - self._momentum)
            update_NRC = orthogonalise(gradient_NRC.lerp(velocity_NRC, self._momentum))
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for matrix, update_RC in zip(group, update_NRC, strict=True):
                matrix.mul_(1 - rate * self._weight_decay).add_(update_RC, alpha=-rate * scale)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("the parameter has no gradient")
    return parameter.grad


def weighted_loss(network: LlamaForCausalLM, owner_head: nn.Linear, batch: Batch) -> tuple[Tensor, Tensor]:
    """Weighted mean cross entropy of the next token, and that of the owner in a middle layer.

    The second teaches the lower layers to carry the owner's name on to the value. Without it they
    find the right kind of value soon, but whose it is only after a very long plateau.
    """
    outputs = network.model.layer_outputs(batch.inputs_BT)
    hidden_BTD: Tensor = network.model.norm(outputs[-1])
    counted_BT = batch.weights_BT > 0
    logits_NV = network.logits(hidden_BTD[counted_BT])
    losses_N = functional.cross_entropy(logits_NV, batch.targets_BT[counted_BT], reduction="none")
    weights_N = batch.weights_BT[counted_BT]
    owned_BT = batch.owners_BT != NO_OWNER
    middle_ND = outputs[OWNER_LAYER][owned_BT]
    owner_logits_NO: Tensor = owner_head(functional.rms_norm(middle_ND, middle_ND.shape[1:]))
    owner_losses = functional.cross_entropy(owner_logits_NO, batch.owners_BT[owned_BT], reduction="sum")
    owner_loss = owner_losses / max(1, len(owner_logits_NO))
    return (losses_N * weights_N).sum() / weights_N.sum(), owner_loss


@dataclass(frozen=True, slots=True)
class ProbeSet:
    """Held-out prompts with their answers, for a quick measure of recall during training."""

    tokens_BT: Tensor
    asked_BT: Tensor  # true where the token is part of an expected value


def make_probes(tokenizer: Tokenizer, count: int, prompt_tokens: int) -> ProbeSet:
    """Probes of one length; the same ones every time."""
    rng = random.Random(PROBE_SEED + prompt_tokens)
    rows: list[list[int]] = []
    asked: list[tuple[int, int]] = []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    for _ in range(count):
        probe = corpus.probe(rng, prompt_tokens, lambda text: len(encode(text)))
        stem = probe.answer.removesuffix(f" {probe.expected}.")
        before = encode(corpus.render_prompt(probe.turns) + stem)
        value = encode(f" {probe.expected}")
        rows.append(before + value)
        asked.append((len(before), len(before) + len(value)))
    width = max(map(len, rows))
    tokens_BT = torch.full((count, width), IGNORED_ID)
    asked_BT = torch.zeros((count, width), dtype=torch.bool)
    for index, (row, (start, end)) in enumerate(zip(rows, asked, strict=True)):
        tokens_BT[index, : len(row)] = torch.tensor(row)
        asked_BT[index, start:end] = True
    return ProbeSet(tokens_BT, asked_BT)


@torch.no_grad()
def teacher_forced_recall(network: LlamaForCausalLM, probes: ProbeSet) -> float:
    """The share of probes whose value the network would continue exactly, given the answer's stem."""
    right = 0
    for start in range(0, len(probes.tokens_BT), 16):
        tokens_BT, asked_BT = probes.tokens_BT[start : start + 16], probes.asked_BT[start : start + 16]
        guesses_BT = network(tokens_BT[:, :-1]).argmax(dim=-1)
        wrong_BT = (guesses_BT != tokens_BT[:, 1:]) & asked_BT[:, 1:]
        right += int((~wrong_BT.any(dim=1)).sum())
    return right / len(probes.tokens_BT)


def rate_factor(progress: float, steps: int) -> float:
    """Warm-up over the first steps, then constant, then a cosine to near zero at the end."""
    warm_up = min(1.0, (steps + 1) / 40)
    if progress < FULL_RATE_SHARE:
        return warm_up
    phase = (progress - FULL_RATE_SHARE) / (1 - FULL_RATE_SHARE)
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, phase))))


def write_folder(out: Path, tokenizer: Tokenizer, shape: LlamaShape) -> None:
    """Write everything but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    bos_id, eos_id, pad_id = (tokenizer.get_vocab()[token] for token in (corpus.BOS, corpus.END, vocabulary.PAD))
    config = hugging_face_config(shape, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)
    generation = {
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
        "do_sample": False,
    }

    def write_json(name: str, content: dict[str, Any]) -> None:
        (out / name).write_text(json.dumps(content, indent=2) + "\n")

    write_json(CONFIG_FILE, config)
    write_json("generation_config.json", generation)
    write_json("tokenizer_config.json", vocabulary.tokenizer_settings(shape.max_positions))
    tokenizer.save(str(out / "tokenizer.json"))


def open_tokenizer(out: Path) -> Tokenizer:
    """The tokenizer already in the folder, so that its tokens keep their numbers, or a new one."""
    path = out / "tokenizer.json"
    return Tokenizer.from_file(str(path)) if path.exists() else vocabulary.build_tokenizer(random.Random(0))


@torch.no_grad()
def align_embeddings(network: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """Let a word without its leading space start as the word with it plus an offset common to all.

    An answer begins with the owner's name and has no space before it, while the fact has one. The
    network has to see the same name in both, which it otherwise learns late, name by name.
    """
    vocabulary_ids = tokenizer.get_vocab()
    embedding_VD = network.model.embed_tokens.weight
    offset_D = torch.randn(embedding_VD.shape[1]) * embedding_VD.std()
    for token, token_id in vocabulary_ids.items():
        if token.startswith(SPACE) and len(token) > 2 and token[1:] in vocabulary_ids:
            embedding_VD[vocabulary_ids[token[1:]]] = embedding_VD[token_id] + offset_D


def choose_row_tokens(stage: int, progress: float, rng: random.Random) -> int:
    """Mostly the length of the stage, some shorter rows; in the last stage and at the end long rows."""
    draw = rng.random()
    if progress > 1 - LONG_SHARE:
        if draw < 0.1:
            return LONGEST_ROW_TOKENS
        if draw < 0.45:
            return LONG_ROW_TOKENS
    elif draw < 0.15 and stage + 1 == len(STAGES):
        return LONG_ROW_TOKENS
    if rng.random() < 0.7:
        return STAGES[stage].row_tokens
    return STAGES[rng.randint(0, stage)].row_tokens


def train(out: Path, minutes: float, threads: int, shape: LlamaShape, rates: tuple[float, float], seed: int) -> None:
    """Train for the given time on the given number of threads; stores a checkpoint now and then."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(threads)
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    rng = random.Random(seed)
    tokenizer = open_tokenizer(out)
    write_folder(out, tokenizer, shape)
    source = RowSource(tokenizer, rng)
    probes = {stage.row_tokens: make_probes(tokenizer, 64, stage.row_tokens * 3 // 4) for stage in STAGES}
    network = LlamaForCausalLM(shape)
    align_embeddings(network, tokenizer)
    matrices = [parameter for parameter in network.model.layers.parameters() if parameter.ndim == 2]
    others = [parameter for parameter in network.parameters() if all(parameter is not matrix for matrix in matrices)]
    owner_head = nn.Linear(shape.hidden_size, len(corpus.NAMES), bias=False)
    others.extend(owner_head.parameters())
    muon = Muon(matrices, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0)
    print(f"{sum(parameter.numel() for parameter in network.parameters())} parameters", flush=True)

    budget_cpu_s = minutes * 60 * threads
    started_cpu_s = time.process_time()
    stage = steps = tokens_seen = 0
    next_report = next_save = 0.0
    recent: list[float] = []
    while (progress := (time.process_time() - started_cpu_s) / budget_cpu_s) < 1:
        factor = rate_factor(progress, steps)
        row_tokens = choose_row_tokens(stage, progress, rng)
        batch = source.batch(max(1, TOKENS_PER_STEP // row_tokens), row_tokens, plain_share=0.4 if stage == 0 else 0.08)
        loss, owner_loss = weighted_loss(network, owner_head, batch)
        network.zero_grad(set_to_none=True)
        owner_head.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + OWNER_LOSS_WEIGHT * owner_loss)
        for group in adam.param_groups:
            group["lr"] = rates[1] * factor
        muon.step(rates[0] * factor)
        adam.step()  # pyright: ignore[reportUnknownMemberType]
        steps += 1
        tokens_seen += batch.inputs_BT.numel()
        recent.append(loss.item())
        if progress * minutes >= next_report:
            next_report = progress * minutes + min(2.0, max(0.33, minutes / 40))
            measured = _measure(network, probes, stage)
            print(
                f"{progress * minutes:6.2f} min  step {steps}  {tokens_seen / 1e6:.2f} M tokens  "
                f"row {STAGES[stage].row_tokens}  loss {sum(recent) / len(recent):.3f}  "
                f"owner {owner_loss.item():.3f}  recall {measured}",
                flush=True,
            )
            recent.clear()
            present = measured[STAGES[stage].row_tokens]
            while present >= STAGES[stage].promote_at_recall and stage + 1 < len(STAGES):
                stage += 1
                present = measured.get(STAGES[stage].row_tokens, 0.0)
        if progress * minutes >= next_save:
            next_save = progress * minutes + 1
            save_weights(network, out)
    save_weights(network, out)
    print(f"done after {steps} steps and {tokens_seen} tokens", flush=True)


def _measure(network: LlamaForCausalLM, probes: dict[int, ProbeSet], stage: int) -> dict[int, float]:
    lengths: Sequence[int] = [step.row_tokens for step in STAGES[: stage + 2]]
    return {length: round(teacher_forced_recall(network, probes[length]), 3) for length in lengths}


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=45.0, help="time at full use of the threads")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--mlp", type=int, default=384)
    parser.add_argument("--query-heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--matrix-rate", type=float, default=0.015)
    parser.add_argument("--other-rate", type=float, default=0.003)
    options = parser.parse_args()
    shape = LlamaShape(
        vocabulary_size=vocabulary.VOCABULARY_SIZE,
        hidden_size=options.hidden,
        mlp_size=options.mlp,
        layers=options.layers,
        query_heads=options.query_heads,
        kv_heads=options.kv_heads,
    )
    rates = (options.matrix_rate, options.other_rate)
    train(options.out, options.minutes, options.threads, shape, rates, options.seed)


if __name__ == "__main__":
    main()
