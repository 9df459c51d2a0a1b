"""Token buckets, by a clock of the test's own."""

import threading

import pytest

from service import limits
from service.limits import Buckets


class Clock:
    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    buckets = Buckets(rate=2, burst=5, clock=clock)
    assert [buckets.take("a") for _ in range(6)] == [None] * 5 + [1]
    clock.seconds += 0.5
    assert [buckets.take("a") for _ in range(2)] == [None, 1]
    clock.seconds += 100
    assert [buckets.take("a") for _ in range(6)] == [None] * 5 + [1]  # never more than the burst


def test_the_wait_that_is_told_is_long_enough() -> None:
    clock = Clock()
    buckets = Buckets(rate=0.1, burst=1, clock=clock)
    assert buckets.take("a") is None
    wait = buckets.take("a")
    assert wait == 10
    clock.seconds += wait
    assert buckets.take("a") is None


def test_one_is_not_held_up_by_another() -> None:
    buckets = Buckets(rate=1, burst=1, clock=Clock())
    assert buckets.take("a") is None
    assert buckets.take("a") is not None
    assert buckets.take("b") is None


def test_a_clock_that_stands_still_gives_nothing_twice_to_threads() -> None:
    buckets, allowed, start = Buckets(rate=1, burst=50, clock=Clock()), [], threading.Barrier(8)

    def take() -> None:
        start.wait()
        allowed.extend(buckets.take("a") is None for _ in range(25))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(allowed) == 50


def test_memory_is_bounded_and_forgetting_only_allows_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_MOST_BUCKETS", 3)
    buckets = Buckets(rate=1, burst=1, clock=Clock())
    for name in "abcd":
        assert buckets.take(name) is None
    assert buckets.take("d") is not None  # still known
    assert buckets.take("a") is None  # forgotten


@pytest.mark.parametrize(
    ("address", "counted_as"),
    [
        ("192.0.2.7", "192.0.2.7"), ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"), ("testclient", "testclient"),
    ],
)  # fmt: skip
def test_what_counts_as_one_address(address: str, counted_as: str) -> None:
    assert limits.network(address) == counted_as
