import pytest

from worker import watchdog
from worker.channel import News
from worker.watchdog import Watchdog


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    return clock


def step(seconds: float) -> News:
    return News("step", {"seconds": seconds})


def test_a_training_may_be_silent_for_ten_steps_but_at_least_for_the_setting(clock: Clock) -> None:
    dog = Watchdog(300)
    dog.heard(News("planned", {}))
    assert dog.limit == 300
    for seconds in (2, 2, 500):  # one slow step does not count: the median does
        dog.heard(step(seconds))
    assert dog.limit == 300
    for _ in range(3):
        dog.heard(step(60))
    assert dog.limit == 600
    clock.now = 599
    assert not dog.expired
    clock.now = 601
    assert dog.expired
    dog.heard(News("alive", {}))
    assert not dog.expired


def test_before_the_first_step_has_ended_the_plan_says_how_long_one_may_take(clock: Clock) -> None:
    dog = Watchdog(300)
    dog.heard(News("planned", {"predicted_step_seconds": 90.0}))
    assert dog.limit == 900  # also for the evaluation that comes before it
    dog.heard(step(2))
    assert dog.limit == 900
    for unknown in ({"predicted_step_seconds": None}, {"predicted_step_seconds": 1.0}):
        dog.heard(News("planned", unknown))
        assert dog.limit == 300


def test_other_work_tells_less_and_has_longer(clock: Clock) -> None:
    dog = Watchdog(300)
    clock.now = 3599
    assert not dog.expired  # a base model is being loaded
    dog.heard(News("planned", {}))
    clock.now += 301
    assert dog.expired
    dog.heard(News("phase", {"phase": "writing adapter"}))
    assert dog.limit == 3600
