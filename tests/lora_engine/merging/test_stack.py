import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine import adapter
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.adapter_header import WEIGHTS as FILE
from lora_engine.config import MAX_STACK_RANK
from lora_engine.errors import AdapterError, SpecError
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from tests.lora_engine import peft_adapters

# Ranks, alphas, rsLoRA, patterns and target modules all differ.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ["v_proj", "down_proj"]},
    {
        "r": 3, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {r"layers\.0\.self_attn\.q_proj": 5}, "alpha_pattern": {"o_proj": 7},
    },
    {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]},
)  # fmt: skip
WEIGHTS = (0.7, -1.3, 2.0, 0.25)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [peft_adapters.save_random(folder / str(seed), seed, **item) for seed, item in enumerate(SETTINGS)]


def spec(output: Path, *pairs: tuple[Path, float]) -> MergeSpec:
    return MergeSpec(
        adapters=[WeightedAdapter(path=str(path), weight=weight) for path, weight in pairs], output=str(output)
    )


def reference(*pairs: tuple[Path, float]) -> dict[str, torch.Tensor]:
    """The sum of stock PEFT's deltas, in fp64."""
    total: dict[str, torch.Tensor] = {}
    for path, weight in pairs:
        for module, value in peft_adapters.deltas(path).items():
            total[module] = total.get(module, torch.zeros_like(value)) + weight * value
    return total


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_is_sum(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Both our own reading of the folder and stock PEFT's give the sum, to 1e-6 of each module's norm."""
    ours = adapter.read(folder)
    peft = peft_adapters.deltas(folder)
    assert sorted(peft) == sorted(ours.weights) == sorted(expected)
    for module, value in expected.items():
        assert (adapter.delta(ours, module) - value).norm() <= 1e-6 * value.norm()
        assert (peft[module] - value).norm() <= 1e-6 * value.norm()


def test_a_stack_of_unlike_adapters_is_their_weighted_sum(sources: list[Path], tmp_path: Path) -> None:
    pairs = list(zip(sources, WEIGHTS, strict=True))
    metrics = merge(spec(tmp_path / "out", *pairs))
    assert_is_sum(tmp_path / "out", reference(*pairs))
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert metrics["rank"] == config["r"] == config["lora_alpha"] == 4 + 6  # v_proj has the most
    assert sorted(metrics["ranks_before"]) == [2, 4, 5, 6]
    assert metrics["modules"] == 2 + 2 + 2 + 2
    assert config["target_modules"] == ["down_proj", "o_proj", "q_proj", "v_proj"]


def test_stock_peft_adds_the_stack_to_the_base_model(sources: list[Path], tmp_path: Path) -> None:
    pairs = list(zip(sources, WEIGHTS, strict=True))
    merge(spec(tmp_path / "out", *pairs))
    base = peft_adapters.base_model()
    for module, value in reference(*pairs).items():
        base.get_submodule(module).weight.data += value.float()
    torch.testing.assert_close(
        peft_adapters.logits(tmp_path / "out"), base(peft_adapters.IDS).logits, rtol=1e-4, atol=1e-5
    )


def test_the_same_adapter_twice_counts_once_with_both_weights(sources: list[Path], tmp_path: Path) -> None:
    metrics = merge(spec(tmp_path / "out", (sources[0], 0.5), (sources[1], 1.0), (sources[0], -2.0)))
    assert_is_sum(tmp_path / "out", reference((sources[0], -1.5), (sources[1], 1.0)))
    assert metrics["rank"] == 4 + 6
    assert len(metrics["parents"]) == 2


def test_an_adapter_of_weight_zero_adds_no_columns_and_no_modules(sources: list[Path], tmp_path: Path) -> None:
    metrics = merge(spec(tmp_path / "out", (sources[0], 1.0), (sources[1], 0.0)))
    assert_is_sum(tmp_path / "out", reference((sources[0], 1.0)))
    assert metrics["rank"] == 4
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert sorted(parent["weight"] for parent in lineage["parents"]) == [0.0, 1.0]
    assert lineage["method"] == "stack"
    assert {parent["digest"] for parent in lineage["parents"]} == {adapter.digest(path) for path in sources[:2]}


def test_a_stack_can_be_stacked_again(sources: list[Path], tmp_path: Path) -> None:
    merge(spec(tmp_path / "one", (sources[0], 0.5), (sources[2], 1.0)))
    merge(spec(tmp_path / "two", (tmp_path / "one", -2.0), (sources[1], 3.0)))
    assert_is_sum(tmp_path / "two", reference((sources[0], -1.0), (sources[2], -2.0), (sources[1], 3.0)))


def test_the_bytes_depend_on_sources_and_weights_and_not_on_their_order(sources: list[Path], tmp_path: Path) -> None:
    pairs = list(zip(sources, WEIGHTS, strict=True))
    merge(spec(tmp_path / "a", *pairs))
    merge(spec(tmp_path / "b", *reversed(pairs)))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_weights_that_cancel_out_are_refused(sources: list[Path], tmp_path: Path) -> None:
    for pairs in ([(sources[0], 0.0), (sources[1], 0.0)], [(sources[0], 0.5), (sources[0], -0.5)]):
        with pytest.raises(SpecError, match="every weight is 0") as caught:
            merge(spec(tmp_path / "out", *pairs))
        assert caught.value.field == "adapters"


def written(folder: Path, **settings: Any) -> Path:
    """An adapter of ours on one module of in 8 and out 6."""
    weights = {"model.x_proj": LoraWeights(torch.ones(2, 8), torch.ones(6, 2))}
    adapter.write(Adapter(**{"weights": weights, "rank": 2, "alpha": 2.0, **settings}), folder, lineage={})
    return folder


WIDER = {"model.x_proj": LoraWeights(torch.ones(2, 9), torch.ones(6, 2))}


@pytest.mark.parametrize(
    ("first", "second", "fits"),
    [
        ({"base_digest": "a"}, {"base_digest": "b"}, False),
        ({"base_model_name": "m", "base_digest": "a"}, {"base_model_name": "n", "base_digest": "a"}, True),
        ({"base_model_name": "m", "base_digest": "a"}, {"base_model_name": "n"}, False),
        ({"base_model_name": "m"}, {"base_model_name": "n"}, False),
        ({"base_model_name": "m"}, {"base_digest": "a"}, True),
        ({}, {"weights": WIDER}, False),
    ],
)
def test_adapters_of_different_base_models_are_refused(
    first: dict[str, Any], second: dict[str, Any], fits: bool, tmp_path: Path
) -> None:
    pairs = [(written(tmp_path / "1", **first), 1.0), (written(tmp_path / "2", **second, alpha=3.0), 1.0)]
    if fits:
        assert merge(spec(tmp_path / "out", *pairs))["rank"] == 4
    else:
        with pytest.raises(AdapterError):
            merge(spec(tmp_path / "out", *pairs))
        assert not (tmp_path / "out").exists()


def test_every_refusal_comes_before_a_tensor_is_read(tmp_path: Path) -> None:
    first, second = written(tmp_path / "1"), written(tmp_path / "2", weights=WIDER)
    tensors = {name: torch.full_like(value, torch.nan) for name, value in load_file(first / FILE).items()}
    save_file(tensors, first / FILE)
    with pytest.raises(AdapterError, match=r"2: model\.x_proj is 6 × 9, but 6 × 8 in 1"):
        merge(spec(tmp_path / "out", (first, 1.0), (second, 1.0)))


def test_ranks_that_add_up_to_too_much_are_refused(tmp_path: Path) -> None:
    rank = MAX_STACK_RANK // 2 + 1
    pairs = []
    for index in range(2):
        weights = {"model.x": LoraWeights(torch.full((rank, 2), float(index)), torch.ones(2, rank))}
        adapter.write(Adapter(weights, rank, 1.0, base_model_name="base"), tmp_path / str(index), lineage={})
        pairs.append((tmp_path / str(index), 1.0))
    with pytest.raises(SpecError, match="the ranks add up to 4098"):
        merge(spec(tmp_path / "out", *pairs))
