"""The skeleton is the outline of transformers' model, becomes that model when called, and is no more than it can be."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_engine import base_model, lora, skeleton
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig
from lora_engine.errors import BaseModelError
from lora_engine.skeleton import Skeleton
from tests.tiny_model import make_tiny_model
from tests.zoo import FAMILIES

HERE = ["llama", "llama3", "mistral", "qwen2", "qwen3", "smollm2"]
IDS = torch.arange(3, 43).view(2, 20)
TRAIN = """
import sys
from pathlib import Path
from lora_engine import base_model
from lora_engine.config import TrainSpec, from_mapping
from lora_engine.train import Training
names = ("base_model", "dataset", "output", "device")
spec = from_mapping(TrainSpec, dict(zip(names, [*sys.argv[1:], "cpu"])))
with Training(spec, base_model.load(Path(spec.base_model), device="cpu")) as training:
    next(training.steps())
print(sorted({"transformers", "torch._dynamo"} & set(sys.modules)))
"""


def values(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_outline_of_transformers_model(family: str, tmp_path: Path) -> None:
    base = base_model.load(FAMILIES[family](tmp_path))
    assert isinstance(base.model, Skeleton) == (family in HERE)
    if family not in HERE:
        return
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    ours, theirs = base.model.state_dict(), reference.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    positions = torch.arange(200)[None]
    for own, expected in zip(
        base.model.model.rotary_emb(ours["lm_head.weight"], positions),
        reference.model.rotary_emb(ours["lm_head.weight"], positions),
        strict=True,
    ):
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-6)
    assert base_model.linear_modules(base.model) == base_model.linear_modules(reference)
    assert base_model.context_length(base.model) == 256


def test_a_called_skeleton_has_the_layers_that_were_put_into_it(tmp_path: Path) -> None:
    base = base_model.load(make_tiny_model(tmp_path))
    plain = base_model.load(tmp_path).model(IDS).logits
    adapted = lora.attach(base, LoraConfig(rank=4), seed=1)
    adapted.parameters.normal_(generator=torch.Generator().manual_seed(0))
    adapted.refresh()
    changed = base.model(IDS).logits
    assert not torch.allclose(changed, plain, atol=1e-2)
    adapted.detach()
    assert torch.equal(base.model(IDS).logits, plain)
    again = lora.attach(base, LoraConfig(rank=4), seed=1)  # now that the modules are transformers'
    again.parameters.copy_(adapted.parameters)
    again.refresh()
    assert torch.equal(base.model(IDS).logits, changed)


CHANGES: list[dict[str, Any]] = [
    {"model_type": "gemma"},
    {"hidden_act": None},
    {"rms_norm_eps": None},
    {"head_dim": 0},
    {"hidden_size": True},
    {"num_key_value_heads": 3},
    {"tie_word_embeddings": None},
    {"mlp_bias": "no"},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"use_sliding_window": True},
    {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": None},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_a_config_leaves_open_is_left_to_transformers(change: dict[str, Any], tmp_path: Path) -> None:
    plain = values(make_tiny_model(tmp_path))
    assert skeleton.config_of(plain) is not None
    assert skeleton.config_of({**plain, **change}) is None


def test_the_older_form_of_rotary_settings_says_the_same(tmp_path: Path) -> None:
    new = values(FAMILIES["llama3"](tmp_path))
    rope = new.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    older = {**new, "rope_theta": theta, "rope_scaling": rope}
    found, expected = (
        skeleton.config_of(older),
        skeleton.config_of({**new, "rope_parameters": {**rope, "rope_theta": theta}}),
    )
    assert found == expected is not None


def test_tensors_beside_those_of_the_architecture_are_transformers_to_judge(tmp_path: Path) -> None:
    base: BaseModel = base_model.load(make_tiny_model(tmp_path, tied=False))
    stored = [*base.model.state_dict(), "model.layers.0.self_attn.rotary_emb.inv_freq"]
    made = skeleton.build(values(tmp_path), stored, tmp_path, torch.float32, torch.device("cpu"))
    assert made is not None
    for names in (stored[1:], [*stored, "model.layers.0.extra"]):
        assert skeleton.build(values(tmp_path), names, tmp_path, torch.float32, torch.device("cpu")) is None
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match="cannot be read"):
        base_model.load(tmp_path)


def test_training_imports_neither_transformers_nor_a_compiler(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one two", "completion": "three"}\n' * 20)
    command = [sys.executable, "-c", TRAIN, str(folder), str(rows), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "[]"
