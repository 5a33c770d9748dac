"""When the disk is asked."""

from __future__ import annotations

import errno
import os

from kvstore.ssd.health import FIRST_BACKOFF_S, LONGEST_BACKOFF_S, MAX_READ_FAILURES, Breaker, Health, describe


def error(number: int) -> OSError:
    return OSError(number, os.strerror(number), "a/file")


def test_a_closed_breaker_grants_one_try_after_each_backoff() -> None:
    breaker = Breaker(1)
    assert breaker.may_try(0.0)
    breaker.failed("broken", 0.0)
    assert breaker.problem == "broken"
    assert not breaker.may_try(FIRST_BACKOFF_S - 0.01)
    assert breaker.may_try(FIRST_BACKOFF_S)
    assert not breaker.may_try(FIRST_BACKOFF_S + 0.01), "the try is under way"
    breaker.worked()
    assert not breaker.problem
    assert breaker.may_try(FIRST_BACKOFF_S + 0.01)


def test_the_backoff_grows_with_failed_tries_up_to_a_limit() -> None:
    breaker, now_s = Breaker(1), 0.0
    waits_s: list[float] = []
    breaker.failed("broken", now_s)
    for _ in range(10):
        begun_s = now_s
        while not breaker.may_try(now_s):
            now_s += 0.25
        waits_s.append(now_s - begun_s)
        breaker.failed("broken", now_s)
    assert waits_s[:3] == [FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S, 4 * FIRST_BACKOFF_S]
    assert max(waits_s) == waits_s[-1] == LONGEST_BACKOFF_S


def test_failures_of_calls_that_were_under_way_do_not_make_it_longer() -> None:
    breaker = Breaker(1)
    for _ in range(5):
        breaker.failed("broken", 0.0)
    assert breaker.may_try(FIRST_BACKOFF_S)


def test_reading_goes_on_through_a_few_failures_and_while_writing_fails() -> None:
    health = Health()
    health.write_failed(error(errno.ENOSPC), 0.0)
    assert not health.may_write(0.0)
    for _ in range(MAX_READ_FAILURES - 1):
        health.read_failed(error(errno.EIO), 0.0)
    assert health.may_read(0.0)
    health.read_failed(error(errno.EIO), 0.0)
    assert not health.may_read(0.0)


def test_a_success_between_failures_forgives_them() -> None:
    health = Health()
    for _ in range(3 * MAX_READ_FAILURES):
        health.read_failed(error(errno.EIO), 0.0)
        health.read_worked()
    assert health.may_read(0.0)
    assert not health.problem


def test_people_learn_what_it_is_and_where() -> None:
    assert describe(error(errno.ENOSPC)).startswith("disk full: ")
    assert describe(error(errno.EDQUOT)).startswith("disk full: ")
    assert describe(error(errno.EACCES)).startswith("not allowed: ")
    assert "a/file" in describe(error(errno.EIO))
