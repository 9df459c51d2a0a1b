"""What PEFT's `add_weighted_adapter` and hotswap get wrong, one case each, and that a merge here gets it right.

PEFT itself is the judge wherever it loads what was written; where its own result is wrong, that is shown too, so that
these tests say when it has been mended.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter

from lora_engine import adapter
from lora_engine.errors import AdapterError
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from tests.lora_engine import peft_adapters

PLAIN: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def peft_merged(sources: list[Path], weights: list[float], kind: str, **options: Any) -> Any:
    model = PeftModel.from_pretrained(peft_adapters.base_model(), str(sources[0]), adapter_name="0")
    for index, path in enumerate(sources[1:], 1):
        model.load_adapter(str(path), adapter_name=str(index))
    names = [str(index) for index in range(len(sources))]
    model.add_weighted_adapter(names, weights, "merged", combination_type=kind, **options)
    return model


def of_model(model: Any, name: str = "merged") -> dict[str, torch.Tensor]:
    return {
        module: (
            layer.scaling[name] * (layer.lora_B[name].weight.double() @ layer.lora_A[name].weight.double())
        ).detach()
        for module, layer in model.base_model.model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


def expected(sources: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for path, weight in zip(sources, weights, strict=True):
        for module, value in peft_adapters.deltas(path).items():
            total[module] = total.get(module, torch.zeros_like(value)) + weight * value
    return total


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    error = sum(
        float((found.get(module, torch.zeros_like(value)) - value).square().sum()) for module, value in wanted.items()
    )
    return float((error / sum(float(value.square().sum()) for value in wanted.values())) ** 0.5)


def ours(output: Path, sources: list[Path], weights: list[float], **options: Any) -> dict[str, Any]:
    pairs = [WeightedAdapter(path=str(path), weight=weight) for path, weight in zip(sources, weights, strict=True)]
    return merge(MergeSpec(adapters=pairs, output=str(output), **options))


def adapters(folder: Path, *settings: dict[str, Any]) -> list[Path]:
    return [peft_adapters.save_random(folder / str(seed), seed, **item) for seed, item in enumerate(settings)]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_1_cross_terms(count: int, tmp_path: Path) -> None:
    """Factors added up one by one have B_i·A_j in their product. Under its own name, with its error stated."""
    sources, weights = adapters(tmp_path, *[PLAIN] * count), [1.0] * count
    wanted = expected(sources, weights)
    theirs = of_model(peft_merged(sources, weights, "linear"))
    error = distance(theirs, wanted)
    assert error > 0.8 * (count - 1) ** 0.5
    metrics = ours(tmp_path / "peft_linear", sources, weights, method="peft_linear")
    assert distance(peft_adapters.deltas(tmp_path / "peft_linear"), theirs) <= 1e-5
    assert metrics["certificate"]["sum_frobenius"] == pytest.approx(error, abs=1e-5)
    metrics = ours(tmp_path / "linear", sources, weights, method="linear", rank=4 * count)
    assert distance(peft_adapters.deltas(tmp_path / "linear"), wanted) <= 1e-6
    assert metrics["certificate"]["frobenius"] <= 1e-6


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_1_cross_terms_of_the_nonlinear_methods(method: str, tmp_path: Path) -> None:
    """With density 1 and nothing to elect they are sums too; PEFT's are not."""
    sources, weights = adapters(tmp_path, *[PLAIN] * 2), [1.0, 1.0]
    wanted = expected(sources, weights)
    assert distance(of_model(peft_merged(sources, weights, method, density=1.0)), wanted) > 0.5
    options = {"normalize": "none"} if "ties" in method else {}
    metrics = ours(tmp_path / "out", sources, weights, method=method, density=1.0, **options)
    if "ties" not in method:
        assert distance(peft_adapters.deltas(tmp_path / "out"), wanted) <= 1e-6
    assert metrics["certificate"]["sum_frobenius"] == pytest.approx(
        distance(peft_adapters.deltas(tmp_path / "out"), wanted), abs=1e-5
    )


def test_2_rslora(tmp_path: Path) -> None:
    """PEFT's sum comes out √r too large."""
    sources, weights = adapters(tmp_path, {**PLAIN, "use_rslora": True}, {**PLAIN, "use_rslora": True}), [0.5, 2.0]
    wanted = expected(sources, weights)
    assert distance(of_model(peft_merged(sources, weights, "cat")), wanted) > 1
    ours(tmp_path / "out", sources, weights)
    assert distance(peft_adapters.deltas(tmp_path / "out"), wanted) <= 1e-6


def test_3_dora(tmp_path: Path) -> None:
    """PEFT sets the magnitudes back. DoRA is no sum: refused by name, to be converted while ingesting."""
    sources = adapters(tmp_path, {**PLAIN, "use_dora": True}, PLAIN)
    with pytest.raises(AdapterError, match="use_dora"):
        ours(tmp_path / "out", sources, [1.0, 1.0])


def test_4_modules_to_save(tmp_path: Path) -> None:
    """PEFT loses them without a word."""
    sources = adapters(tmp_path, {**PLAIN, "modules_to_save": ["lm_head"]}, PLAIN)
    with pytest.raises(AdapterError, match=r"modules_to_save|lm_head"):
        ours(tmp_path / "out", sources, [1.0, 1.0])


@pytest.mark.parametrize("method", ["stack", "linear"])
def test_5_rank_patterns(method: str, tmp_path: Path) -> None:
    """PEFT saves a linear merge of them whose weights are not there when it is loaded again."""
    patterned = {**PLAIN, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    sources, weights = adapters(tmp_path, patterned, patterned), [0.5, -2.0]
    model = peft_merged(sources, weights, "linear")
    model.save_pretrained(tmp_path / "theirs", selected_adapters=["merged"], save_embedding_layers=False)
    assert distance(peft_adapters.deltas(tmp_path / "theirs/merged"), of_model(model)) > 0.5
    ours(tmp_path / "out", sources, weights, method=method, **({"rank": 8} if method == "linear" else {}))
    assert distance(peft_adapters.deltas(tmp_path / "out"), expected(sources, weights)) <= 1e-6


def test_6_layers_to_transform(tmp_path: Path) -> None:
    """PEFT drops the layers that the first adapter does not have."""
    sources = adapters(
        tmp_path, {**PLAIN, "layers_to_transform": [0]}, {**PLAIN, "layers_to_transform": [1]}
    )  # fmt: skip
    wanted = expected(sources, [1.0, 1.0])
    ours(tmp_path / "out", sources, [1.0, 1.0])
    found = peft_adapters.deltas(tmp_path / "out")
    assert set(found) == set(wanted)
    assert {module.split(".")[2] for module in found} == {"0", "1"}
    assert distance(found, wanted) <= 1e-6


def test_7_a_name_that_is_taken(tmp_path: Path) -> None:
    """With PEFT, merging under a name that exists does nothing, silently."""
    sources = adapters(tmp_path, PLAIN, PLAIN)
    model = peft_merged(sources, [1.0, 1.0], "cat")
    before = of_model(model)
    model.add_weighted_adapter(["0", "1"], [3.0, 3.0], "merged", combination_type="cat")
    assert distance(of_model(model), before) == 0
    ours(tmp_path / "out", sources, [1.0, 1.0])
    ours(tmp_path / "out", sources, [3.0, 3.0])
    assert distance(peft_adapters.deltas(tmp_path / "out"), expected(sources, [3.0, 3.0])) <= 1e-6


def test_8_hotswap(tmp_path: Path) -> None:
    """PEFT takes a wrong scale over where ranks have patterns; what is written here has none."""
    patterned = {**PLAIN, "rank_pattern": {"v_proj": 2}}
    sources = adapters(tmp_path, patterned, {**PLAIN, "use_rslora": True}, PLAIN)
    first, second = [1.0, 0.5], [-2.0, 1.5]
    ours(tmp_path / "first", sources[:2], first, method="linear", rank=4)
    ours(tmp_path / "second", sources[1:], second, method="linear", rank=4)
    model = PeftModel.from_pretrained(peft_adapters.base_model(), str(tmp_path / "first"))
    hotswap_adapter(model, str(tmp_path / "second"), adapter_name="default")
    with torch.no_grad():
        logits = model.eval()(peft_adapters.IDS).logits
    torch.testing.assert_close(logits, peft_adapters.logits(tmp_path / "second"))


def test_9_compression_equals_peft_svd_without_a_dense_delta(tmp_path: Path) -> None:
    """The same singular values. (That nothing dense is formed is shown in test_low_rank, the time in benchmarks.)"""
    sources, weights = adapters(tmp_path, *[PLAIN] * 3), [0.7, -0.4, 1.2]
    theirs = of_model(peft_merged(sources, weights, "svd", svd_rank=5))
    ours(tmp_path / "out", sources, weights, method="linear", rank=5)
    assert distance(peft_adapters.deltas(tmp_path / "out"), theirs) <= 1e-5


@pytest.mark.parametrize("weight", [-1.0, 0.5, 3.0])
def test_weights_are_not_squared_and_keep_their_sign(weight: float, tmp_path: Path) -> None:
    """LoRAX and LoRAHub multiply both factors by the weight, and take the first adapter's alpha for all."""
    sources = adapters(tmp_path, PLAIN, {**PLAIN, "lora_alpha": 3})
    ours(tmp_path / "out", sources[1:], [weight])
    assert distance(peft_adapters.deltas(tmp_path / "out"), expected(sources[1:], [weight])) <= 1e-6
    ours(tmp_path / "both", sources, [1.0, weight])
    assert distance(peft_adapters.deltas(tmp_path / "both"), expected(sources, [1.0, weight])) <= 1e-6


def test_a_source_that_changes_is_another_source(tmp_path: Path) -> None:
    """mergekit takes its cache by the path: stale after a change."""
    sources = adapters(tmp_path, PLAIN)
    before = ours(tmp_path / "out", sources, [1.0])
    peft_adapters.save_random(sources[0], 7, **PLAIN)
    after = ours(tmp_path / "out", sources, [1.0])
    assert before["recipe_digest"] != after["recipe_digest"]
    assert distance(peft_adapters.deltas(tmp_path / "out"), expected(sources, [1.0])) <= 1e-6


def test_an_adapter_on_the_head_stays_on_the_head(tmp_path: Path) -> None:
    """Folded into a tied head, as several do, it would change the embedding too."""
    sources = adapters(tmp_path, {**PLAIN, "target_modules": ["lm_head"]}, PLAIN)
    ours(tmp_path / "out", sources, [1.0, 1.0])
    merged = adapter.read(tmp_path / "out")
    assert "lm_head" in merged.weights
    assert not any("embed" in module for module in merged.weights)
    assert distance(peft_adapters.deltas(tmp_path / "out"), expected(sources, [1.0, 1.0])) <= 1e-6


@pytest.mark.parametrize("options", [{}, {"method": "linear", "energy": 0.95}, {"method": "ties"}, {"dtype": "fp16"}])
def test_stock_peft_computes_what_the_merged_adapter_says(options: dict[str, Any], tmp_path: Path) -> None:
    """Native profiles with ranks of their own, too: equal deltas and equal logits."""
    sources = adapters(tmp_path, {**PLAIN, "use_rslora": True}, {**PLAIN, "target_modules": ["q_proj", "down_proj"]})
    ours(tmp_path / "out", sources, [0.3, -0.6], **options)
    merged = adapter.read(tmp_path / "out")
    said = {module: adapter.delta(merged, module) for module in merged.weights}
    assert distance(peft_adapters.deltas(tmp_path / "out"), said) <= 1e-6
    base = peft_adapters.base_model()
    with torch.no_grad():
        for module, delta in said.items():
            base.get_submodule(module).weight += delta.float()
        torch.testing.assert_close(peft_adapters.logits(tmp_path / "out"), base(peft_adapters.IDS).logits)
