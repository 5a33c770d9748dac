"""Settings of every test: Hypothesis without deadlines (machines are loaded), GPU tests where a GPU is."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.support.commands import run_tandem as run_tandem

settings.register_profile("tandem", deadline=None, print_blob=True)
settings.load_profile("tandem")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needy = [item for item in items if item.get_closest_marker("gpu") is not None]
    if needy and not _has_gpu():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
