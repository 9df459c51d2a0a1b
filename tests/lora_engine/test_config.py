import math
import subprocess
import sys
from typing import Any

import pytest

from lora_engine.config import LoraConfig, MergeSpec, TrainingConfig, TrainSpec, from_mapping, to_mapping
from lora_engine.errors import SpecError

PATHS = {"base_model": "b", "dataset": "d", "output": "o"}


@pytest.mark.parametrize(
    ("config", "alpha", "scaling"),
    [
        (LoraConfig(), 32, 2),
        (LoraConfig(rank=8, alpha=4), 4, 0.5),
        (LoraConfig(rank=16, use_rslora=True), 32, 8),
    ],
)
def test_scaling(config: LoraConfig, alpha: float, scaling: float) -> None:
    assert (config.resolved_alpha, config.scaling) == (alpha, scaling)


def test_a_spec_and_its_mapping_are_the_same() -> None:
    values = {**PATHS, "lora": {"rank": 4, "target_modules": ["q_proj", "v_proj"]}, "training": {"epochs": 2}}
    spec = from_mapping(TrainSpec, values)
    assert spec == TrainSpec(
        base_model="b", dataset="d", output="o",
        lora=LoraConfig(rank=4, target_modules=("q_proj", "v_proj")), training=TrainingConfig(epochs=2),
    )  # fmt: skip
    assert from_mapping(TrainSpec, to_mapping(spec)) == spec
    merge = from_mapping(MergeSpec, {"adapters": [{"path": "a", "weight": -1}], "output": "o"})
    assert merge.adapters[0].weight == -1
    assert from_mapping(MergeSpec, to_mapping(merge)) == merge


@pytest.mark.parametrize(
    ("lora", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 1025}, "rank"),
        ({"rank": 1.5}, "rank"),
        ({"rank": True}, "rank"),
        ({"rank": "8"}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"dropout": 0.96}, "dropout"),
        ({"dropout": math.nan}, "dropout"),
        ({"target_modules": "q_proj"}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": ["a b"]}, "target_modules"),
        ({"target_modules": ["x" * 201]}, "target_modules"),
        ({"rnk": 8}, "rnk"),
        ([], ""),
    ],
)
def test_an_impossible_value_is_named_from_the_root(lora: Any, field: str) -> None:
    with pytest.raises(SpecError) as caught:
        from_mapping(TrainSpec, {**PATHS, "lora": lora})
    assert caught.value.field == f"lora.{field}".rstrip(".")
    assert caught.value.message.startswith(caught.value.field)


@pytest.mark.parametrize(
    "training",
    [
        {"quantization": "nf8"}, {"compute_dtype": "fp64"}, {"schedule": "step"}, {"epochs": 0}, {"max_steps": 0},
        {"global_batch": 0}, {"sequence_length": 7}, {"learning_rate": 0}, {"learning_rate": math.inf},
        {"warmup_ratio": -0.1}, {"weight_decay": 2}, {"max_grad_norm": 0}, {"validation_fraction": 0.6},
        {"eval_every": -1}, {"checkpoint_every": 0}, {"seed": -1}, {"seed": 2**31},
    ],
)  # fmt: skip
def test_every_training_field_has_its_bounds(training: dict[str, Any]) -> None:
    (name,) = training
    with pytest.raises(SpecError) as caught:
        from_mapping(TrainingConfig, training)
    assert caught.value.field == name


def test_missing_and_unknown_fields() -> None:
    with pytest.raises(SpecError, match="dataset: is missing"):
        from_mapping(TrainSpec, {"base_model": "b", "output": "o"})
    with pytest.raises(SpecError, match="ouput: unknown field; known are base_model"):
        from_mapping(TrainSpec, {**PATHS, "ouput": "o"})
    with pytest.raises(SpecError) as caught:
        from_mapping(MergeSpec, {"adapters": [{"path": "a"}, {"path": "b", "weight": 1e5}], "output": "o"})
    assert caught.value.field == "adapters[1].weight"
    with pytest.raises(SpecError, match="at least one adapter"):
        MergeSpec(adapters=[], output="o")


def test_target_modules_are_named_once() -> None:
    assert LoraConfig(target_modules=["a", "b", "a"]).target_modules == ("a", "b")


def test_the_torch_free_part_imports_no_torch() -> None:
    modules = "config, errors, examples, strict_json, base_files"
    code = f"import sys; from lora_engine import {modules}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
