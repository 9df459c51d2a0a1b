"""Optimizers on one flat parameter, learning-rate schedules, gradient clipping."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_engine.config import TrainingConfig, check_device

# bitsandbytes' names of its optimizers.
_BITSANDBYTES = {"adamw_8bit": "AdamW8bit", "paged_adamw": "PagedAdamW", "paged_adamw_8bit": "PagedAdamW8bit"}


@dataclass(frozen=True, slots=True)
class Rate:
    """The learning rate of a slice of the flat parameters.

    Attributes:
        where: the slice.
        peak: at the height of the schedule; None: `TrainingConfig.learning_rate`.
        ratio: multiplies it.
    """

    where: slice
    peak: float | None = None
    ratio: float = 1.0


class Optimizer:
    """AdamW or SGD with momentum, with one fused call for all parameters that have the same rate.

    All state is there from the start, so that a checkpoint can be put into it.
    """

    def __init__(self, parameters: Tensor, gradients: Tensor, config: TrainingConfig, rates: Sequence[Rate]) -> None:
        """Update flat fp32 `parameters` by `gradients` of the same length; `rates` cover both.

        Raises:
            SpecError: `config.optimizer` does not run on this device.
        """
        check_device(config, parameters.device.type)
        parts = [parameters[rate.where] for rate in rates]
        for part, rate in zip(parts, rates, strict=True):
            part.grad = gradients[rate.where]
        self._multipliers = [(rate.peak or config.learning_rate) / config.learning_rate * rate.ratio for rate in rates]
        make = {"adamw": _adamw, "sgd": _sgd}.get(config.optimizer, _bitsandbytes)
        self._inner = make(parts, [rate.where for rate in rates], config)

    def step(self, learning_rate: float) -> None:
        """One update; `learning_rate` is the schedule's, of the parameters whose `Rate` says nothing else."""
        for group, multiplier in zip(self._inner.groups, self._multipliers, strict=True):
            group["lr"] = multiplier * learning_rate
        self._inner.step()

    def state(self) -> dict[str, Tensor]:
        """References, not copies: an optimizer into which they are copied goes on to the bit."""
        return dict(self._inner.state)


@dataclass(frozen=True, slots=True)
class _Inner:
    """What differs between optimizers; `groups` are PyTorch's parameter groups, one a rate."""

    groups: list[dict[str, Any]]
    state: Mapping[str, Tensor]
    step: Callable[[], Any]


def _adamw(parts: Sequence[Tensor], places: Sequence[slice], config: TrainingConfig) -> _Inner:
    """Decoupled weight decay (arXiv 1711.05101). State: moments like the parameters, and steps by rate."""
    optimizer = torch.optim.AdamW(_grouped(parts), lr=0.0, weight_decay=config.weight_decay, fused=True)
    moments = {name: _zeros(parts) for name in ("exp_avg", "exp_avg_sq")}
    steps = torch.zeros(len(parts), device=parts[0].device)
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        optimizer.state[part] = {"step": steps[number], **{name: moment[place] for name, moment in moments.items()}}
    return _Inner(optimizer.param_groups, {"step": steps, **moments}, optimizer.step)


def _sgd(parts: Sequence[Tensor], places: Sequence[slice], config: TrainingConfig) -> _Inner:
    """Weight decay is part of the gradient, as in PyTorch. State: where there is momentum, a buffer of it."""
    optimizer = torch.optim.SGD(
        _grouped(parts), lr=0.0, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    state = {"momentum_buffer": _zeros(parts)} if config.momentum else {}
    for part, place in zip(parts, places, strict=True):
        # From zero the first step is PyTorch's, whose buffer begins as the gradient.
        optimizer.state[part] = {name: buffer[place] for name, buffer in state.items()}
    return _Inner(optimizer.param_groups, state, optimizer.step)


def _bitsandbytes(parts: Sequence[Tensor], _: Sequence[slice], config: TrainingConfig) -> _Inner:
    """AdamW with state in 8 bit, in blocks of 256 (arXiv 2110.02861), in pages that move to the host, or both."""
    import bitsandbytes  # takes seconds, and only these optimizers need it

    kind = getattr(bitsandbytes.optim, _BITSANDBYTES[config.optimizer])
    optimizer = kind(_grouped(parts), lr=0.0, weight_decay=config.weight_decay)
    steps = torch.zeros((), dtype=torch.int64)  # theirs are Python numbers, which no checkpoint can be copied into
    state = {"step": steps}
    for number, part in enumerate(parts):
        optimizer.init_state(optimizer.param_groups[number], part, number, 0)
        kept = ((name, optimizer.state[part].get(name)) for name in ("state1", "state2", "absmax1", "absmax2"))
        state |= {f"{name}.{number}": tensor for name, tensor in kept if tensor is not None}

    def step() -> None:
        for own in optimizer.state.values():
            own["step"] = int(steps)
        optimizer.step()
        steps.add_(1)

    return _Inner(optimizer.param_groups, state, step)


def _zeros(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_zeros(sum(len(part) for part in parts))


def _grouped(parts: Sequence[Tensor]) -> list[dict[str, Any]]:
    return [{"params": [part]} for part in parts]


def learning_rate(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Rate of step `step`, counted from 0: linear warm-up to the peak, then the schedule, 0 after the last step."""
    warmup = int(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}
    return config.learning_rate * shape[config.schedule]


def clip(gradients: Tensor, max_norm: float) -> float:
    """Scale `gradients` down to the global norm `max_norm` in place; the norm before that."""
    norm = float(torch.linalg.vector_norm(gradients))
    if norm > max_norm:
        gradients.mul_(max_norm / norm)
    return norm
