"""What a machine's transports are, and what is expected of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cluster import transports
from cluster.launch import TransferOptions
from cluster.transports import check_interface, has_rdma, link_class, tcp_class
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a 10 Gbit/s card, one that says nothing, and one with an RDMA device behind it."""
    for name, speed in {"eth0": "10000\n", "veth0": "-1\n", "ib0": "200000\n"}.items():
        folder = tmp_path / "net" / name
        folder.mkdir(parents=True)
        (folder / "speed").write_text(speed)
    (tmp_path / "net" / "lo").mkdir()
    (tmp_path / "rdma" / "mlx5_0" / "device" / "net" / "ib0").mkdir(parents=True)
    monkeypatch.setattr(transports, "NETWORK_INTERFACES", tmp_path / "net")
    monkeypatch.setattr(transports, "RDMA_DEVICES", tmp_path / "rdma")
    return tmp_path


def test_the_class_follows_the_interface() -> None:
    assert link_class("shm", TransferOptions(interface="eth0")).name == "shared memory"
    assert link_class("ucx", TransferOptions()).name == "memory of the same machine"
    assert link_class("collective", TransferOptions()).name == "TCP on loopback"
    assert link_class("ucx", TransferOptions(interface="ib0")).name == "RDMA"
    assert link_class("collective", TransferOptions(interface="ib0")).name == "TCP on ib0"
    assert link_class("ucx", TransferOptions(interface="eth0")).name == "TCP on eth0"


def test_the_speed_of_an_interface_sets_what_tcp_should_reach() -> None:
    assert tcp_class("eth0").bandwidth_bytes_per_s == 0.625e9
    assert tcp_class("ib0").bandwidth_bytes_per_s == 1.5e9
    assert tcp_class("veth0").bandwidth_bytes_per_s == tcp_class("lo").bandwidth_bytes_per_s == 0.1e9


def test_the_operator_may_expect_something_else() -> None:
    expected = link_class("ucx", TransferOptions(interface="ib0", expect_bytes_per_s=20 * 10**9))
    assert (expected.name, expected.bandwidth_bytes_per_s) == ("RDMA as configured", 20e9)


def test_rdma_is_looked_for_behind_the_interface(machine: Path) -> None:
    assert has_rdma("ib0")
    assert not has_rdma("eth0")
    (machine / "rdma" / "mlx5_0" / "device" / "net" / "ib0").rmdir()
    assert not has_rdma("ib0")


def test_an_interface_that_is_not_there_is_refused_by_name() -> None:
    check_interface(None)
    check_interface("eth0")
    with pytest.raises(ConfigError, match=r"no interface 'eth7' here; there are eth0, ib0, lo, veth0"):
        check_interface("eth7")
