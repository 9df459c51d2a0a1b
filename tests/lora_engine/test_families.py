"""Every family of models trains as PEFT trains it on transformers' own forward and plain AdamW."""

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_engine import base_model, kernels
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.passes import PackedPass
from lora_engine.train import Training
from tests.lora_engine.peft_step import peft_step
from tests.zoo import FAMILIES

GENERIC = ("gpt2", "mixtral", "qwen3_moe")
CONFIGS = {
    "gpt2": LoraConfig(rank=4, target_modules=["c_attn", "mlp.c_proj"]),
    # PEFT gives the names of dense MLPs in this family a meaning of its own.
    "qwen3_moe": LoraConfig(rank=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": f"Question {index}?"},
                      {"role": "assistant", "content": f"Answer {index}." + " One more." * (index % 7)}]}
        for index in range(12)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in FAMILIES for way in ("kernels", "products")[: 1 if family in GENERIC else 2]],
)
def test_three_steps_are_those_of_peft(
    family: str, way: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "products":
        monkeypatch.setattr(kernels, "library", lambda: None)
    folder = FAMILIES[family](tmp_path / "base")
    base = base_model.load(folder)
    config = CONFIGS.get(family, LoraConfig(rank=4))
    spec = TrainSpec(
        base_model=str(folder),
        dataset=str(dataset),
        output=str(tmp_path / "out"),
        lora=config,
        training=TrainingConfig(
            global_batch=4, learning_rate=1e-3, validation_fraction=0, weight_decay=0.1, max_grad_norm=0.5, epochs=2
        ),
        threads=1,
    )
    with Training(spec, base) as training:
        assert isinstance(training._run, PackedPass) == (family not in GENERIC)
        names = list(training._adapted.layers)
        twin = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder).eval(),
            peft.LoraConfig(r=4, lora_alpha=8, target_modules=names),
        ).eval()
        layers = {name: twin.base_model.model.get_submodule(name) for name in names}
        for name, weights in training._adapted.weights().items():
            layers[name].lora_A.default.weight.data.copy_(weights.A)
        parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
        for number, step in zip(range(3), training.steps(), strict=False):
            loss, norm = peft_step(twin, parameters, optimizer, training._documents_of(number), step.learning_rate, 0.5)
            assert step.loss == pytest.approx(loss, rel=1e-5)
            assert step.grad_norm == pytest.approx(norm, rel=1e-4)
        for name, weights in training._adapted.weights().items():
            # AdamW divides by the gradient's own size: where that is next to nothing, rounding shows.
            torch.testing.assert_close(weights.A, layers[name].lora_A.default.weight.detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(weights.B, layers[name].lora_B.default.weight.detach(), rtol=1e-4, atol=1e-4)
            assert weights.B.abs().max() > 0
