import json
import math
import subprocess
import sys
from typing import Any

import pytest

from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec, from_mapping, to_mapping
from lora_engine.errors import SpecError
from lora_engine.merging.config import MergeSpec

PATHS = {"base_model": "b", "dataset": "d", "output": "o"}


def test_alpha_is_twice_the_rank_when_left_out() -> None:
    assert LoraConfig(rank=8).resolved_alpha == 16
    assert LoraConfig(rank=8, alpha=4).resolved_alpha == 4


def test_a_spec_and_its_mapping_are_the_same() -> None:
    lora = {"rank": 4, "target_modules": ["q_proj", "mlp"], "rank_pattern": {"mlp": 8, "layers.[0-7].mlp.*": 2},
            "alpha_pattern": {"q_proj": 3}, "learning_rate_pattern": {"q_proj": 1e-3}, "lora_plus_ratio": 16,
            }  # fmt: skip
    training = {
        "quantization": "int8",
        "optimizer": "sgd",
        "momentum": 0,
        "eval_every": 5,
        "early_stopping_patience": 3,
    }
    spec = from_mapping(TrainSpec, {**PATHS, "lora": lora, "training": training})
    assert spec == TrainSpec(
        base_model="b",
        dataset="d",
        output="o",
        lora=LoraConfig(
            rank=4,
            target_modules=("q_proj", "mlp"),
            rank_pattern={"mlp": 8, "layers.[0-7].mlp.*": 2},
            alpha_pattern={"q_proj": 3},
            learning_rate_pattern={"q_proj": 1e-3},
            lora_plus_ratio=16,
        ),
        training=TrainingConfig(
            quantization="int8", optimizer="sgd", momentum=0, eval_every=5, early_stopping_patience=3
        ),
    )
    carried = json.loads(json.dumps(to_mapping(spec)))
    assert from_mapping(TrainSpec, carried) == spec
    # Of several entries the last one counts.
    assert list(carried["lora"]["rank_pattern"]) == ["mlp", "layers.[0-7].mlp.*"]
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
        ({"target_modules": ["a..b"]}, "target_modules"),
        ({"target_modules": [".*"]}, "target_modules"),
        ({"target_modules": ["(a+)+$"]}, "target_modules"),
        ({"target_modules": ["a"] * 1025}, "target_modules"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1025}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern"),
        ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern"),
        ({"rank_pattern": [["q_proj", 4]]}, "rank_pattern"),
        ({"rank_pattern": None}, "rank_pattern"),
        ({"rank_pattern": {f"layers.{number}.*": 4 for number in range(1025)}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern"),
        ({"learning_rate_pattern": {"q_proj": 0}}, "learning_rate_pattern"),
        ({"learning_rate_pattern": {"q_proj": 1.1}}, "learning_rate_pattern"),
        ({"lora_plus_ratio": 0}, "lora_plus_ratio"),
        ({"lora_plus_ratio": math.inf}, "lora_plus_ratio"),
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
        {"eval_every": -1}, {"checkpoint_every": 0}, {"seed": -1}, {"seed": 2**31}, {"optimizer": "adam"},
        {"optimizer": None}, {"momentum": 1}, {"momentum": -0.1}, {"momentum": math.nan}, {"max_nonfinite_steps": 0},
        {"max_nonfinite_steps": 1001}, {"early_stopping_patience": 0}, {"early_stopping_patience": 2.5},
    ],
)  # fmt: skip
def test_every_training_field_has_its_bounds(training: dict[str, Any]) -> None:
    (name,) = training
    with pytest.raises(SpecError) as caught:
        from_mapping(TrainingConfig, training)
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("training", "remedy"),
    [
        ({"early_stopping_patience": 3}, "set eval_every"),
        ({"early_stopping_patience": 3, "eval_every": 2, "validation_fraction": 0}, "name a validation_dataset"),
    ],
)
def test_early_stopping_needs_something_to_go_by(training: dict[str, Any], remedy: str) -> None:
    with pytest.raises(SpecError, match=remedy) as caught:
        from_mapping(TrainSpec, {**PATHS, "training": training})
    assert caught.value.field == "training.early_stopping_patience"
    held_out = {**training, "eval_every": 2}
    assert from_mapping(TrainSpec, {**PATHS, "validation_dataset": "v", "training": held_out})


def test_a_paged_optimizer_needs_a_gpu() -> None:
    training = {"optimizer": "paged_adamw_8bit"}
    for device in ("auto", "cuda", "cuda:1"):
        assert from_mapping(TrainSpec, {**PATHS, "device": device, "training": training})
    with pytest.raises(SpecError, match="on cpu use adamw_8bit") as caught:
        from_mapping(TrainSpec, {**PATHS, "device": "cpu", "training": training})
    assert caught.value.field == "training.optimizer"


def test_a_pattern_is_a_copy_of_what_was_given() -> None:
    pattern = {"q_proj": 4}
    config = LoraConfig(rank_pattern=pattern)
    pattern["q_proj"] = 9999
    assert config.rank_pattern == {"q_proj": 4}


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
    modules = "config, fields, errors, examples, strict_json, base_files, target_modules"
    code = f"import sys; from lora_engine import {modules}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False False\n"
