"""Oracles and operators, made once for the session."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from engine.ops import TorchOps, select_ops
from tests.support.oracle import Oracle, TieCount, make_oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine.ops.api import Ops


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from more, and spinning teams lose much on a loaded machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tie_count() -> Iterator[TieCount]:
    """Shared by every comparison; the rule on their share is checked when the last one is done."""
    count = TieCount()
    yield count
    assert count.ties * 10_000 <= count.tokens, f"{count.ties} ties in {count.tokens} tokens"


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory, tie_count: TieCount) -> Callable[[str], Oracle]:
    """By name of the tiny model; each is made at its first use."""
    folder = tmp_path_factory.mktemp("tiny-models")
    made: dict[str, Oracle] = {}

    def oracle(name: str) -> Oracle:
        if name not in made:
            made[name] = make_oracle(name, folder)
            made[name].count = tie_count
        return made[name]

    return oracle


@pytest.fixture(scope="session")
def cpu_ops() -> Ops:
    """What a worker on this machine would use: compiled kernels, or torch where no compiler is."""
    return select_ops("cpu", log=lambda _: None)


@pytest.fixture(params=["compiled", "torch"])
def any_ops(request: pytest.FixtureRequest, cpu_ops: Ops) -> Ops:
    return cpu_ops if request.param == "compiled" else TorchOps()
