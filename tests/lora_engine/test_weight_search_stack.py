"""Losses and gradients of weights on a stack, against finite differences in float64."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import adapter_header, base_model, data, passes
from lora_engine.base_model import BaseModel
from lora_engine.errors import SpecError
from lora_engine.target_modules import Module, matches
from lora_engine.weight_search_stack import WeightedStack, group, pattern
from tests.lora_engine.weighted_stacks import dense_loss, random_adapter
from tests.tiny_model import make_tiny_gpt2


@pytest.fixture
def folders(base: BaseModel, tmp_path: Path) -> list[Path]:
    """Of other ranks, scalings and targets."""
    return [
        random_adapter(tmp_path / "one", base, 1, rank=3, alpha=5, use_rslora=True),
        random_adapter(tmp_path / "two", base, 2, rank=2, alpha=4, last=("q_proj", "down_proj")),
    ]


@pytest.mark.parametrize("kind", [passes.PackedPass, passes.PaddedPass])
@pytest.mark.parametrize("per", ["adapter", "layer"])
def test_the_gradient_is_that_of_finite_differences(
    base: BaseModel, dataset: Path, folders: list[Path], per: Any, kind: Any
) -> None:
    assert_gradient(base, dataset, folders, per, kind)


def test_the_gradient_on_a_model_without_a_path_of_ours(dataset: Path, tmp_path: Path) -> None:
    base = base_model.load(make_tiny_gpt2(tmp_path / "base"))
    folders = [
        random_adapter(tmp_path / "one", base, 1, rank=2, alpha=3),
        random_adapter(tmp_path / "two", base, 2, rank=1, alpha=4, last=("c_attn",)),
    ]
    assert_gradient(base, dataset, folders, "layer", passes.choose)


def assert_gradient(base: BaseModel, dataset: Path, folders: list[Path], per: Any, kind: Any) -> None:
    documents = list(data.read(dataset, base.tokenizer, 128).documents[:4])
    with WeightedStack(base, [adapter_header.inspect(folder) for folder in folders], per) as stack:
        weights = torch.linspace(-0.7, 0.4, stack.shape[0] * stack.shape[1], dtype=torch.float64).view(stack.shape)
        weights[0, -1] = 0  # a weight of 0 has a gradient too
        stack.set(weights)
        run = kind(stack.adapted)
        targets = sum(document.trained_tokens for document in documents)
        loss = sum(run.gradients(batch, targets, None) for batch in run.batches(documents, 100))
        gradient = stack.gradient().flatten()
        groups = stack.groups
    assert loss == pytest.approx(dense_loss(base, folders, weights, groups, documents), rel=1e-6)
    # Five points: transformers' norms and softmax are fp32 in a float64 model too, so that the step must not be small.
    step = 0.01
    for place in range(weights.numel()):
        shift = torch.zeros(weights.numel(), dtype=torch.float64)
        shift[place] = step
        values = {
            times: dense_loss(base, folders, weights + times * shift.view(weights.shape), groups, documents)
            for times in (-2, -1, 1, 2)
        }
        slope = (values[-2] - 8 * values[-1] + 8 * values[1] - values[2]) / (12 * step)
        assert gradient[place] == pytest.approx(slope, rel=1e-4, abs=2e-5)


def test_the_base_model_is_given_back_as_it_was(base: BaseModel, folders: list[Path]) -> None:
    before = dict(base.model.named_modules())
    with WeightedStack(base, [adapter_header.inspect(folder) for folder in folders], "adapter"):
        assert dict(base.model.named_modules()) != before
    assert dict(base.model.named_modules()) == before


def test_ranks_beyond_a_stack_are_refused(base: BaseModel, tmp_path: Path) -> None:
    wide = [random_adapter(tmp_path / str(seed), base, seed, rank=600, alpha=1, last=("q_proj",)) for seed in (1, 2)]
    with pytest.raises(SpecError, match=r"add up to 1200 on model\.layers\.0\.self_attn\.q_proj"):
        WeightedStack(base, [adapter_header.inspect(folder) for folder in wide], "adapter")


@pytest.mark.parametrize(
    ("module", "layer"),
    [
        ("model.layers.1.mlp.experts.12.up_proj", "model.layers.1"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11"),
        ("lm_head", "lm_head"),
        ("model.proj2.dense", "model.proj2.dense"),
    ],
)
def test_layers_are_told_from_names(module: str, layer: str) -> None:
    assert group(module, "layer") == layer
    assert group(module, "adapter") == ""
    assert matches(pattern(layer), Module(module, 1, 1, False))
    assert not matches(pattern("model.layers.1"), Module("model.layers.11.mlp.up_proj", 1, 1, False))
