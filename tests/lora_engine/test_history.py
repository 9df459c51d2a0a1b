import json
import math

import pytest

from lora_engine.history import MAX_POINTS, History


def trained(losses: list[float], validation: dict[int, float], steps_per_epoch: int = 4) -> History:
    history = History(steps_per_epoch)
    if 0 in validation:
        history.add_evaluation(0, validation[0])
    for step, loss in enumerate(losses, 1):
        history.add_step(step, loss, learning_rate=1e-3 / step)
        if step in validation:
            history.add_evaluation(step, validation[step])
    return history


FALLING = [3.0 - 0.1 * step for step in range(20)]


def test_the_best_step_is_the_first_of_the_lowest_and_never_the_plain_base_model() -> None:
    history = trained(FALLING, {0: 1.0, 4: 2.0, 8: 1.5, 12: 1.5, 16: 1.8})
    assert (history.best_step, history.best_validation_loss) == (8, 1.5)
    assert (trained(FALLING, {0: 1.0}).best_step, trained(FALLING, {}).best_validation_loss) == (None, None)


def test_overfitting_began_where_the_validation_loss_turned_while_the_training_loss_fell() -> None:
    turned = {4: 2.0, 10: 1.5, 14: 1.6, 18: 1.7}
    assert trained(FALLING, turned).overfitting_epoch == 2.5


@pytest.mark.parametrize(
    ("losses", "validation"),
    [
        (FALLING, {4: 2.0, 8: 1.5, 12: 1.6}),  # once may be noise
        (FALLING, {4: 2.0, 8: 1.5, 12: 1.51, 16: 1.51}),  # within the noise
        (FALLING, {4: 2.0, 8: 1.5, 12: 1.6, 16: 1.7, 20: 1.5}),  # it came back
        (FALLING, {4: 2.0, 8: 1.9, 12: 1.8, 16: 1.7}),  # it still falls
        (FALLING[::-1], {4: 2.0, 8: 1.5, 12: 1.6, 16: 1.7}),  # the training loss rises too: no learning by heart
        ([5.0] * 8 + [1.0] * 12, {4: 2.0, 16: 1.5, 18: 1.6, 20: 1.7}),  # it fell long before
        ([1.0] * 20, {4: 2.0, 8: 1.5, 12: 1.6, 16: 1.7}),
        (FALLING, {0: 1.0}),
        ([], {0: 1.0}),
    ],
)
def test_nothing_else_is_called_overfitting(losses: list[float], validation: dict[int, float]) -> None:
    assert trained(losses, validation).overfitting_epoch is None


def test_patience_counts_evaluations_without_a_better_one() -> None:
    history = trained(FALLING, {0: 1.0, 4: 2.0, 8: 2.0, 12: 1.9})
    assert not history.should_stop(1)
    history.add_evaluation(24, 1.9)
    assert (history.should_stop(1), history.should_stop(2), history.should_stop(None)) == (True, False, False)
    history.add_evaluation(28, math.nan)
    assert history.should_stop(2)
    history.add_evaluation(32, 1.8)
    assert not history.should_stop(1)


def test_a_million_steps_stay_small_and_keep_their_mean_and_every_evaluation() -> None:
    history = History(steps_per_epoch=1000)
    count, total = 100_003, 0.0
    for step in range(1, count + 1):
        loss = 1 + step % 7
        total += loss
        history.add_step(step, loss, learning_rate=1 / step)
        if step % 100 == 0:
            history.add_evaluation(step, 1.0)
    assert MAX_POINTS // 2 <= len(history.points) <= MAX_POINTS
    assert sum(point.steps for point in history.points) == count
    assert sum(point.loss * point.steps for point in history.points) == pytest.approx(total, rel=1e-12)
    assert len({point.steps for point in history.points[:-1]}) == 1
    assert (history.points[-1].step, history.points[-1].learning_rate) == (count, 1 / count)
    assert len(history.evaluations) == count // 100
    assert len(json.dumps(history.to_state()["points"])) < 60_000


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 513, 1023, 2049, 3000])
def test_a_resumed_history_goes_on_as_the_undisturbed_one(cut: int) -> None:
    whole, resumed = History(100), History(100)
    for step in range(1, 3001):
        for history in (whole, resumed):
            history.add_step(step, math.sin(step) + 1 / step, 1e-3, skipped=step % 701 == 0)
            if step % 250 == 0:
                history.add_evaluation(step, math.nan if step == 750 else 2 + math.cos(step / 400))
        if step == cut:
            resumed = History.from_state(json.loads(json.dumps(resumed.to_state(), allow_nan=False)))
    assert resumed.to_state() == whole.to_state()
    assert (resumed.best_step, resumed.skipped_steps) == (whole.best_step, 4)
    assert [resumed.should_stop(patience) for patience in range(1, 9)] == [
        whole.should_stop(patience) for patience in range(1, 9)
    ]


def test_a_step_that_was_not_taken_is_counted_and_leaves_no_point() -> None:
    history = History(4)
    history.add_step(1, 2.0, 1e-3)
    history.add_step(2, math.nan, 1e-3)
    history.add_step(3, 2.0, 1e-3, skipped=True)
    assert ([point.step for point in history.points], history.skipped_steps) == ([1], 2)


def test_smoothing_keeps_a_level_does_not_lag_and_calms_noise() -> None:
    level = trained([2.0] * 100, {}).smoothed()
    assert level == pytest.approx([2.0] * 100)
    slope = trained([5.0 - 0.01 * step for step in range(300)], {}).smoothed()
    assert slope[150] == pytest.approx(3.5, abs=1e-9)
    noise = trained([2.0 + (-1) ** step for step in range(300)], {}).smoothed()
    assert max(abs(value - 2.0) for value in noise[30:-30]) < 0.01
