"""One model on one device, stepped synchronously: load, then `run(plan)`.

The whole of the engine but its thread: `engine.executor` gives it one and makes it awaitable.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from contracts.errors import ConfigError
from contracts.layout import PROTOCOL_VERSION, KvIdentity
from engine.batch import Batch, BatchLimits, build_batch
from engine.canary import check_canary
from engine.checkpoint import Checkpoint, DummyWeights
from engine.compute_dtype import DtypeChoice, compute_dtype
from engine.fused import expected_tensors, optional_tensors
from engine.kv_pool import TORCH_DTYPES, KvPool, block_layout, blocks_in, make_pool
from engine.model import Decoder
from engine.model_config import ModelConfig, load_model_config
from engine.plan import StepResult
from engine.rope import cos_sin_table
from engine.safetensors_files import LoadFormat, model_fingerprint
from engine.sampling import Sampler
from engine.weights import DecoderWeights, bind_weights, load_weights

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from typing_extensions import Buffer

    from contracts.layout import BlockLayout
    from engine.canary import Canary
    from engine.checkpoint import WeightSource
    from engine.ops.api import Ops
    from engine.plan import StepPlan
    from engine.weights import FusedWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How a model folder becomes an engine."""

    #: auto: what the config names, else what the weights are stored in; float32 for float16 on a CPU.
    dtype: DtypeChoice = "auto"
    #: `cuda` takes the same way through the engine; it has not been run yet.
    device: str = "cpu"
    block_tokens: int = 16
    #: Size of the KV pool: exactly one of the two.
    kv_memory_bytes: int | None = None
    num_blocks: int | None = None
    #: Longest prompt and output; None: what the model was made for.
    max_model_len: int | None = None
    #: dummy: random weights, a function of the config alone.
    load_format: LoadFormat = "auto"


class Runner:
    """Not safe for two threads at once. Between calls it keeps nothing but weights and pool."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        weights: DecoderWeights,
        ops: Ops,
        pool: KvPool,
        cos_sin_PE: Tensor,
        identity: KvIdentity,
    ) -> None:
        """`cos_sin_PE` sets the longest context: its rows are positions."""
        self.config = config
        self.pool = pool
        self.identity = identity
        self.ops_name = ops.name
        #: Bytes of weights that a step reads at least.
        self.linear_bytes = weights.linear_bytes
        self.max_context_tokens = cos_sin_PE.shape[0]
        self._device = pool.tensor_NKL2BE.device
        self._limits = BatchLimits(
            block_tokens=pool.layout.block_tokens,
            num_blocks=pool.num_blocks,
            max_context_tokens=self.max_context_tokens,
            vocab_size=config.vocab_size,
        )
        self._decoder = Decoder(config, weights, ops, pool, cos_sin_PE)
        self._sampler = Sampler(config.eos_token_ids)

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult:
        """Computes one plan: KV of its new tokens into the pool, a token for each sequence that asks.

        Raises BadRequest or InvariantBroken before anything is written, Internal after damage.
        """
        if not plan.sequences:
            return StepResult()
        batch, logits_SV = self._forward(plan)
        if logits_SV is None:
            return StepResult()
        sampled = self._sampler.sample(logits_SV, batch.specs)
        return StepResult(sampled=dict(zip(batch.sequence_ids, sampled, strict=True)))

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> dict[int, Tensor]:
        """As `run`, but without choosing: fp32 `[V]` by id of the sequences that ask."""
        batch, logits_SV = self._forward(plan)
        return {} if logits_SV is None else dict(zip(batch.sequence_ids, logits_SV, strict=True))

    def _forward(self, plan: StepPlan) -> tuple[Batch, Tensor | None]:
        batch = build_batch(plan, self._limits, self._device)
        return batch, self._decoder.forward(batch.token_ids_T, batch.attention, batch.sample_rows)


@torch.inference_mode()
def load_runner(
    model_dir: Path,
    options: EngineOptions,
    ops: Ops,
    *,
    pool_buffer_factory: Callable[[int, int], Buffer] | None = None,
    progress: Callable[[int, int], None] | None = None,
    weights: FusedWeights | None = None,
    canary: Canary | None = None,
) -> Runner:
    """Reads a model folder in Hugging Face layout.

    `pool_buffer_factory(num_blocks, block_bytes)` gives the pool's memory (None: own); `progress(bytes read,
    bytes in all)` is called while weights load. With `weights`, of the folder only its config is read: a CPU engine
    computes on them where they lie, or, where it computes in another dtype, on a copy. `canary`: what the model must
    answer, where the weights do not say it themselves.
    Raises ConfigError naming file, tensor or option, and CorruptCheckpoint where it answers otherwise.
    """
    config = load_model_config(model_dir)
    device = torch.device(options.device)
    dtype = compute_dtype(
        model_dir,
        config,
        options.dtype,
        on_cpu=device.type == "cpu",
        load_format=options.load_format,
        stored=None if weights is None else weights.dtype,
    )
    layout = block_layout(config, block_tokens=options.block_tokens, dtype=dtype)
    num_blocks = _num_blocks(options, layout)
    num_positions = min(_num_positions(config, options), num_blocks * layout.block_tokens)
    identity = KvIdentity(
        model_fingerprint=model_fingerprint(model_dir, options.load_format) if weights is None else weights.fingerprint,
        layout=layout,
        rope_base=config.rope.theta,
        protocol_version=PROTOCOL_VERSION,
    )
    runner = Runner(
        config=config,
        weights=_decoder_weights(model_dir, config, options, ops, TORCH_DTYPES[dtype], progress, weights),
        ops=ops,
        pool=make_pool(layout, num_blocks, device=device, buffer_factory=pool_buffer_factory),
        cos_sin_PE=cos_sin_table(config.rope, config.head_dim, num_positions).to(device),
        identity=identity,
    )
    expected = weights.canary if weights is not None else canary
    if expected is not None:
        check_canary(runner, expected)
    return runner


def _weight_source(
    model_dir: Path,
    config: ModelConfig,
    options: EngineOptions,
    progress: Callable[[int, int], None] | None,
) -> AbstractContextManager[WeightSource]:
    if options.load_format == "dummy":
        return nullcontext(DummyWeights())
    return Checkpoint(model_dir, expected_tensors(config), optional=optional_tensors(config), progress=progress)


def _decoder_weights(
    model_dir: Path,
    config: ModelConfig,
    options: EngineOptions,
    ops: Ops,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None,
    ready: FusedWeights | None,
) -> DecoderWeights:
    device = torch.device(options.device)
    if ready is None:
        with _weight_source(model_dir, config, options, progress) as source:
            return load_weights(config, source, ops, dtype=dtype, device=device)
    return bind_weights(config, lambda name: ready.tensor(name).to(device=device, dtype=dtype), ops)


def _num_positions(config: ModelConfig, options: EngineOptions) -> int:
    wanted, limit = options.max_model_len, config.max_position_embeddings
    if wanted is None:
        return limit
    if not 0 < wanted <= limit:
        raise ConfigError(f"max_model_len {wanted} is not within 1 and the model's {limit} positions")
    return wanted


def _num_blocks(options: EngineOptions, layout: BlockLayout) -> int:
    if options.block_tokens < 1:
        raise ConfigError(f"block_tokens is {options.block_tokens}, must be at least 1")
    if (options.num_blocks is None) == (options.kv_memory_bytes is None):
        raise ConfigError("give the KV pool's size as num_blocks or as kv_memory_bytes, one of the two")
    if options.kv_memory_bytes is not None:
        return blocks_in(options.kv_memory_bytes, layout)
    assert options.num_blocks is not None
    if options.num_blocks < 1:
        raise ConfigError(f"num_blocks is {options.num_blocks}, must be at least 1")
    return options.num_blocks
