"""The verbs whose work is done elsewhere, each from its spec file to the JSON on stdout, with progress on stderr."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import adapter, base_files
from lora_engine.__main__ import main
from lora_engine.adapter import Adapter, LoraWeights
from tests.tiny_model import make_tiny_model

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):
        factors = LoraWeights(*(torch.randn(*shape, generator=generator) * 0.1 for shape in ((2, 32), (64, 2))))
        made = Adapter(
            weights={MODULE: factors}, rank=2, alpha=2.0, base_model_name="tests/tiny",
            base_digest=base_files.digest(tmp_path / "base"),
        )  # fmt: skip
        adapter.write(made, tmp_path / name, lineage={})
    rows = [{"prompt": f"What is {index}? ", "completion": "It is a number."} for index in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(place: Path, capsys: pytest.CaptureFixture[str], verb: str, **spec: Any) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    (place / "spec.json").write_text(json.dumps({"output": str(place / "out"), **spec}))
    assert main([verb, str(place / "spec.json")]) == 0
    output = capsys.readouterr()
    return json.loads(output.out), output.err


def test_analyze(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"path": str(folder / name)} for name in ("one", "two")]
    _, told = run(folder, capsys, "analyze", adapters=given)
    assert (folder / "out" / "report.json").exists()
    assert told.endswith("analysed 100%  0:00 left\n")


def test_search_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"base_model": str(folder / "base"), "dataset": str(folder / "rows.jsonl"), "threads": 1}
    adapters = [str(folder / name) for name in ("one", "two")]
    _, told = run(folder, capsys, "search-weights", adapters=adapters, search={"steps": 2, "eval_every": 1}, **given)
    assert adapter.read(folder / "out").weights
    assert told.endswith("searched 100%  0:00 left\n")


def test_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"base_model": str(folder / "base"), "adapters": [{"path": str(folder / "one"), "weight": -1.0}]}
    run(folder, capsys, "export", export={"format": "peft-portable"}, **given)
    found = adapter.delta(adapter.read(folder / "out"), MODULE)
    torch.testing.assert_close(found, -adapter.delta(adapter.read(folder / "one"), MODULE))


def test_ingest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, told = run(folder, capsys, "ingest", folder=str(folder / "one"))
    assert metrics["rank"] == 2
    assert told.endswith("ingested 100%  0:00 left\n")


@pytest.mark.parametrize("verb", ["merge", "extract", "analyze", "search-weights", "export", "ingest"])
def test_an_unknown_field_is_named(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "spec.json").write_text('{"ouput": "x"}')
    assert main([verb, str(tmp_path / "spec.json")]) == 2
    assert capsys.readouterr().err.startswith("invalid_spec: ouput: unknown field; known are ")
