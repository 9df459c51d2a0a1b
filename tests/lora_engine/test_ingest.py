"""Adapters as stock PEFT saves them, taken in, and computed with by stock PEFT again: the logits must not change."""

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
from lora_engine.errors import AdapterError, SpecError
from lora_engine.ingest_config import IngestConfig
from tests.lora_engine.foreign_adapters import (
    IDS,
    WEIGHTS,
    edit_config,
    edit_tensors,
    foreign,
    logits,
    randomize,
    taken,
)
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

PREFIX = "base_model.model."
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), tied=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tied"))


EXACT: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 8, "target_modules": ATTENTION},
    "rsLoRA": {"lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION},
    "patterns and rsLoRA": {
        "lora_alpha": 8, "use_rslora": True, "target_modules": [*ATTENTION, "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6, "^model.layers.0.mlp.up_proj": 3},
        "alpha_pattern": {r".*\.1\..*": 3, "up_proj": 5},
    },
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "one layer of a named list": {"target_modules": ATTENTION, "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclusions": {"target_modules": ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "excluded by expression": {"target_modules": "all-linear", "exclude_modules": r".*\.(mlp|o_proj).*"},
    "a regular expression": {"target_modules": r".*layers\.(0|1)\.(self_attn\.[qv]_proj|mlp\.(?:up|down)_proj)$"},
    "the head": {"target_modules": ["lm_head", "q_proj"]},
    "no start": {"target_modules": ATTENTION, "init_lora_weights": False},
    "gaussian": {"target_modules": ATTENTION, "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_what_is_b_times_a_is_taken_in_exactly(case: str, base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", **EXACT[case])
    output, certificate = taken(base, source, base_digest="d" * 64, base_model_name="org/base")
    expected = logits(base, source)
    assert (expected - logits(base, None)).abs().max() > 0.1
    torch.testing.assert_close(logits(base, output), expected, rtol=1e-5, atol=1e-5)
    assert (certificate["relative_error"], certificate["converted"]) == (0, [])
    assert {item["how"] for item in certificate["modules"].values()} == {"exact"}
    assert certificate["notes"] == [f"its config names {base} as the base model; it was taken in for org/base"]
    assert "Every module computes what it did there" in (output / "README.md").read_text()
    found = adapter.read(output)
    assert (found.base_digest, found.base_model_name) == ("d" * 64, "org/base")
    blind, _ = taken(None, source)  # without the base model, too
    torch.testing.assert_close(logits(base, blind), expected, rtol=1e-5, atol=1e-5)


def test_a_plain_adapter_keeps_its_bits_and_is_named_by_last_names(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", lora_alpha=8, target_modules=r".*\.[qv]_proj")
    output, _ = taken(base, source)
    before, after = load_file(source / WEIGHTS), load_file(output / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((output / "adapter_config.json").read_text())["target_modules"] == ATTENTION


def test_what_it_was_trained_on_is_kept_for_exports(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    for quantization, training in ((None, None), ("nf4", {"quantization": "nf4"})):
        output, _ = taken(base, source, ingest=IngestConfig(quantization=quantization))
        assert json.loads((output / "lineage.json").read_text()).get("training") == training
    with pytest.raises(SpecError, match="quantization"):
        IngestConfig(quantization="int3")


def test_conv1d_layers_are_taken_in(tmp_path: Path) -> None:
    base = make_tiny_gpt2(tmp_path / "base")
    source = foreign(base, tmp_path / "peft", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    output, _ = taken(base, source)
    edit_config(output, fan_in_fan_out=True)  # PEFT wants to be told, and changes nothing by it
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-5, atol=1e-5)


def test_lora_on_a_tied_head_is_the_heads_alone(tied: Path, tmp_path: Path) -> None:
    source = foreign(tied, tmp_path / "peft", target_modules=["lm_head", "q_proj"])
    output, certificate = taken(tied, source)
    assert certificate["modules"]["lm_head"]["tied"]
    assert "the head's alone" in certificate["notes"][0]
    torch.testing.assert_close(logits(tied, output), logits(tied, source), rtol=1e-5, atol=1e-5)


def name_the_adapter(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}


def drop_the_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("change", "note"),
    [(name_the_adapter, "the adapter's name, default"), (drop_the_prefix, "had no base_model.model.")],
)
def test_other_layouts_of_keys_are_read_and_noted(change: Any, note: str, base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    expected = logits(base, source)
    edit_tensors(source, change)
    output, certificate = taken(base, source)
    assert note in certificate["notes"][0]
    torch.testing.assert_close(logits(base, output), expected, rtol=1e-5, atol=1e-5)


def train_magnitudes(model: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("rslora", [False, True])
def test_dora_at_full_rank_is_exact(rslora: bool, base: Path, tmp_path: Path) -> None:
    settings = {"lora_alpha": 3, "use_dora": True, "use_rslora": rslora, "target_modules": [*ATTENTION, "down_proj"]}
    source = foreign(base, tmp_path / "peft", train_magnitudes, **settings)
    output, certificate = taken(base, source, ingest=IngestConfig(rank=64, max_error=1e-5))
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-4, atol=1e-4)
    assert certificate["relative_error"] < 1e-6
    assert len(certificate["converted"]) == 6
    assert certificate["notes"] == ["DoRA was converted against the base model's original weights, not quantised ones"]
    assert "6 modules had no form B·A" in (output / "README.md").read_text()


def test_dora_of_conv1d_layers_is_converted(tmp_path: Path) -> None:
    base = make_tiny_gpt2(tmp_path / "base")
    settings = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True, "use_dora": True}
    source = foreign(base, tmp_path / "peft", train_magnitudes, **settings)
    output, _ = taken(base, source, ingest=IngestConfig(rank=32, max_error=1e-5))
    edit_config(output, fan_in_fan_out=True)
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-4, atol=1e-4)


def test_the_certificate_of_dora_is_its_dense_optimum(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", train_magnitudes, use_dora=True, target_modules=["q_proj"])
    output, certificate = taken(base, source, ingest=IngestConfig(rank=6, max_error=1))
    plain = AutoModelForCausalLM.from_pretrained(base)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(source)).merge_and_unload()
    found = adapter.read(output)
    for name, facts in certificate["modules"].items():
        change = (merged.get_submodule(name).weight - plain.get_submodule(name).weight).detach().double()
        S = torch.linalg.svdvals(change)
        measured = (change - adapter.delta(found, name)).norm() / change.norm()
        assert facts["relative_error"] == pytest.approx(measured.item(), rel=1e-4)
        assert facts["relative_error"] == pytest.approx((S[6:].norm() / S.norm()).item(), rel=1e-4)
    with pytest.raises(AdapterError, match=r"at rank 6 DoRA is off by .* give a larger rank"):
        taken(base, source, ingest=IngestConfig(rank=6, max_error=0.01))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_that_moved_the_base_is_converted_with_its_start(
    start: str, rslora: bool, base: Path, tmp_path: Path
) -> None:
    config = LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=ATTENTION, init_lora_weights=start, use_rslora=rslora
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    randomize(model)
    with torch.no_grad():
        trained = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    output, certificate = taken(base, tmp_path / "peft", initial=str(tmp_path / "initial"))
    torch.testing.assert_close(logits(base, output), trained, rtol=1e-4, atol=1e-4)
    assert {item["rank"] for item in certificate["modules"].values()} == {8}
    with pytest.raises(AdapterError, match="as it was before training"):
        taken(base, tmp_path / "peft")
    other = foreign(base, tmp_path / "other", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match="not of the same modules"):
        taken(base, tmp_path / "peft", initial=str(other))
    with pytest.raises(AdapterError, match="leave it out"):
        taken(base, other, initial=str(other))


def test_whole_modules_that_equal_the_base_are_left_out(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION, modules_to_save=["lm_head", "embed_tokens"])
    output, certificate = taken(base, source)
    assert sorted(certificate["notes"]) == [
        "lm_head.weight equals the base model's and was left out",
        "model.embed_tokens.weight equals the base model's and was left out",
    ]
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-5, atol=1e-5)


def train_head(model: Any) -> None:
    weight = model.base_model.model.lm_head.modules_to_save["default"].weight
    weight += torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1


def test_a_linear_layer_trained_whole_becomes_its_best_low_rank_form(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", train_head, target_modules=ATTENTION, modules_to_save=["lm_head"])
    output, certificate = taken(base, source, ingest=IngestConfig(rank=32, max_error=1e-5))
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-4, atol=1e-4)
    assert certificate["converted"] == ["lm_head"]
    with pytest.raises(AdapterError, match=r"lm_head\.weight: trained whole \(modules_to_save\); give a rank"):
        taken(base, source)
    with pytest.raises(AdapterError, match="without the base model"):
        taken(None, source)


def test_a_head_with_lora_whose_base_weight_is_saved_too(base: Path, tmp_path: Path) -> None:
    """PEFT saves it by itself where the head is a target; it must be the base model's."""
    source = foreign(base, tmp_path / "peft", target_modules=["lm_head"])
    head = AutoModelForCausalLM.from_pretrained(base).lm_head.weight.detach()
    saved = f"{PREFIX}lm_head.base_layer.weight"
    edit_tensors(source, lambda tensors: tensors | {saved: head.clone()})
    output, certificate = taken(base, source)
    assert certificate["notes"] == ["lm_head.weight equals the base model's and was left out"]
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-5, atol=1e-5)
    edit_tensors(source, lambda tensors: tensors | {saved: head + 0.1})
    with pytest.raises(AdapterError, match=r"lm_head\.weight: the file changes it whole, and puts LoRA on it"):
        taken(base, source, ingest=IngestConfig(rank=32))
