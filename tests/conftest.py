"""Settings of every test: Hypothesis without limits of time (machines are loaded), GPU tests where a GPU is, threads
that wait passively, and no garbage collection of what stays anyway."""

from __future__ import annotations

import gc
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

from tests.support.commands import run_tandem as run_tandem
from tests.support.long_tests import LONG

# As workers have it: threads that wait by spinning take the cores from other tests.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# A background job of a shell ignores Ctrl-C, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile(
    "tandem",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
    # Each run draws others.
    max_examples=100 if LONG else 50,
)
settings.load_profile("tandem")


#: Files that start one cluster after the other, and by name would be the last, with nothing left to run beside them.
LONG_ONES = ("test_weights.py", "test_store.py", "test_store_faults.py", "test_many_models.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG_ONES)
    needy = [item for item in items if item.get_closest_marker("gpu") is not None]
    if needy and not _has_gpu():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


def pytest_collection_finish() -> None:
    # Modules and collected tests stay to the end; collecting among them took an eighth of the simulations' time.
    gc.collect()
    gc.freeze()


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
