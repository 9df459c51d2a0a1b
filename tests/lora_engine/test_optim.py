import math
from typing import Any

import pytest
import torch

from lora_engine import optim
from lora_engine.config import TrainingConfig


def rates(total: int, **values: Any) -> list[float]:
    config = TrainingConfig(learning_rate=1.0, **values)
    return [optim.learning_rate(config, step, total) for step in range(total)]


def test_warm_up_rises_to_the_peak_and_cosine_falls_half_a_cycle() -> None:
    found = rates(100, warmup_ratio=0.1)
    assert found[:11] == pytest.approx([(step + 1) / 11 for step in range(11)])
    assert found[10:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 90) for step in range(90)])


def test_linear_and_constant() -> None:
    assert rates(4, warmup_ratio=0, schedule="linear") == [1.0, 0.75, 0.5, 0.25]
    assert rates(4, warmup_ratio=0.25, schedule="constant") == [0.5, 1.0, 1.0, 1.0]
    assert rates(2, warmup_ratio=1.0) == pytest.approx([1 / 3, 2 / 3])


def test_clipping_scales_to_the_norm_and_tells_what_it_was() -> None:
    gradients = torch.tensor([3.0, 4.0])
    assert optim.clip(gradients, 10) == 5
    assert gradients.tolist() == [3, 4]
    assert optim.clip(gradients, 1) == 5
    assert gradients.tolist() == pytest.approx([0.6, 0.8])


def test_adamw_is_the_papers_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(50, generator=generator)
    expected = parameters.double()
    m, v = torch.zeros(50).double(), torch.zeros(50).double()
    gradients = torch.zeros(50)
    optimizer = optim.Optimizer(parameters, gradients, weight_decay=0.1)
    for step in range(1, 6):
        gradients.copy_(torch.randn(50, generator=generator))
        optimizer.step(0.01 * step)
        g = gradients.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected -= 0.01 * step * 0.1 * expected
        expected -= 0.01 * step * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameters.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_restored_optimizer_goes_on_to_the_bit() -> None:
    def go_on(optimizer: optim.Optimizer, gradients: torch.Tensor) -> None:
        for value in (0.3, -0.2):
            gradients.fill_(value)
            optimizer.step(0.01)

    parameters, gradients = torch.ones(3), torch.full((3,), 0.5)
    first = optim.Optimizer(parameters, gradients, 0.1)
    first.step(0.01)
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    twin, twin_gradients = parameters.clone(), torch.zeros(3)
    go_on(first, gradients)
    second = optim.Optimizer(twin, twin_gradients, 0.1)
    for name, tensor in second.state().items():
        tensor.copy_(saved[name])
    go_on(second, twin_gradients)
    assert torch.equal(twin, parameters)
