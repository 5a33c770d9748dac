"""Pools in device memory, mirrored block by block in the host memory that transports serve.

A holder's blocks are copied to the mirror before they are announced, a reader's from the mirror after they were
pulled. The engine knows the device's copy, the transports the host's; block ids are the same in both.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from contracts.errors import ConfigError, Internal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from contracts.ids import BlockId
    from kvtransfer.transport import Pool


class Staging(Protocol):
    """Copies between a pool and the mirror that transports serve. Blocks asked about are not empty lists."""

    async def stage_out(self, blocks: Sequence[BlockId]) -> None:
        """Copies final blocks to the mirror; returns when they are there. Raises TandemError when it failed.
        Cancelling it does not stop the copy."""
        ...

    async def stage_in(self, blocks: Sequence[BlockId]) -> None:
        """Copies pulled blocks to the pool; returns when whatever computes next sees them. Otherwise as above."""
        ...


class PinnedMirror:
    """`Staging` between a tensor and host memory, which is pinned for as long as this lives.

    Copies run one after the other on a stream and a thread of their own, so that neither the event loop nor the
    engine's stream waits for them. They follow what the device's default stream was given before they were asked
    for, which is where the engine writes and reads blocks. On a CPU tensor they are plain copies.
    """

    def __init__(self, device_pool: torch.Tensor, host_pool: Pool) -> None:
        """`device_pool`: contiguous, of any dtype, block 0 first; as large as `host_pool`. Both outlive this.

        Raises ConfigError where they do not fit each other or the memory cannot be pinned.
        """
        import torch

        num_bytes = device_pool.numel() * device_pool.element_size()
        wanted = host_pool.num_blocks * host_pool.block_bytes
        if num_bytes != wanted or not device_pool.is_contiguous():
            raise ConfigError(f"a device pool of {num_bytes} bytes and a host mirror of {wanted} do not fit")
        shape = (host_pool.num_blocks, host_pool.block_bytes)
        self._device = device_pool.detach().view(-1).view(torch.uint8).view(shape)
        self._host = torch.frombuffer(host_pool.view(), dtype=torch.uint8).view(shape)
        self._address = host_pool.address
        self._stream: torch.cuda.Stream | None = None
        if self._device.is_cuda:
            if (code := int(_cuda_runtime().cudaHostRegister(self._address, num_bytes, 0))) != 0:
                raise ConfigError(f"cannot pin {num_bytes} bytes of KV pool: CUDA error {code}")
            make_stream: Callable[..., torch.cuda.Stream] = torch.cuda.Stream
            self._stream = make_stream(self._device.device)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="kv-staging")

    def __repr__(self) -> str:
        return f"<PinnedMirror of {self._device.device} [{len(self._device)} blocks]>"

    async def stage_out(self, blocks: Sequence[BlockId]) -> None:
        await self._run(blocks, self._host, self._device)

    async def stage_in(self, blocks: Sequence[BlockId]) -> None:
        await self._run(blocks, self._device, self._host)

    def close(self) -> None:
        """Waits for the copies asked for, and unpins the memory."""
        self._executor.shutdown(wait=True)
        if self._stream is not None:
            self._stream = None
            _cuda_runtime().cudaHostUnregister(self._address)

    async def _run(self, blocks: Sequence[BlockId], target: torch.Tensor, source: torch.Tensor) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._executor, self._copy, tuple(blocks), target, source)

    def _copy(self, blocks: Sequence[BlockId], target: torch.Tensor, source: torch.Tensor) -> None:
        import torch

        stream = self._stream
        if stream is None:
            # Through numpy: torch's own copies open parallel regions that fight the engine's.
            for start, stop in _stretches(blocks):
                target[start:stop].numpy()[...] = source[start:stop].numpy()
            return
        try:
            with torch.cuda.stream(stream), contextlib.ExitStack() as done:
                done.callback(stream.synchronize)
                stream.wait_stream(torch.cuda.default_stream(self._device.device))
                for start, stop in _stretches(blocks):
                    target[start:stop].copy_(source[start:stop], non_blocking=True)
        except RuntimeError as error:
            raise Internal(f"copying {len(blocks)} KV blocks at {self!r} failed: {error}") from error


def _cuda_runtime() -> Any:
    """CUDA's own functions, which torch does not describe."""
    import torch

    runtime: Callable[[], Any] = torch.cuda.cudart
    return runtime()


def _stretches(blocks: Sequence[BlockId]) -> list[tuple[int, int]]:
    """Neighbours joined, as (start, stop); sorted, each block once."""
    stretches: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if stretches and stretches[-1][1] == block:
            stretches[-1] = (stretches[-1][0], block + 1)
        else:
            stretches.append((block, block + 1))
    return stretches
