import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes
import pytest
import torch

from lora_engine import optim
from lora_engine.checkpoint import restore
from lora_engine.config import TrainingConfig
from lora_engine.errors import SpecError
from lora_engine.optim import Optimizer, Rate


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
    parameters, expected = (make_parameters(50) for _ in range(2))
    expected = expected.double()
    m, v = torch.zeros(50).double(), torch.zeros(50).double()
    gradients = torch.zeros(50)
    optimizer = Optimizer(parameters, gradients, TrainingConfig(weight_decay=0.1), [Rate(slice(0, 50))])
    for step in range(1, 6):
        gradients.copy_(make_gradients(50, step))
        optimizer.step(0.01 * step)
        g = gradients.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected -= 0.01 * step * 0.1 * expected
        expected -= 0.01 * step * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameters.double(), expected, rtol=1e-5, atol=1e-6)


SIZE = 12_000  # from 4,096 on bitsandbytes keeps its state in 8 bit
PLACES = [slice(0, 5000), slice(5000, 6000), slice(6000, SIZE)]
RATES = [Rate(PLACES[0]), Rate(PLACES[1], peak=3e-3), Rate(PLACES[2], peak=1e-3, ratio=16.0)]
PEAKS = [2e-3, 3e-3, 16e-3]
CONFIG = TrainingConfig(learning_rate=2e-3, weight_decay=0.1)
KINDS: dict[str, tuple[TrainingConfig, Callable[[list[dict[str, Any]]], Any]]] = {
    "adamw": (CONFIG, lambda groups: torch.optim.AdamW(groups, weight_decay=0.1)),
    "sgd": (
        replace(CONFIG, optimizer="sgd", momentum=0.8),
        lambda groups: torch.optim.SGD(groups, momentum=0.8, weight_decay=0.1),
    ),
    "sgd without momentum": (
        replace(CONFIG, optimizer="sgd", momentum=0.0),
        lambda groups: torch.optim.SGD(groups, weight_decay=0.1),
    ),
    "adamw_8bit": (
        replace(CONFIG, optimizer="adamw_8bit"),
        lambda groups: bitsandbytes.optim.AdamW8bit(groups, weight_decay=0.1),
    ),
}


def make_parameters(size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def make_gradients(size: int, step: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step))


def advance(optimizer: Optimizer, gradients: torch.Tensor, steps: range) -> None:
    for step in steps:
        gradients.copy_(make_gradients(SIZE, step))
        optimizer.step(CONFIG.learning_rate / step)


@pytest.mark.parametrize("kind", KINDS)
def test_each_rate_is_an_optimizer_of_its_own(kind: str) -> None:
    config, make = KINDS[kind]
    parameters, gradients = make_parameters(SIZE), torch.zeros(SIZE)
    optimizer = Optimizer(parameters, gradients, config, RATES)
    parts = [make_parameters(SIZE)[place].clone().requires_grad_() for place in PLACES]
    twin = make([{"params": [part], "lr": 0.0} for part in parts])
    for step in range(1, 5):
        advance(optimizer, gradients, range(step, step + 1))
        for group, part, place, peak in zip(twin.param_groups, parts, PLACES, PEAKS, strict=True):
            group["lr"], part.grad = peak / step, gradients[place].clone()
        twin.step()
    for part, place in zip(parts, PLACES, strict=True):
        torch.testing.assert_close(parameters[place], part.detach(), rtol=1e-6, atol=1e-7)
        assert not torch.equal(parameters[place], make_parameters(SIZE)[place])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("saved_after", [0, 1, 3])
def test_a_restored_optimizer_goes_on_to_the_bit(kind: str, saved_after: int) -> None:
    config, _ = KINDS[kind]
    parameters, gradients = make_parameters(SIZE), torch.zeros(SIZE)
    first = Optimizer(parameters, gradients, config, RATES)
    advance(first, gradients, range(1, saved_after + 1))
    saved = {name: tensor.clone() for name, tensor in first.state().items()}
    twin, twin_gradients = parameters.clone(), torch.zeros(SIZE)
    advance(first, gradients, range(saved_after + 1, 6))

    second = Optimizer(twin, twin_gradients, config, RATES)
    restore(saved, second.state())
    advance(second, twin_gradients, range(saved_after + 1, 6))
    assert torch.equal(twin, parameters)
    for name, tensor in second.state().items():
        assert torch.equal(tensor, first.state()[name]), name


def test_eight_bit_state_is_a_quarter_of_the_size() -> None:
    def state_bytes(kind: str) -> int:
        state = Optimizer(make_parameters(SIZE), torch.zeros(SIZE), KINDS[kind][0], [Rate(slice(0, SIZE))]).state()
        return sum(tensor.nbytes for tensor in state.values())

    assert state_bytes("adamw_8bit") < 0.26 * state_bytes("adamw")
    assert state_bytes("sgd") == 4 * SIZE
    assert state_bytes("sgd without momentum") == 0


@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_are_refused_on_a_cpu(name: Any) -> None:
    config = TrainingConfig(optimizer=name)
    with pytest.raises(SpecError, match=f"needs a CUDA device; on cpu use {name.removeprefix('paged_')}$") as caught:
        Optimizer(torch.zeros(4), torch.zeros(4), config, [Rate(slice(0, 4))])
    assert caught.value.field == "training.optimizer"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pages move between GPU and host")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_optimizers_compute_what_the_others_do(name: Any) -> None:
    size = 200_000  # from 100,000 on bitsandbytes pages
    found = []
    for kind in (name, name.removeprefix("paged_")):
        parameters, gradients = make_parameters(size).cuda(), make_gradients(size, 1).cuda()
        optimizer = Optimizer(parameters, gradients, TrainingConfig(optimizer=kind), [Rate(slice(0, size))])
        state = {key: tensor.cpu() for key, tensor in optimizer.state().items()}
        for rate in (1e-3, 1e-3):
            optimizer.step(rate)
        found.append(parameters.cpu())
        restore(state, optimizer.state())
        assert all(torch.equal(tensor.cpu(), state[key]) for key, tensor in optimizer.state().items())
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-7)


def test_bitsandbytes_is_imported_for_its_own_optimizers_only() -> None:
    code = (
        "import sys, torch\n"
        "from lora_engine.optim import Optimizer, Rate\n"
        "from lora_engine.config import TrainingConfig\n"
        "for name in ('adamw', 'sgd'):\n"
        "    config = TrainingConfig(optimizer=name)\n"
        "    Optimizer(torch.zeros(4), torch.zeros(4), config, [Rate(slice(0, 4))]).step(0.1)\n"
        "print('bitsandbytes' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
