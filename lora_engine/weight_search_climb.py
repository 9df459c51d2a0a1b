"""How weights are improved: Adam (arXiv 1412.6980) from the best beginning, with the best of all that was seen kept."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_engine import optim
from lora_engine.data import Document, epoch_order
from lora_engine.errors import Diverged
from lora_engine.merging.config import MAX_WEIGHT
from lora_engine.weight_search_config import SearchConfig
from lora_engine.weight_search_data import Splits
from lora_engine.weight_search_loss import StackLoss

T = TypeVar("T")
Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """Weights (adapters × groups, fp64) that were tried, and their loss per target token on the selection split."""

    name: str
    weights: Tensor
    selection_loss: float

    @property
    def rank(self) -> float:
        """The lower the better; a loss that is no number is the worst."""
        return self.selection_loss if math.isfinite(self.selection_loss) else math.inf


@dataclass(frozen=True, slots=True)
class Found:
    """How a search went.

    Attributes:
        best: of all that was tried, but for the base model alone.
        rows: the beginnings: the base model alone, each adapter alone, their mean.
        history: {step, loss, selection_loss} of the updates; the loss is that of the step's examples before it.
        skipped: steps left out because loss or gradient were not finite.
    """

    best: Row
    rows: Sequence[Row]
    history: Sequence[dict[str, Any]]
    skipped: int


class Count:
    """Tells how much of a search is done, in evaluations of a split and updates."""

    def __init__(self, tell: Tell | None, adapters: int, steps: int) -> None:
        self._tell = tell
        self._done = 0
        self._total = 2 * len(beginnings((adapters, 1))) + 1 + steps

    def over(self, items: Sequence[T]) -> Iterator[T]:
        """The items, each told of once it is done with."""
        for item in items:
            yield item
            self._done += 1
            if self._tell is not None:
                self._tell(self._done, self._total)


def beginnings(shape: tuple[int, int]) -> list[tuple[str, Tensor]]:
    """The base model alone, each adapter alone with weight 1, and, of several, their mean: adapters × groups each."""
    adapters, groups = shape
    each = torch.eye(adapters, dtype=torch.float64)
    columns = [("base model", each.new_zeros(adapters)), *(("single", column) for column in each)]
    if adapters > 1:
        columns.append(("uniform", each.mean(0)))
    return [(name, column[:, None].repeat(1, groups)) for name, column in columns]


def climb(losses: StackLoss, shape: tuple[int, int], splits: Splits, config: SearchConfig, count: Count) -> Found:
    """The search itself; `shape` is that of the weights.

    Raises:
        Diverged: no beginning has a finite loss.
    """
    rows = [Row(name, w, losses.loss(w, splits.selection)) for name, w in count.over(beginnings(shape))]
    best = min(rows[1:], key=lambda row: row.rank)
    if not math.isfinite(best.rank):
        raise Diverged("the loss is not finite with any of the adapters; are they of this base model?", step=0)
    weights = best.weights.clone()
    optimizer = torch.optim.Adam([weights])
    history: list[dict[str, Any]] = []
    skipped = in_a_row = 0
    for step in count.over(range(config.steps)):
        loss, weights.grad = losses.gradient(weights, _examples(splits, config, step))
        finite = math.isfinite(loss) and bool(torch.isfinite(weights.grad).all())
        in_a_row = 0 if finite else in_a_row + 1
        skipped += not finite
        if in_a_row >= config.training.max_nonfinite_steps:
            break
        if finite:
            optimizer.param_groups[0]["lr"] = optim.learning_rate(config.training, step, config.steps)
            optimizer.step()
            weights.clamp_(-MAX_WEIGHT, MAX_WEIGHT)
        selection_loss = None
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            row = Row("found", weights.clone(), losses.loss(weights, splits.selection))
            best, selection_loss = min(best, row, key=lambda row: row.rank), row.selection_loss
        history.append(
            {"step": step + 1, "loss": finite_or_none(loss), "selection_loss": finite_or_none(selection_loss)}
        )
    return Found(best, rows, history, skipped)


def finite_or_none(value: float | None) -> float | None:
    """As JSON can hold it."""
    return value if value is not None and math.isfinite(value) else None


def _examples(splits: Splits, config: SearchConfig, step: int) -> list[Document]:
    size = config.global_batch
    epoch, index = divmod(step, -(-len(splits.search) // size))
    order = epoch_order(splits.dataset.digest, config.seed, epoch, len(splits.search))
    return [splits.search[number] for number in order[index * size : (index + 1) * size]]
