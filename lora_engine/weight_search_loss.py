"""The loss of a weighted stack on examples, and its gradient by the weights, in micro-batches that fit into memory."""

from collections.abc import Iterable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from lora_engine import machine, passes, plan
from lora_engine.data import Document
from lora_engine.weight_search_config import SearchSpec
from lora_engine.weight_search_data import Splits
from lora_engine.weight_search_stack import WeightedStack

T = TypeVar("T")


class StackLoss:
    """Negative log-likelihood per target token; the weights (adapters × groups) are fp64 on the CPU."""

    def __init__(self, stack: WeightedStack, spec: SearchSpec, splits: Splits) -> None:
        """Choose micro-batches and threads as for a training of the stack.

        Raises:
            WouldNotFit: the longest example needs more memory than there is.
        """
        self._stack = stack
        self._run = passes.choose(stack.adapted)
        self._threads_before = torch.get_num_threads()
        self._held_out: dict[int, list[Any]] = {}
        base, training = stack.adapted.base, spec.search.training
        if base.device.type == "cpu":
            machine.keep_freed_memory()
        try:
            trainable = stack.adapted.parameters.numel()
            held_out = [*splits.selection, *splits.test]
            self._plan = plan.make(
                plan.Job(
                    training, base, self._run, trainable, splits.dataset, splits.search, held_out, spec.threads
                )
            )  # fmt: skip
        except BaseException:
            self.close()
            raise
        self._choice = self._plan.choice
        self._largest = training.global_batch * self._plan.longest
        self._heap = machine.Heap(base.device)

    def loss(self, weights: Tensor, documents: Sequence[Document]) -> float:
        """Over all of a split, whose micro-batches are made once."""
        self._stack.set(weights)

        def made() -> float:
            if id(documents) not in self._held_out:
                tokens = min(self._choice.micro_batch_tokens, self._largest)
                self._held_out[id(documents)] = list(self._run.batches(documents, tokens))
            return sum(self._run.loss(batch) for batch in self._held_out[id(documents)])

        return machine.within_memory(made, self._shrink) / _targets(documents)

    def gradient(self, weights: Tensor, documents: Sequence[Document]) -> tuple[float, Tensor]:
        """The loss over `documents`, and its gradient (like the weights)."""
        self._stack.set(weights)
        targets = _targets(documents)

        def made() -> float:
            self._stack.adapted.gradients.zero_()
            batches = self._run.batches(documents, self._choice.micro_batch_tokens)
            return sum(self._run.gradients(batch, targets, None) for batch in batches)

        loss = machine.within_memory(made, self._shrink)
        self._heap.tidy()
        return loss, self._stack.gradient()

    def close(self) -> None:
        """Give back threads and dequantised weights; the stack stays on the base model."""
        torch.set_num_threads(self._threads_before)
        self._run.keep_dequantized(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shrink(self) -> None:
        device = self._stack.adapted.base.device
        self._choice = plan.shrink(self._run, self._choice, self._plan.longest, device)
        self._held_out.clear()


def _targets(documents: Iterable[Document]) -> int:
    return sum(document.trained_tokens for document in documents)
