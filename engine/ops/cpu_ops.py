"""The operators on CPUs: vectorised kernels that read weights and the paged pool in place.

The kernels (`*.cpp` beside this file) are compiled by `engine.ops.build` and called through ctypes, which
releases the GIL. They take fp32 and bf16, accumulate in fp32 and run on torch's own OpenMP threads, as many
as `torch.set_num_threads` says.
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from engine.ops.build import load_kernels

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable

    from torch import Tensor

    from engine.ops.api import AttentionBatch, PackedLinear

_ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1}

# Arguments travel as one packed record each: a third of the time that ctypes takes to convert them one by
# one. Field by field the structs of the same names in the kernels' sources.
_LINEAR_CALL = struct.Struct("@12q")
_NORM_CALL = struct.Struct("@8qd")
_SILU_CALL = struct.Struct("@6q")
_ROPE_CALL = struct.Struct("@20qd")
_ATTENTION_CALL = struct.Struct("@19qd")

#: From so many rows on, transposing the weight into L1 pays.
_MANY_ROWS = 80
#: The probe that compares torch's matrix product with ours, and by what factor torch must win.
_PROBE_ROWS, _PROBE_WIDTH, _PROBE_MARGIN = 128, 1024, 1.5


@dataclass(frozen=True, slots=True)
class CpuLinear:
    """A weight as the checkpoint stores it, fp32 or bf16; it may lie in shared read-only memory."""

    weight_OI: Tensor
    #: in the weight's dtype, for torch, and in fp32, for the kernels.
    bias_O: Tensor | None
    bias32_O: Tensor | None
    in_features: int
    out_features: int
    #: torch multiplies from so many rows on; None: never.
    torch_from_rows: int | None
    weight_address: int
    bias_address: int
    weight_type: int

    @property
    def num_bytes(self) -> int:
        return self.weight_OI.nbytes


class CpuOps:
    """See `engine.ops.api.Ops`. Tensors must be fp32 or bf16, the rotary table fp32.

    Inputs that are not contiguous are copied; the pool and what is written in place must be contiguous.
    Raises BuildError when the kernels cannot be built.
    """

    def __init__(self, kernels: ctypes.CDLL | None = None) -> None:
        library = load_kernels() if kernels is None else kernels
        self._linear = _function(library, "tandem_linear")
        self._rms_norm = _function(library, "tandem_rms_norm")
        self._silu_mul = _function(library, "tandem_silu_mul")
        self._rope_and_write_kv = _function(library, "tandem_rope_and_write_kv")
        self._paged_attention = _function(library, "tandem_paged_attention")
        self._instructions = {16: "avx512", 8: "avx2"}.get(library.tandem_lanes(), "portable")
        self._torch_from_rows: dict[torch.dtype, int | None] = {}

    @property
    def name(self) -> str:
        return f"cpu-{self._instructions}"

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        dtype = weight_OI.dtype
        if dtype not in self._torch_from_rows:
            self._torch_from_rows[dtype] = self._probe_torch(dtype)
        return _describe(weight_OI.contiguous(), bias_O, self._torch_from_rows[dtype])

    def linear(self, x_TI: Tensor, packed: PackedLinear, *, out_fp32: bool = False) -> Tensor:
        linear = cast("CpuLinear", packed)
        rows, width = x_TI.shape
        assert width == linear.in_features, f"x has {width} columns, the weight {linear.in_features}"
        from_rows = linear.torch_from_rows
        if from_rows is not None and rows >= from_rows and x_TI.dtype == linear.weight_OI.dtype and not out_fp32:
            return functional.linear(x_TI, linear.weight_OI, linear.bias_O)
        return self._multiply(x_TI, linear, torch.float32 if out_fp32 else x_TI.dtype)

    def _multiply(self, x_TI: Tensor, linear: CpuLinear, out_dtype: torch.dtype) -> Tensor:
        rows = x_TI.shape[0]
        x_TI = x_TI.contiguous()
        out_TO = torch.empty((rows, linear.out_features), dtype=out_dtype)
        if rows > 0:
            self._linear(
                _LINEAR_CALL.pack(
                    x_TI.data_ptr(),
                    linear.weight_address,
                    linear.bias_address,
                    out_TO.data_ptr(),
                    _element_type(x_TI),
                    linear.weight_type,
                    _element_type(out_TO),
                    rows,
                    linear.in_features,
                    linear.out_features,
                    rows >= _MANY_ROWS,
                    torch.get_num_threads(),
                )
            )
        return out_TO

    def _probe_torch(self, dtype: torch.dtype) -> int | None:
        """Rows from which torch's product of this dtype is the faster one here, by measurement.

        Torch wins where the CPU has matrix instructions that it uses and these kernels do not (AMX, AVX-512
        BF16), and then several times over. It must win clearly, since a probe of tens of milliseconds on a
        busy machine is noisy, and workers of one machine should agree.
        """
        x_TI = torch.ones(_PROBE_ROWS, _PROBE_WIDTH, dtype=dtype)
        weight_OI = torch.ones(_PROBE_WIDTH, _PROBE_WIDTH, dtype=dtype)
        linear = _describe(weight_OI, None, None)
        ours_s = torch_s = float("inf")
        for _ in range(5):
            ours_s = min(ours_s, _elapsed_s(lambda: self._multiply(x_TI, linear, dtype)))
            torch_s = min(torch_s, _elapsed_s(lambda: functional.linear(x_TI, weight_OI)))
        return _MANY_ROWS if torch_s * _PROBE_MARGIN < ours_s else None

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._norm(x_TD.contiguous(), 0, weight_D, eps)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        assert residual_TD.is_contiguous(), "the residual is updated in place"
        assert residual_TD.shape == x_TD.shape
        assert residual_TD.dtype == x_TD.dtype
        return self._norm(x_TD.contiguous(), residual_TD.data_ptr(), weight_D, eps)

    def _norm(self, x_TD: Tensor, residual_address: int, weight_D: Tensor, eps: float) -> Tensor:
        assert weight_D.dtype == x_TD.dtype
        assert weight_D.is_contiguous()
        out_TD = torch.empty_like(x_TD)
        width = weight_D.shape[0]
        assert x_TD.shape[-1] == width
        self._rms_norm(
            _NORM_CALL.pack(
                x_TD.data_ptr(),
                residual_address,
                weight_D.data_ptr(),
                out_TD.data_ptr(),
                x_TD.numel() // width,
                width,
                _element_type(x_TD),
                torch.get_num_threads(),
                eps,
            )
        )
        return out_TD

    def rope_and_write_kv(
        self,
        qkv_TX: Tensor,
        cos_sin_PE: Tensor,
        pool_NKL2BE: Tensor,
        layer: int,
        batch: AttentionBatch,
        *,
        num_heads: int,
        q_norm_E: Tensor | None,
        k_norm_E: Tensor | None,
        eps: float,
    ) -> Tensor:
        num_blocks, num_kv_heads, num_layers, _, block_tokens, head_dim = pool_NKL2BE.shape
        num_tokens, row_width = qkv_TX.shape
        assert row_width == (num_heads + 2 * num_kv_heads) * head_dim
        assert pool_NKL2BE.is_contiguous()
        assert 0 <= layer < num_layers
        assert cos_sin_PE.dtype == torch.float32
        assert cos_sin_PE.is_contiguous()
        assert cos_sin_PE.shape[1] == head_dim
        assert batch.positions_T.dtype == batch.slots_T.dtype == torch.int64
        assert batch.positions_T.shape[0] == batch.slots_T.shape[0] == num_tokens
        qkv_TX = qkv_TX.contiguous()
        q_THE = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv_TX.dtype)
        failed = self._rope_and_write_kv(
            _ROPE_CALL.pack(
                qkv_TX.data_ptr(),
                cos_sin_PE.data_ptr(),
                pool_NKL2BE.data_ptr(),
                q_THE.data_ptr(),
                batch.positions_T.data_ptr(),
                batch.slots_T.data_ptr(),
                0 if q_norm_E is None else q_norm_E.data_ptr(),
                0 if k_norm_E is None else k_norm_E.data_ptr(),
                num_tokens,
                cos_sin_PE.shape[0],
                layer,
                num_heads,
                num_blocks,
                num_kv_heads,
                num_layers,
                block_tokens,
                head_dim,
                _element_type(qkv_TX),
                _element_type(pool_NKL2BE),
                torch.get_num_threads(),
                eps,
            )
        )
        assert not failed, "a position beyond the rotary table, or a slot beyond the pool"
        return q_THE

    def paged_attention(
        self,
        q_THE: Tensor,
        pool_NKL2BE: Tensor,
        layer: int,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        num_blocks, num_kv_heads, num_layers, _, block_tokens, head_dim = pool_NKL2BE.shape
        num_tokens, num_heads, query_dim = q_THE.shape
        tables_SM = batch.block_tables_SM
        num_sequences, table_width = tables_SM.shape
        assert pool_NKL2BE.is_contiguous()
        assert tables_SM.is_contiguous()
        assert 0 <= layer < num_layers
        assert query_dim == head_dim
        assert num_heads % num_kv_heads == 0
        assert window is None or window > 0
        assert batch.query_starts.dtype == batch.context_lens.dtype == tables_SM.dtype == torch.int32
        assert batch.query_starts.shape[0] == num_sequences + 1
        q_THE = q_THE.contiguous()
        out_THE = torch.empty_like(q_THE)
        failed = self._paged_attention(
            _ATTENTION_CALL.pack(
                q_THE.data_ptr(),
                pool_NKL2BE.data_ptr(),
                out_THE.data_ptr(),
                batch.query_starts.data_ptr(),
                batch.context_lens.data_ptr(),
                tables_SM.data_ptr(),
                num_sequences if num_tokens > 0 else 0,
                table_width,
                layer,
                num_heads,
                num_blocks,
                num_kv_heads,
                num_layers,
                block_tokens,
                head_dim,
                window or 0,
                _element_type(q_THE),
                _element_type(pool_NKL2BE),
                torch.get_num_threads(),
                scale,
            )
        )
        assert not failed, "a block beyond the pool, or a sequence without new tokens"
        return out_THE

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        gate_up_T2I = gate_up_T2I.contiguous()
        rows, double_width = gate_up_T2I.shape
        out_TI = torch.empty((rows, double_width // 2), dtype=gate_up_T2I.dtype)
        self._silu_mul(
            _SILU_CALL.pack(
                gate_up_T2I.data_ptr(),
                out_TI.data_ptr(),
                rows,
                double_width // 2,
                _element_type(gate_up_T2I),
                torch.get_num_threads(),
            )
        )
        return out_TI


def _function(library: ctypes.CDLL, name: str) -> Callable[[bytes], int]:
    """One kernel; it takes its packed arguments and returns 0 when they fit together."""
    return cast("Callable[[bytes], int]", getattr(library, name))


def _element_type(tensor: Tensor) -> int:
    try:
        return _ELEMENT_TYPES[tensor.dtype]
    except KeyError:
        raise ValueError(f"the CPU kernels take float32 and bfloat16, not {tensor.dtype}") from None


def _describe(weight_OI: Tensor, bias_O: Tensor | None, torch_from_rows: int | None) -> CpuLinear:
    bias32_O = None if bias_O is None else bias_O.float().contiguous()
    return CpuLinear(
        weight_OI=weight_OI,
        bias_O=bias_O,
        bias32_O=bias32_O,
        in_features=weight_OI.shape[1],
        out_features=weight_OI.shape[0],
        torch_from_rows=torch_from_rows,
        weight_address=weight_OI.data_ptr(),
        bias_address=0 if bias32_O is None else bias32_O.data_ptr(),
        weight_type=_element_type(weight_OI),
    )


def _elapsed_s(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s
