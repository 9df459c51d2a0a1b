"""Every family of the zoo, from disk: the same bits as in memory, and merged folders that transformers loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_engine import base_model
from lora_engine.exporting import streamed
from lora_engine.exporting.base import open_base
from tests.lora_engine.exporting.made import make_adapter, run
from tests.tiny_model import make_tiny_model
from tests.zoo import FAMILIES

IDS = torch.arange(3, 40)[None].repeat(2, 1) + torch.tensor([[0], [5]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_computes_from_disk_gives_the_same_bits(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FAMILIES[family](tmp_path / "base")
    with torch.no_grad():
        want = base_model.load(folder, compute_dtype="fp32").model(IDS).logits
        assert torch.equal(open_base(folder).evaluated()(IDS).logits, want)
        monkeypatch.setattr(streamed, "_BLOCK_WEIGHTS", 256)
        assert (open_base(folder).evaluated()(IDS).logits - want).abs().max() < 1e-4


def test_an_id_for_padding_that_is_beyond_the_rows_read(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": config["vocab_size"] - 1}))
    with torch.no_grad():
        want = base_model.load(folder, compute_dtype="fp32").model(IDS).logits
        assert torch.equal(open_base(folder).evaluated()(IDS).logits, want)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_from_disk(tmp_path: Path, family: str, quantization: str) -> None:
    folder = FAMILIES[family](tmp_path / "base")
    base = base_model.load(folder, compute_dtype="fp32", quantization=quantization)
    with torch.no_grad():
        got = open_base(folder).evaluated(quantization=quantization)(IDS).logits
        assert torch.equal(got, base.model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged(tmp_path: Path, family: str) -> None:
    base = FAMILIES[family](tmp_path / "base")
    metrics = run(base, [make_adapter(tmp_path / "a", base, 1, size=0.05)], tmp_path / "out", format="merged")
    assert metrics["parity"]["max_gap"] < 2e-4
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        got = open_base(tmp_path / "out").evaluated()(IDS).logits
        assert (model(IDS).logits - got).abs().max() < 1e-3
