"""Native and portable exports load in stock PEFT and compute the weighted sum."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_engine import adapter
from lora_engine.errors import AdapterError
from lora_engine.merging.config import WeightedAdapter
from tests.lora_engine.exporting.made import LLAMA, dense, make_adapter, relative, run, weighted
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def plain(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


@torch.no_grad()
def stock_logits(base: Path, folder: Path) -> Tensor:
    result: Tensor = PeftModel.from_pretrained(plain(base), str(folder)).eval()(IDS).logits
    return result


@torch.no_grad()
def true_logits(base: Path, adapters: list[WeightedAdapter]) -> Tensor:
    """Of the base model with the dense fp64 sum in its weights, computed in fp64."""
    model = plain(base).double()
    for module, delta in dense(adapters).items():
        weight = model.get_submodule(module).weight
        weight += delta if weight.shape == delta.shape and "c_" not in module else delta.t()
    result: Tensor = model(IDS).logits
    return result


def foreign(base: Path, folder: Path, seed: int, **settings: Any) -> WeightedAdapter:
    """As PEFT itself saves one, random."""
    model = get_peft_model(plain(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder, save_embedding_layers=False)
    return WeightedAdapter(path=str(folder))


def mixed(base: Path, folder: Path) -> list[WeightedAdapter]:
    """Patterns, rsLoRA, targets that overlap in part, weights of both signs, one adapter named twice."""
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"layers.1.mlp.up_proj": 11}}
    first = foreign(base, folder / "a", 1, r=2, lora_alpha=3, target_modules=["q_proj", "up_proj"], **patterns)
    second = foreign(
        base, folder / "b", 2, r=4, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"],
        layers_to_transform=[1],
    )  # fmt: skip
    return [weighted(first, 0.5), weighted(second, -1.5), weighted(first, 0.25)]


@pytest.mark.parametrize("layout", ["peft", "peft-portable"])
def test_stock_peft_computes_the_weighted_sum(base: Path, tmp_path: Path, layout: str) -> None:
    sources = mixed(base, tmp_path)
    metrics = run(base, sources, tmp_path / "out", format=layout)
    want = true_logits(base, sources)
    assert (stock_logits(base, tmp_path / "out") - want).abs().max() < 1e-5
    assert (plain(base)(IDS).logits - want).abs().max() > 0.1
    assert metrics["parity"]["max_gap"] < 1e-5
    assert metrics["rank"] == 9
    # Our own reader computes it too.
    got, truth = dense([WeightedAdapter(path=str(tmp_path / "out"))]), dense(sources)
    for module, delta in got.items():
        if module in truth:
            assert relative(delta, truth[module]) < 1e-6
        else:
            assert not delta.any()


@pytest.mark.parametrize("layout", ["peft", "peft-portable"])
def test_gpt2(tmp_path: Path, layout: str) -> None:
    base = make_tiny_gpt2(tmp_path / "base")
    item = make_adapter(tmp_path / "a", base, 1, rank=3, alpha=5.0)
    run(base, [item], tmp_path / "out", format=layout)
    assert (stock_logits(base, tmp_path / "out") - true_logits(base, [item])).abs().max() < 1e-5


@pytest.mark.parametrize("settings", [
    {"r": 4, "lora_alpha": 6},
    {"r": 4, "lora_alpha": 6, "use_rslora": True},
    {"r": 4, "lora_alpha": 6, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7}},
], ids=["plain", "rslora", "patterns"])  # fmt: skip
def test_a_native_export_of_one_adapter_keeps_every_factor(
    base: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:  # fmt: skip
    item = foreign(base, tmp_path / "a", 3, target_modules=["q_proj", "up_proj"], **settings)
    run(base, [item], tmp_path / "out", format="peft")
    before = load_file(tmp_path / "a" / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    got, want = adapter.read(tmp_path / "out"), adapter.read(tmp_path / "a")
    assert all(adapter.scaling(got, name) == adapter.scaling(want, name) for name in want.weights)
    assert torch.equal(stock_logits(base, tmp_path / "out"), stock_logits(base, tmp_path / "a"))


def test_the_portable_profile(base: Path, tmp_path: Path) -> None:
    item = foreign(base, tmp_path / "a", 3, r=4, lora_alpha=6, use_rslora=True, rank_pattern={"q_proj": 2},
                   target_modules=["q_proj", "up_proj"], layers_to_transform=[1])  # fmt: skip
    run(base, [item], tmp_path / "out", format="peft-portable", dtype="fp16")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4
    assert config["target_modules"] == ["q_proj", "up_proj"]
    assert (config["rank_pattern"], config["alpha_pattern"], config["use_rslora"]) == ({}, {}, False)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # Layer 0 too, where nothing was trained.
    assert {name.split(".")[4] for name in weights} == {"0", "1"}
    assert {tuple(weight.shape)[name.endswith("B.weight")] for name, weight in weights.items()} == {4}
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    assert not any(weight.any() for name, weight in weights.items() if ".layers.0." in name)


def test_what_lies_beside_the_weights(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, quantization="nf4")
    metrics = run(base, [item], tmp_path / "out", format="peft-portable")
    assert metrics["trained_on"] == "nf4"
    lineage = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert lineage["base_digest"] == metrics["base_digest"]
    assert lineage["training"] == {"quantization": "nf4"}
    assert (tmp_path / "out" / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert set(metrics["files"]) == {path.name for path in (tmp_path / "out").iterdir()}
    # An export is a source like any other.
    again = run(base, [WeightedAdapter(path=str(tmp_path / "out"))], tmp_path / "again", format="merged")
    assert again["base"] == "nf4"


def test_fp16_factors_beyond_their_range_are_refused(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, size=1e5)
    with pytest.raises(AdapterError, match="lora_"):
        run(base, [item], tmp_path / "out", format="peft", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_order_changes_no_bit(base: Path, tmp_path: Path) -> None:
    sources = [make_adapter(tmp_path / str(seed), base, seed, rank=seed + 1) for seed in range(3)]
    run(base, sources, tmp_path / "one", format="peft-portable")
    run(base, sources[::-1], tmp_path / "two", format="peft-portable")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_certificate_of_a_worse_precision(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, targets=LLAMA)
    exact = run(base, [item], tmp_path / "fp32", format="peft")["parity"]
    rounded = run(base, [item], tmp_path / "bf16", format="peft", dtype="bf16")["parity"]
    assert exact["max_gap"] < 1e-6 < rounded["max_gap"] < rounded["limit"]
    with pytest.raises(AdapterError, match=r"parity: .* at most 1e-06 is allowed"):
        run(base, [item], tmp_path / "out", format="peft", dtype="bf16", max_gap=1e-6)
    assert not (tmp_path / "out").exists()
