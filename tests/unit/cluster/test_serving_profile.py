"""What a cluster adds to its engines, from answers whose parts are known."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import msgspec
import pytest
from pydantic import SecretStr

from cluster.plan import Site, plan_launches
from cluster.serving_profile import (
    OUTPUT_TOKENS,
    ROUNDS,
    ServedAnswer,
    cluster_to_measure,
    overheads,
    report_lines,
)
from contracts.config import ClusterConfig, EngineConfig, GatewayConfig, PoolConfig
from contracts.latency import StepWork
from contracts.profile import ServingOverheads
from tests.support.profiles import PROFILE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ADDED = ServingOverheads(first_token_s=0.004, step_s=0.002, handoff_s=0.007)
#: Of `PROFILE`'s link.
BYTES_PER_S = 1e9


def answers(added: ServingOverheads, *, rng: random.Random | None = None) -> Iterator[ServedAnswer]:
    """As a cluster would give them whose engines follow `PROFILE`; with `rng`, disturbed: every token is up to 0.3 ms
    late, and a quarter of the answers are slowed by a neighbour."""
    for number in range(3 * ROUNDS):
        prompt_tokens = (16, 100, 512)[number % 3]
        slower = 1.5 if rng is not None and number % 4 == 3 else 1.0
        noise_s = 0.0 if rng is None else 0.0003
        num_blocks = -(-prompt_tokens // PROFILE.block_tokens)
        link_s = num_blocks * PROFILE.block_tokens * PROFILE.kv_token_bytes / BYTES_PER_S
        steps_s = [
            PROFILE.latency.step_s(StepWork(num_decodes=1, context_tokens=prompt_tokens + later))
            for later in range(1, OUTPUT_TOKENS)
        ]
        own_s = [link_s + added.handoff_s, *[added.step_s] * (OUTPUT_TOKENS - 2)]
        yield ServedAnswer(
            prompt_tokens,
            slower * (PROFILE.latency.step_s(StepWork(prompt_tokens, prompt_tokens * (prompt_tokens + 1) / 2, 1)))
            + added.first_token_s,
            tuple(
                slower * (step_s + more_s) + (rng.uniform(0.0, noise_s) if rng else 0.0)
                for step_s, more_s in zip(steps_s, own_s, strict=True)
            ),
        )


def test_what_is_neither_step_nor_link_is_serving() -> None:
    found = overheads(list(answers(ADDED)), PROFILE)
    assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(ADDED))


def test_without_a_link_its_bytes_are_part_of_the_handoff() -> None:
    seen = list(answers(ADDED))
    found = overheads(seen, msgspec.structs.replace(PROFILE, transfer=None))
    assert found.handoff_s > overheads(seen, PROFILE).handoff_s == pytest.approx(ADDED.handoff_s)


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_in_some_of_the_answers_do_not_count(seed: int) -> None:
    found = overheads(list(answers(ADDED, rng=random.Random(seed))), PROFILE)
    assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(ADDED), abs=0.0004)


def test_tokens_that_arrive_together_change_nothing() -> None:
    def together(answer: ServedAnswer) -> ServedAnswer:
        """From the third token on, each odd one comes late, with the next."""
        second_s, *gaps_s = answer.gaps_s
        pairs = zip(gaps_s[::2], gaps_s[1::2], strict=True)
        return ServedAnswer(answer.prompt_tokens, answer.ttft_s, (second_s, *(t for a, b in pairs for t in (a + b, 0))))

    found = overheads([together(answer) for answer in answers(ADDED)], PROFILE)
    assert msgspec.structs.astuple(found) == pytest.approx(msgspec.structs.astuple(ADDED))


def test_answers_that_beat_the_fit_add_nothing_and_that_is_told() -> None:
    nothing = ServingOverheads(first_token_s=0.0, step_s=0.0, handoff_s=0.0)
    quicker = [
        ServedAnswer(answer.prompt_tokens, 0.9 * answer.ttft_s, tuple(0.9 * gap_s for gap_s in answer.gaps_s))
        for answer in answers(nothing)
    ]
    found = overheads(quicker, PROFILE)
    assert found == nothing
    assert "\n".join(report_lines(quicker, PROFILE, found)).count("not slower than the fitted steps alone") == 3


def test_the_report_sets_what_was_seen_beside_what_is_modelled() -> None:
    seen = list(answers(ADDED))
    heading, *rows, first, second, later = report_lines(seen, PROFILE, ADDED)
    assert heading.split()[:3] == ["prompt", "TTFT", "ms"]
    for row, prompt_tokens in zip(rows, (16, 100, 512), strict=True):
        tokens, *cells = row.split()
        assert int(tokens) == prompt_tokens
        assert cells[::2] == cells[1::2]
        assert len(row) == len(heading)
    assert first == "serving adds to a first token: 4.000 ms"
    assert second == "serving adds to a second token: 7.000 ms"
    assert later == "serving adds to a later token: 2.000 ms"


def launched(config: ClusterConfig) -> list[tuple[str, tuple[int, ...], int, int, int | None]]:
    site = Site(
        model_dir="m",
        model_name="m",
        coordinator_address="c",
        cluster_token="t",
        runtime_dir="r",
        bind="b",
        parent_pid=None,
        allowed_cores=tuple(range(8)),
    )
    return [
        (launch.role, launch.cores, launch.threads, launch.max_batch_tokens, launch.num_blocks)
        for launch in plan_launches(config, site)
    ]


def test_two_workers_of_the_configured_pools_are_measured(tmp_path: Path) -> None:
    config = ClusterConfig(
        model="org/name",
        engine=EngineConfig(max_batch_tokens=256),
        gateway=GatewayConfig(host="0.0.0.0", port=80, api_keys=(SecretStr("sk-hidden"),)),
        pools=(
            PoolConfig(name="readers", role="prefill", workers=3, cores=(0, 1, 2), max_batch_tokens=128),
            PoolConfig(name="writers", role="decode", workers=2, cores=(4, 5), kv_blocks=77),
        ),
    )
    measured = cluster_to_measure(config, tmp_path, threads=1)
    assert launched(measured) == [("prefill", (0,), 1, 256, None), ("decode", (4,), 1, 256, 77)]
    assert measured.model == str(tmp_path)
    assert (measured.gateway.host, measured.gateway.port) == ("127.0.0.1", 0)
    assert "sk-hidden" not in measured.model_dump_json()
    assert ClusterConfig.model_validate_json(measured.model_dump_json()) == measured


def test_mixed_workers_are_measured_in_both_roles(tmp_path: Path) -> None:
    config = ClusterConfig(pools=(PoolConfig(name="all", role="mixed", workers=4),))
    assert launched(cluster_to_measure(config, tmp_path, threads=2)) == [
        ("prefill", (0, 1), 2, 512, None),
        ("decode", (2, 3), 2, 512, None),
    ]
