"""Closed forms of queueing theory that a simulator must reproduce (DistServe, OSDI'24, section 3.1).

Poisson arrivals at R per second, one request at a time, each of the same service time of D seconds.
"""

from __future__ import annotations


def single_ttft_s(rate_per_s: float, service_s: float) -> float:
    """Mean time from arrival to the end of service at one server: M/D/1. `R D < 1`."""
    load = rate_per_s * service_s
    return service_s + rate_per_s * service_s**2 / (2.0 * (1.0 - load))


def two_stage_pipeline_ttft_s(rate_per_s: float, service_s: float) -> float:
    """As `single_ttft_s`, with the service cut in two equal stages that work on different requests. `R D < 2`."""
    load = rate_per_s * service_s
    return service_s + rate_per_s * service_s**2 / (4.0 * (2.0 - load))


def tensor_parallel_ttft_s(rate_per_s: float, service_s: float, speedup: float) -> float:
    """As `single_ttft_s`, on two devices that together serve one request `speedup` times as fast."""
    return service_s / speedup + rate_per_s * service_s**2 / (2.0 * speedup * (speedup - rate_per_s * service_s))
