"""The verbs that take up what training made: merge, generate, convert."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_engine import adapter, base_files
from lora_engine.__main__ import main
from lora_engine.adapter import Adapter, LoraWeights
from tests.tiny_model import make_tiny_model

PROMPTS = ["What is the capital of France?", [{"role": "user", "content": "What is the capital of France?"}]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tiny_model(tmp_path / "base")
    weights = {"model.layers.0.mlp.up_proj": LoraWeights(torch.ones(2, 32), torch.ones(64, 2))}
    made = Adapter(weights=weights, rank=2, alpha=2.0, base_digest=base_files.digest(tmp_path / "base"))
    adapter.write(made, tmp_path / "adapter", lineage={})
    return tmp_path


def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, *options: str) -> Any:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json.dumps(PROMPTS).encode())))
    assert main(["generate", str(folder / "base"), "--max-new-tokens", "8", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_merge_writes_the_stack_and_prints_its_rank(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {"adapters": [{"path": str(folder / "adapter"), "weight": -0.5}], "output": str(folder / "merged")}
    (folder / "spec.json").write_text(json.dumps(spec))
    assert main(["merge", str(folder / "spec.json")]) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 2
    module = "model.layers.0.mlp.up_proj"
    merged, source = adapter.read(folder / "merged"), adapter.read(folder / "adapter")
    torch.testing.assert_close(adapter.delta(merged, module), -0.5 * adapter.delta(source, module))


def test_compress_and_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", str(folder / "adapter"), str(folder / "small"), "--rank", "1", "--dtype", "fp16"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["certificate"]["frobenius"] < 1e-3  # both ranks were the same
    assert output.err == "compressed 100%  0:00 left\n"
    assert main(["verify", str(folder / "small"), str(folder / "adapter")]) == 0
    assert json.loads(capsys.readouterr().out)["verified"]
    certificate = folder / "small" / "certificate.json"
    certificate.write_text(certificate.read_text().replace('"frobenius": ', '"frobenius": 1'))
    assert main(["verify", str(folder / "small"), str(folder / "adapter")]) == 2
    assert "model.layers.0.mlp.up_proj: frobenius is " in capsys.readouterr().err


def test_compress_wants_a_size(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compress", str(folder / "adapter"), str(folder / "small")])
    assert "one of the arguments --rank --energy --max-bytes is required" in capsys.readouterr().err


def test_extract_takes_back_what_was_added(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tiny_model(folder / "tuned", seed=0)
    weights = load_file(folder / "tuned" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] += 2.0
    save_file(weights, folder / "tuned" / "model.safetensors", {"format": "pt"})
    spec = {"base_model": str(folder / "base"), "tuned_model": str(folder / "tuned"), "output": str(folder / "out")}
    (folder / "spec.json").write_text(json.dumps({**spec, "rank": 1}))
    assert main(["extract", str(folder / "spec.json")]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["rank"] == 1
    assert output.err.endswith("extracted 100%  0:00 left\n")
    delta = adapter.delta(adapter.read(folder / "out"), "model.layers.0.mlp.up_proj")
    torch.testing.assert_close(delta, torch.full_like(delta, 2.0), atol=1e-5, rtol=0)


def test_generate_answers_with_and_without_the_adapter(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ask(monkeypatch, capsys, folder)
    adapted = ask(monkeypatch, capsys, folder, "--adapter", str(folder / "adapter"))
    both = ask(monkeypatch, capsys, folder, "--adapter", str(folder / "adapter"), "--compare")
    assert [set(answer) for answer in plain] == [{"base"}, {"base"}]
    assert [set(answer) for answer in adapted] == [{"adapter"}, {"adapter"}]
    assert both == [{**first, **second} for first, second in zip(plain, adapted, strict=True)]
    assert plain[0] == plain[1]
    assert adapted[0]["adapter"] != plain[0]["base"]


def test_generate_refuses_an_adapter_of_other_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_model(folder / "other", seed=1)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'["Hello"]')))
    assert main(["generate", str(folder / "other"), "--adapter", str(folder / "adapter")]) == 2
    assert capsys.readouterr().err.startswith("adapter_unusable: the adapter was trained on another base model")


@pytest.mark.parametrize("stdin", [b"{", b'{"prompt": "Hello"}'])
def test_generate_wants_an_array(
    folder: Path, stdin: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    assert main(["generate", str(folder / "base")]) == 2
    assert capsys.readouterr().err.startswith("invalid_spec: stdin: ")


@pytest.mark.parametrize("arguments", [[], ["--demo", "file.gguf"]])
def test_convert_takes_one_source(tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", *arguments, str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "invalid_spec: give a GGUF file or --demo\n"
