"""Optimizers on one flat parameter, learning-rate schedules, gradient clipping."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        self._multipliers = [(rate.peak or config.learning_rate) / config.learning_rate * rate.ratio for rate in rates]
        make = {"adamw": _adamw, "sgd": _sgd}.get(config.optimizer, _bitsandbytes)
        places = [rate.where for rate in rates]
        self._inner = make([parameters[where] for where in places], [gradients[where] for where in places], config)

    def step(self, learning_rate: float) -> None:
        """One update; `learning_rate` is the schedule's, of the parameters whose `Rate` says nothing else."""
        self._inner.step([multiplier * learning_rate for multiplier in self._multipliers])

    def state(self) -> dict[str, Tensor]:
        """References, not copies: an optimizer into which they are copied goes on to the bit."""
        return dict(self._inner.state)


@dataclass(frozen=True, slots=True)
class _Inner:
    """What differs between optimizers; `step` is given a learning rate for each part."""

    state: Mapping[str, Tensor]
    step: Callable[[Sequence[float]], None]


# The operations under PyTorch's optimizers, whose classes import a compiler that takes as long as the rest of PyTorch.


def _adamw(parts: Sequence[Tensor], gradients: Sequence[Tensor], config: TrainingConfig) -> _Inner:
    """Decoupled weight decay (arXiv 1711.05101). State: moments like the parameters, and steps by rate."""
    first, second = _like(parts), _like(parts)
    steps = torch.zeros(len(parts), device=parts[0].device)

    def step(rates: Sequence[float]) -> None:
        steps.add_(1)
        split = zip(rates, parts, gradients, *(_split(moment, parts) for moment in (first, second)), steps, strict=True)
        for rate, part, gradient, mean, square, count in split:
            torch._fused_adamw_(
                [part], [gradient], [mean], [square], [], [count], lr=rate, beta1=0.9, beta2=0.999, eps=1e-8,
                weight_decay=config.weight_decay, amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
            )  # fmt: skip

    return _Inner({"step": steps, "exp_avg": first, "exp_avg_sq": second}, step)


def _sgd(parts: Sequence[Tensor], gradients: Sequence[Tensor], config: TrainingConfig) -> _Inner:
    """Weight decay is part of the gradient, as in PyTorch. State: where there is momentum, a buffer of it."""
    # From zero the first step is PyTorch's, whose buffer begins as the gradient.
    buffer = _like(parts) if config.momentum else None

    def step(rates: Sequence[float]) -> None:
        buffers = [[]] * len(parts) if buffer is None else [[own] for own in _split(buffer, parts)]
        for rate, part, gradient, own in zip(rates, parts, gradients, buffers, strict=True):
            torch._fused_sgd_(
                [part], [gradient], own, lr=rate, momentum=config.momentum, weight_decay=config.weight_decay,
                dampening=0.0, nesterov=False, maximize=False, is_first_step=False, grad_scale=None, found_inf=None,
            )  # fmt: skip

    return _Inner({} if buffer is None else {"momentum_buffer": buffer}, step)


def _bitsandbytes(parts: Sequence[Tensor], gradients: Sequence[Tensor], config: TrainingConfig) -> _Inner:
    """AdamW with state in 8 bit, in blocks of 256 (arXiv 2110.02861), in pages that move to the host, or both."""
    import bitsandbytes  # takes seconds, and only these optimizers need it

    for part, gradient in zip(parts, gradients, strict=True):
        part.grad = gradient
    kind = getattr(bitsandbytes.optim, _BITSANDBYTES[config.optimizer])
    optimizer = kind([{"params": [part]} for part in parts], lr=0.0, weight_decay=config.weight_decay)
    steps = torch.zeros((), dtype=torch.int64)  # theirs are Python numbers, which no checkpoint can be copied into
    state = {"step": steps}
    for number, part in enumerate(parts):
        optimizer.init_state(optimizer.param_groups[number], part, number, 0)
        kept = ((name, optimizer.state[part].get(name)) for name in ("state1", "state2", "absmax1", "absmax2"))
        state |= {f"{name}.{number}": tensor for name, tensor in kept if tensor is not None}

    def step(rates: Sequence[float]) -> None:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        for own in optimizer.state.values():
            own["step"] = int(steps)
        optimizer.step()
        steps.add_(1)

    return _Inner(state, step)


def _like(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_zeros(sum(len(part) for part in parts))


def _split(state: Tensor, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(state, [len(part) for part in parts])


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
