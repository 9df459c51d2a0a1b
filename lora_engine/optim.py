"""AdamW on one flat parameter, learning-rate schedules, gradient clipping."""

import math

import torch
from torch import Tensor

from lora_engine.config import TrainingConfig


class Optimizer:
    """AdamW with decoupled weight decay (arXiv 1711.05101), fp32 state; one fused call for a whole adapter."""

    def __init__(self, parameters: Tensor, gradients: Tensor, weight_decay: float) -> None:
        self._parameters = parameters
        self._parameters.grad = gradients
        self._adamw = torch.optim.AdamW([parameters], lr=0.0, weight_decay=weight_decay, fused=True)
        zeros = torch.zeros_like
        self._state = {"step": torch.zeros((), device=parameters.device), "exp_avg": zeros(parameters),
                       "exp_avg_sq": zeros(parameters)}  # fmt: skip
        self._adamw.state[parameters] = self._state

    def step(self, learning_rate: float) -> None:
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        """References, not copies: step (scalar), exp_avg and exp_avg_sq (parameters)."""
        return dict(self._state)


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
