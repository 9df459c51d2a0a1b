"""An adapter for mlx-lm, read as mlx-lm's own `LoRALinear` computes: y + scale · (x @ lora_a) @ lora_b."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from lora_engine.errors import AdapterError
from tests.lora_engine.exporting.made import dense, make_adapter, relative, run, weighted
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny", tied=False)


def test_it_computes_the_weighted_sum(base: Path, tmp_path: Path) -> None:
    sources = [
        weighted(make_adapter(tmp_path / "a", base, 1, rank=3, alpha=5.0, targets=["q_proj", "up_proj"]), -0.5),
        make_adapter(tmp_path / "b", base, 2, rank=2, use_rslora=True, targets=["q_proj"]),
    ]
    metrics = run(base, sources, tmp_path / "out", format="mlx")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 2
    assert parameters["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    weights = load_file(tmp_path / "out" / "adapters.safetensors")
    deltas = dense(sources)
    assert len(weights) == 2 * len(deltas)
    for module, delta in deltas.items():
        a, b = weights[f"{module}.lora_a"].double(), weights[f"{module}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == parameters["rank"] == 5
        assert relative(parameters["scale"] * (a @ b).t(), delta) < 1e-6
    assert metrics["parity"]["max_gap"] < 1e-5


def test_the_output_head_has_no_place(base: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="lm_head"):
        run(base, [make_adapter(tmp_path / "a", base, 1, targets=["lm_head"])], tmp_path / "out", format="mlx")
