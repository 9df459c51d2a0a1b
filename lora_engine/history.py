"""What a training job has seen so far: its losses, and what follows from them.

    history = History(steps_per_epoch=125)
    history.add_step(1, loss=2.31, learning_rate=2e-5)
    history.add_evaluation(50, loss=2.02)
    if history.should_stop(patience): …

A pure record, kept in the checkpoint, so that a resumed job decides and draws as an undisturbed one would. It stays
small however long the job is: neighbouring steps are joined to means, evaluations are all kept.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

MAX_POINTS = 512  # of the training loss; even, as they are joined in pairs
_OVERFITTING_EVALUATIONS = 2  # one that is worse may be noise
_MARGIN = 0.01  # of a loss; what differs less may be noise too


@dataclass(frozen=True, slots=True)
class Point:
    """The mean loss of `steps` neighbouring steps, and number and learning rate of the last of them."""

    step: int
    loss: float
    learning_rate: float
    steps: int = 1


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The validation loss after a step's update; of the plain base model where `step` is 0. Infinite if not finite."""

    step: int
    loss: float


class History:
    """Losses of one job, in the order of its steps.

    Attributes:
        steps_per_epoch: optimizer steps in one pass over the examples.
        points: the training loss, at most `MAX_POINTS` of them, each for as many steps as the others but the last.
        evaluations: every one.
        skipped_steps: how many were not taken, because their loss or gradient was not finite.
    """

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.points: list[Point] = []
        self.evaluations: list[Evaluation] = []
        self.skipped_steps = 0
        self._steps_per_point = 1
        self._best: Evaluation | None = None  # of a trained adapter: the plain base model is no candidate
        self._since_best = self._worse = 0  # evaluations after it; how many of the last ones in a row were worse

    def add_step(self, step: int, loss: float, learning_rate: float, *, skipped: bool = False) -> None:
        """One step that was made; a skipped one is only counted."""
        if skipped or not math.isfinite(loss):
            self.skipped_steps += 1
            return
        point = Point(step, loss, learning_rate)
        if self.points and self.points[-1].steps < self._steps_per_point:
            self.points[-1] = _joined(self.points[-1], point)
        else:
            self.points.append(point)
        if len(self.points) == MAX_POINTS and self.points[-1].steps == self._steps_per_point:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [_joined(first, second) for first, second in pairs]
            self._steps_per_point *= 2

    def add_evaluation(self, step: int, loss: float) -> None:
        """The validation loss after `step`; before the first step, `step` is 0."""
        evaluation = Evaluation(step, loss if math.isfinite(loss) else math.inf)
        self.evaluations.append(evaluation)
        if step and evaluation.loss < (self._best.loss if self._best else math.inf):
            self._best, self._since_best, self._worse = evaluation, 0, 0
        elif step:
            self._since_best += 1
            worse = self._best is not None and evaluation.loss > self._best.loss * (1 + _MARGIN)
            self._worse = self._worse + 1 if worse else 0

    def should_stop(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations were all no better than the best one before them; None: never."""
        return patience is not None and self._since_best >= patience

    @property
    def best_step(self) -> int | None:
        """After which the validation loss was lowest, the first of equals; None as long as none was finite."""
        return None if self._best is None else self._best.step

    @property
    def best_validation_loss(self) -> float | None:
        return None if self._best is None else self._best.loss

    @property
    def overfitting_epoch(self) -> float | None:
        """The epoch, with its fraction, of the lowest validation loss, if from there on the model learnt by heart.

        That is said when at least the last two evaluations were worse while the training loss kept falling: its mean
        after the best step is below its mean over as many points before it. Both by more than 1 %. Otherwise None.
        """
        best = self._best
        if best is None or self._worse < _OVERFITTING_EVALUATIONS:
            return None
        after = [point for point in self.points if point.step > best.step]
        before = [point for point in self.points if point.step <= best.step][-len(after) :]
        if not after or not before or _mean(after) >= _mean(before) * (1 - _MARGIN):
            return None
        return best.step / self.steps_per_epoch

    def smoothed(self) -> list[float]:
        """The training loss at each point as a mean of its neighbours, weighted by a Gaussian: without lag."""
        width = max(1.0, len(self.points) / 60)
        reach = int(3 * width)
        kernel = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
        losses = [point.loss for point in self.points]
        smooth = []
        for index in range(len(losses)):
            first = max(0, index - reach)
            near = losses[first : index + reach + 1]
            weights = kernel[first - index + reach :][: len(near)]
            total = sum(loss * weight for loss, weight in zip(near, weights, strict=True))
            smooth.append(total / sum(weights))
        return smooth

    def to_state(self) -> dict[str, Any]:
        """Everything, as JSON can hold it; `from_state` gives back an equal history."""
        return {
            "steps_per_epoch": self.steps_per_epoch,
            "steps_per_point": self._steps_per_point,
            "skipped_steps": self.skipped_steps,
            "points": [[point.step, point.loss, point.learning_rate, point.steps] for point in self.points],
            "evaluations": [
                [evaluation.step, evaluation.loss if math.isfinite(evaluation.loss) else None]
                for evaluation in self.evaluations
            ],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """A history as `to_state` wrote it."""
        history = cls(state["steps_per_epoch"])
        history._steps_per_point = state["steps_per_point"]
        history.skipped_steps = state["skipped_steps"]
        history.points = [Point(*values) for values in state["points"]]
        for step, loss in state["evaluations"]:
            history.add_evaluation(step, math.inf if loss is None else loss)
        return history


def _joined(first: Point, second: Point) -> Point:
    steps = first.steps + second.steps
    loss = first.loss + (second.loss - first.loss) * (second.steps / steps)
    return Point(second.step, loss, second.learning_rate, steps)


def _mean(points: Sequence[Point]) -> float:
    return sum(point.loss * point.steps for point in points) / sum(point.steps for point in points)
