import json
import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_engine import optim
from lora_engine.__main__ import main
from tests.tiny_model import make_tiny_model


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "base")
    rows = [{"prompt": f"What is {index}? ", "completion": "It is a number."} for index in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write(tmp_path, training={"epochs": 1, "global_batch": 4, "learning_rate": 0.01, "checkpoint_every": 1})


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "spec.json"
    values = {"base_model": str(folder / "base"), "dataset": str(folder / "rows.jsonl"), "output": str(folder / "out")}
    path.write_text(json.dumps({**values, **changes}))
    return path


def test_train_writes_the_adapter_and_prints_metrics(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(spec)]) == 0
    output = capsys.readouterr()
    metrics = json.loads(output.out)
    assert metrics["steps"] == 3
    assert metrics["validation_loss_after"] < metrics["validation_loss_before"]
    assert output.err.count("\nstep ") + output.err.startswith("step ") == 3
    assert (spec.parent / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert "lowest validation loss" in (spec.parent / "out" / "adapter" / "curves.svg").read_text()
    lineage = json.loads((spec.parent / "out" / "adapter" / "lineage.json").read_text())
    assert len(lineage["base_digest"]) == 64


def test_resume_takes_the_newest_sound_checkpoint(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", str(spec)])
    expected = (spec.parent / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
    whole = capsys.readouterr()
    (spec.parent / "out" / "checkpoints" / "step-00000002" / "state.json").write_text("{}")
    assert main(["train", str(spec), "--resume"]) == 0
    output = capsys.readouterr()
    assert "passed over: step-00000002" in output.err
    assert "step 1/3" not in output.err
    assert "step 2/3" in output.err
    assert output.out == whole.out
    assert (spec.parent / "out" / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_plan_trains_nothing(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(spec)]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3
    assert not (spec.parent / "out").exists()


def test_describe(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", str(spec.parent / "base")]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["architecture"] == "LlamaForCausalLM"
    assert described["modules"][0] == {
        "name": "model.layers.0.self_attn.q_proj", "inputs": 32, "outputs": 32, "head": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainin": {}}, "invalid_spec: trainin: unknown field"),
        ({"base_model": "nowhere"}, "invalid_spec: base_model: nowhere is not a folder"),
        ({"dataset": "nowhere"}, "invalid_dataset: the dataset cannot be read"),
        ({"lora": {"target_modules": ["x"]}}, "invalid_spec: lora.target_modules: no linear layer is called 'x'"),
    ],
)
def test_an_engine_error_is_one_line_and_exit_code_2(
    spec: Path, changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write(spec.parent, **changes))]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1


def test_a_spec_that_is_not_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text("{")
    assert main(["train", str(tmp_path / "spec.json")]) == 2
    assert capsys.readouterr().err.startswith("invalid_spec: ")


def test_a_training_that_diverged_keeps_its_last_good_adapter(
    spec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    norms = iter([1.0, 1.0, math.nan, math.inf])
    monkeypatch.setattr(optim, "clip", lambda *_: next(norms))
    path = write(spec.parent, training={"epochs": 2, "global_batch": 4, "max_nonfinite_steps": 2})
    assert main(["train", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("diverged: ")
    assert "step 3/6  skipped: not finite" in output.err
    folder = spec.parent / "out" / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert any(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name)
    assert "2 steps" in (folder / "curves.svg").read_text()
