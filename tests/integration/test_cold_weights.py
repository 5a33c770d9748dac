"""A model that sleeps for long is kept compressed, and wakes with the same weights, whatever ends on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cluster.guard import Guard
from cluster.plan import worker_environ
from cluster.process_log import ProcessLog
from cluster.weights_service import CompressorProcess, LoaderProcess, WeightsService
from coldstart import weight_cache
from coldstart.cold_copies import COMPRESSED_TIER
from coldstart.compressing import CompressRules, TierRates
from coldstart.format import (
    CHUNK_BYTES,
    INDEX_NAME,
    Index,
    Partition,
    TensorEntry,
    checksum,
    encode_index,
    partition_name,
)
from coldstart.handing import ask
from coldstart.residence import WeightsKey
from contracts.errors import LoadError
from rpc import LiveClock
from tests.support.chaos_asking import until
from tests.support.cluster import running_cluster
from tests.support.oracle import NUM_NEW, Oracle, make_oracle, write_tokenizer
from tests.unit.coldstart.codecs.test_chunk_codecs import gaussian

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.cluster import ClusterProcess

#: What anything may take here; nothing waits for it when all is well.
PATIENCE_S = 100.0

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    made = make_oracle("llama", tmp_path_factory.mktemp("models"))
    write_tokenizer(made.model_dir)
    return made


class Sleeper:
    """A cluster with one model, which sleeps whenever nobody asks."""

    def __init__(self, cluster: ClusterProcess, client: httpx.AsyncClient, oracle: Oracle) -> None:
        self._cluster, self._client, self._oracle = cluster, client, oracle

    def log(self) -> str:
        path = Path(self._cluster.state.log_dir) / "weights.log"
        return path.read_text() if path.exists() else ""

    async def answers_right(self) -> None:
        found: list[list[int]] = []
        for prompt in self._oracle.prompts:
            body = {
                "model": "night",
                "prompt": prompt,
                "max_tokens": NUM_NEW,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            response = await self._client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            answer: dict[str, Any] = response.json()
            found.append(answer["choices"][0]["token_ids"])
        self._oracle.check(found)

    async def until_logged(self, words: str, times: int = 1) -> None:
        await until(lambda: self.log().count(words) >= times, words, PATIENCE_S)


def overrides(oracle: Oracle) -> dict[str, str]:
    """Memory for the model two times and a half: short, but enough to compress it."""
    sleeps = {"to_zero_after_s": 1, "cooldown_s": 1, "window_s": 1}
    pool = {"name": "all", "role": "mixed", "kv_blocks": 512, "workers": {"min": 0, "max": 1}, "scale": sleeps}
    models = [{"name": "night", "model": str(oracle.model_dir), "pools": [pool]}]
    size = sum(path.stat().st_size for path in oracle.model_dir.glob("*.safetensors"))
    return {
        "models": json.dumps(models),
        "dtype": "float32",
        "coordinator.autoscale.interval_s": "0.5",
        "weights.dram": str(5 * size // 2),
        "weights.cold_after_s": "0.5",
    }


@pytest.mark.slow
async def test_a_model_that_sleeps_is_compressed_and_answers_the_same_when_it_wakes(oracle: Oracle) -> None:
    async with (
        running_cluster(model=None, overrides=overrides(oracle)) as cluster,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENCE_S) as client,
    ):
        night = Sleeper(cluster, client, oracle)
        await night.answers_right()
        await night.until_logged("bytes compressed to")
        assert "times smaller, decoded at" in night.log()
        await night.answers_right()
        assert night.log().count("bytes in memory from original") == 1
        assert night.log().count("bytes in memory from compressed") == 1
        assert "compressed weights of" in night.log()


class Killed:
    """A node agent's weights with real processes, each of which may be ended at a step of its life."""

    def __init__(self, folder: Path, log_dir: Path, weights: bytes) -> None:
        self._key = WeightsKey(folder=str(folder), dtype="auto")
        self._weights = weights
        self._path = log_dir / "weights.log"
        self.service = WeightsService(
            5 * len(weights) // 2,
            None,
            worker_environ(os.environ, threads=1),
            os.getpid(),
            LiveClock(),
            ProcessLog(self._path, print),
            compress=CompressRules(cold_after_s=0.1),
        )
        #: The step at which the next process that comes to it is killed.
        self.at = ""

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in (CompressorProcess, LoaderProcess):
            for step in ("tried", "compressed", "sized", "filled"):
                if hasattr(kind, step):
                    monkeypatch.setattr(kind, step, self._killing(step, getattr(kind, step)))

    def _killing(self, step: str, life: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        async def killing(process: Any) -> Any:
            if self.at != step:
                return await life(process)
            self.at = ""
            going_on = asyncio.ensure_future(life(process))
            # In the middle of its work, if it has begun by then.
            await asyncio.sleep(0.005)
            os.kill(process._child.pid, signal.SIGKILL)
            return await going_on

        return killing

    async def use(self) -> None:
        handed = await asyncio.to_thread(ask, self.service.door, self._key, timeout_s=PATIENCE_S)
        assert bytes(handed.weights) == self._weights
        handed.close()

    def log(self) -> str:
        return self._path.read_text() if self._path.exists() else ""

    async def until_logged(self, words: str, times: int) -> None:
        await until(lambda: self.log().count(words) >= times, words, PATIENCE_S)


def slow_tiers(rates: TierRates, tier: str, since_s: float = 0.0) -> float:
    return 0.0 if tier == COMPRESSED_TIER else 1.0


def write_folder(folder: Path) -> bytes:
    """Twelve chunks of likely weights, in Tandem's format."""
    weights = gaussian(12 * CHUNK_BYTES, "bfloat16")
    sums = tuple(checksum(weights[start : start + CHUNK_BYTES]) for start in range(0, len(weights), CHUNK_BYTES))
    tensor = TensorEntry(name="embedding", offset=0, shape=(len(weights) // 2,), dtype="bfloat16")
    name = partition_name(0, 1)
    partition = Partition(file=name, num_bytes=len(weights), tensors=(tensor,), checksums=sums)
    index = Index(
        model_fingerprint="likely",
        dtype="bfloat16",
        tensor_parallel=1,
        chunk_bytes=CHUNK_BYTES,
        partitions=(partition,),
        files=(),
    )
    folder.mkdir()
    (folder / name).write_bytes(weights)
    (folder / INDEX_NAME).write_bytes(encode_index(index))
    return weights


@pytest.mark.slow
async def test_processes_that_are_killed_on_the_way_cost_time_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_cache, "_LOOK_INTERVAL_S", 0.05)
    # Decoding is a gain over any disk: what is tested is not how fast this one is.
    monkeypatch.setattr(TierRates, "bytes_per_s", slow_tiers)
    weights = await asyncio.to_thread(write_folder, tmp_path / "model")
    killed = Killed(tmp_path / "model", tmp_path, weights)
    killed.patch(monkeypatch)
    guard = Guard()
    killed.service.start(guard)
    try:
        for number, step in enumerate(("tried", "compressed"), 1):
            killed.at = step
            await killed.use()
            await killed.until_logged("are not compressed: ", number)
            assert killed.log().count("its compressor ended early: it was ended by SIGKILL") == number
        assert killed.log().count("bytes in memory from") == 1, "it was there all the time"
        await killed.use()
        for number, step in enumerate(("sized", "filled"), 1):
            await killed.until_logged("bytes compressed to", number)
            killed.at = step
            await killed.use()
            assert killed.log().count("its loader ended early: it was ended by SIGKILL") == 2 * number
            assert killed.log().count("bytes in memory from ssd") == 1 + number
        await killed.until_logged("bytes compressed to", 3)
        await killed.use()
        assert killed.log().count("bytes in memory from compressed") == 1
    finally:
        await killed.service.stop()
        guard.close()


async def test_what_is_wrong_with_a_checkpoint_is_told_by_its_loader(tmp_path: Path) -> None:
    weights = await asyncio.to_thread(write_folder, tmp_path / "model")
    (path,) = (tmp_path / "model").glob("*.tandem")
    path.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    site = Killed(tmp_path / "model", tmp_path, weights)
    guard = Guard()
    site.service.start(guard)
    try:
        with pytest.raises(LoadError, match=r"chunk 11 .* does not have its checksum, read twice; it holds embedding"):
            await site.use()
    finally:
        await site.service.stop()
        guard.close()
