import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_engine import adapter, base_model
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec, from_mapping
from lora_engine.errors import AdapterError
from lora_engine.train import Training
from tests.lora_engine import peft_adapters
from tests.tiny_model import make_tiny_model

ATTENTION = ["q_proj", "v_proj"]


def sample(rank: int = 4, **settings: Any) -> Adapter:
    generator = torch.Generator().manual_seed(rank)
    shapes = {
        f"model.layers.{i}.self_attn.{name}": out for i in range(2) for name, out in (("q_proj", 32), ("v_proj", 16))
    }
    weights = {
        name: LoraWeights(torch.randn(rank, 32, generator=generator), torch.randn(out, rank, generator=generator))
        for name, out in shapes.items()
    }
    return Adapter(**{"weights": weights, "rank": rank, "alpha": 8.0, "base_model_name": "tests/tiny", **settings})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "up_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {r".*\.1\..*": 3, "up_proj": 5},
    },
    "rslora and patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ATTENTION, "rank_pattern": {"q_proj": 2},
    },
    "regular expression": {"r": 4, "lora_alpha": 8, "target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "some layers": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "layers_to_transform": [1]},
    "all linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
}  # fmt: skip


@pytest.mark.parametrize("name", PEFT_SETTINGS)
def test_an_adapter_of_peft_is_read_and_rewritten_with_its_exact_deltas(name: str, tmp_path: Path) -> None:
    source = peft_adapters.save_random(tmp_path / "peft", 1, **PEFT_SETTINGS[name])
    expected = peft_adapters.deltas(source)
    found = adapter.read(source)
    assert sorted(found.weights) == sorted(expected)
    for module in expected:
        torch.testing.assert_close(adapter.delta(found, module), expected[module], rtol=1e-12, atol=1e-15)

    adapter.write(found, tmp_path / "ours", lineage={})
    torch.testing.assert_close(
        peft_adapters.logits(tmp_path / "ours"), peft_adapters.logits(source), rtol=1e-5, atol=1e-5
    )
    for module, value in peft_adapters.deltas(tmp_path / "ours").items():
        torch.testing.assert_close(value, expected[module], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha": 2.5}], ids=str)
def test_what_is_written_is_the_portable_profile(settings: dict[str, Any], tmp_path: Path) -> None:
    adapter.write(sample(**settings), tmp_path / "out", lineage={"job": "job-1"})
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert isinstance(config["lora_alpha"], int)
    assert (config["r"], config["use_rslora"], config["rank_pattern"], config["bias"]) == (4, False, {}, "none")
    assert sorted(contents(tmp_path / "out")) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "lineage.json",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/lineage.json").read_text())["job"] == "job-1"
    header = (tmp_path / "out/adapter_model.safetensors").read_bytes()
    assert b'"__metadata__":{"format":"pt"}' in header[:200]


def test_a_plain_adapter_keeps_its_alpha_and_its_bits(tmp_path: Path) -> None:
    source = sample(base_digest="d" * 64, target_modules=("q_proj", "v_proj"))
    adapter.write(source, tmp_path / "out", lineage={})
    found = adapter.read(tmp_path / "out")
    assert (found.alpha, found.base_digest, found.target_modules) == (8.0, "d" * 64, ("q_proj", "v_proj"))
    for module, weights in source.weights.items():
        assert torch.equal(found.weights[module].A, weights.A)
        assert torch.equal(found.weights[module].B, weights.B)


def test_the_same_adapter_gives_the_same_bytes_and_replaces_a_folder(tmp_path: Path) -> None:
    adapter.write(sample(rank=2), tmp_path / "a", lineage={"b": 1, "a": 2})
    adapter.write(sample(), tmp_path / "a", lineage={"b": 1, "a": 2})
    reverse = sample()
    reverse.weights = dict(reversed(reverse.weights.items()))
    adapter.write(reverse, tmp_path / "b", lineage={"a": 2, "b": 1})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert adapter.digest(tmp_path / "a") == adapter.digest(tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_neither_written_nor_read(value: float, tmp_path: Path) -> None:
    broken = sample()
    broken.weights["model.layers.0.self_attn.q_proj"].B[3, 1] = value
    with pytest.raises(AdapterError, match="not finite"):
        adapter.write(broken, tmp_path / "out", lineage={})
    assert not list(tmp_path.iterdir())

    adapter.write(sample(), tmp_path / "out", lineage={})
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 1] = value
    save_file(tensors, tmp_path / "out/adapter_model.safetensors")
    with pytest.raises(AdapterError, match="not finite"):
        adapter.read(tmp_path / "out")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    adapter.write(sample(), tmp_path / "out", lineage={})
    before = contents(tmp_path / "out")
    with pytest.raises(TypeError):
        adapter.write(sample(rank=2), tmp_path / "out", lineage={"not": {"JSON": object()}})
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "DoRA": ({"use_dora": True}, "use_dora is set"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
    "biases": ({"bias": "all"}, "bias is 'all'"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changed the base model"),
    "a setting of the future": ({"use_quantum": {"gates": 3}}, "use_quantum is set"),
    "rank": ({"r": 8}, "config's rank 8"),
    "rank of no number": ({"r": True}, "r is True"),
    "alpha": ({"lora_alpha": None}, "lora_alpha is None"),
    "pattern": ({"rank_pattern": {"(": 2}}, "not a regular expression"),
    "target": ({"target_modules": ["q_proj"]}, "v_proj, which target_modules does not name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_whose_effect_cannot_be_kept_are_refused(case: str, tmp_path: Path) -> None:
    changes, reason = REFUSED[case]
    adapter.write(sample(target_modules=ATTENTION), tmp_path, lineage={})
    edit(tmp_path, **changes)
    with pytest.raises(AdapterError, match=re.escape(reason)):
        adapter.read(tmp_path)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("base_model.model.lm_head.lora_magnitude_vector", "not a LoRA weight"),
        ("model.layers.0.self_attn.k_proj.lora_A.weight", "not a LoRA weight"),
        ("base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight", "lora_B is missing"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(key: str, reason: str, tmp_path: Path) -> None:
    adapter.write(sample(), tmp_path, lineage={})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file(tensors | {key: torch.ones(4, 32)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=reason):
        adapter.read(tmp_path)


def test_missing_and_torn_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing"):
        adapter.read(tmp_path)
    adapter.write(sample(), tmp_path / "a", lineage={})
    weights = tmp_path / "a/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors"):
        adapter.read(tmp_path / "a")
    weights.rename(tmp_path / "a/adapter_model.bin")
    with pytest.raises(AdapterError, match="other weight formats"):
        adapter.read(tmp_path / "a")


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(rank=4),
        LoraConfig(rank=3, alpha=5, use_rslora=True),
        LoraConfig(
            rank=4,
            target_modules=["query", "mlp", "layers.1.*.o_proj"],
            use_rslora=True,
            rank_pattern={"mlp": 2, "layers.0.*": 8},
            alpha_pattern={"o_proj": 3},
            learning_rate_pattern={"down_proj": 1e-3},
            lora_plus_ratio=2,
        ),
    ],
    ids=["one rank", "rsLoRA", "patterns"],
)
def test_stock_peft_computes_what_the_engine_trained(lora: LoraConfig, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base")
    rows = [{"prompt": f"What is {number}? ", "completion": f"It is {number * 7}."} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = TrainSpec(
        base_model=str(folder),
        dataset=str(tmp_path / "rows.jsonl"),
        output=str(tmp_path),
        lora=lora,
        training=TrainingConfig(epochs=3, global_batch=2, learning_rate=0.02, validation_fraction=0),
    )
    base = base_model.load(folder)
    ids = torch.arange(5, 45)[None]
    with Training(spec, base) as training:
        list(training.steps())
        with torch.no_grad():
            trained = base.model(ids).logits
        training.finish()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        plain = model(ids).logits
        peft = PeftModel.from_pretrained(model, str(tmp_path / "adapter"))(ids).logits
    torch.testing.assert_close(peft, trained, rtol=1e-4, atol=1e-4)
    assert (trained - plain).abs().max() > 0.1
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["r"] == max(lora.rank, *lora.rank_pattern.values(), 0)
    # Whoever trains again from the lineage gets the same ranks: the order of a pattern's entries counts.
    lineage = json.loads((tmp_path / "adapter/lineage.json").read_text())["lora"]
    assert list(lineage["rank_pattern"]) == list(lora.rank_pattern)
    assert from_mapping(LoraConfig, lineage) == lora
