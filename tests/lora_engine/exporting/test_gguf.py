"""GGUF files, read back with the `gguf` package: the deltas, the weights and the fields are what llama.cpp expects."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.exporting.gguf_layout import reorder, restore, stored_rows
from lora_engine.merging.config import WeightedAdapter
from tests.lora_engine.exporting.made import dense, make_adapter, relative, run, tensors, weighted
from tests.tiny_model import make_tiny_gpt2, make_tiny_model
from tests.zoo import FAMILIES

HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def sources(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[WeightedAdapter]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        weighted(make_adapter(folder / "a", base, 1, rank=3, alpha=5.0), -0.5),
        make_adapter(folder / "b", base, 2, rank=2, use_rslora=True, targets=["q_proj"]),
    ]


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], set[str]]:
    """Fields, dequantised tensors and types of a file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    found = {
        item.name: torch.from_numpy(np.array(gguf.dequantize(item.data, item.tensor_type), dtype=np.float32))
        for item in reader.tensors
    }
    return fields, found, {item.tensor_type.name for item in reader.tensors}


def llama_order(weight: Tensor, heads: int) -> Tensor:
    """As llama.cpp's `LlamaModel.permute` has it."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def stored(module: str) -> str:
    """The GGUF name of a Llama's module, by hand."""
    names = {
        "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
        "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
    }  # fmt: skip
    _, _, layer, *_, last = module.split(".")
    return f"blk.{layer}.{names[last]}"


def test_rows_in_llamas_order() -> None:
    rows = torch.randn(24, 5)
    assert torch.equal(reorder(rows, 3), llama_order(rows, 3))
    assert torch.equal(restore(reorder(rows, 3), 3), rows)
    assert torch.equal(reorder(rows, 3)[stored_rows(24, 3)], rows)


@pytest.mark.parametrize(("precision", "tolerance"), [("F32", 1e-6), ("F16", 1e-3)])
def test_an_adapter_computes_the_sum_as_llama_cpp_scales_it(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, precision: str, tolerance: float
) -> None:
    metrics = run(base, sources, tmp_path / "out", format="gguf", gguf_type=precision)
    fields, found, types = contents(tmp_path / "out" / "adapter.gguf")
    assert fields["general.architecture"] == "llama"
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    assert types == {precision}
    deltas = dense(sources)
    assert len(found) == 2 * len(deltas)
    for module, delta in deltas.items():
        name = stored(module)
        A, B = found[f"{name}.weight.lora_a"].double(), found[f"{name}.weight.lora_b"].double()
        got = fields["adapter.lora.alpha"] / len(A) * (B @ A)
        heads = HEADS.get(name.rpartition(".")[2])
        assert relative(got, llama_order(delta, heads) if heads else delta) < tolerance
    assert metrics["parity"]["max_gap"] < metrics["parity"]["limit"]


@pytest.mark.parametrize(("precision", "tolerance"), [("F32", 1e-6), ("F16", 1e-3), ("Q8_0", 1e-2)])
def test_a_model_holds_the_sums(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, precision: str, tolerance: float
) -> None:
    metrics = run(base, sources, tmp_path / "out", format="gguf-merged", gguf_type=precision)
    _, found, types = contents(tmp_path / "out" / "model.gguf")
    assert types == {"F32", precision}
    before, deltas = tensors(base), dense(sources)
    for module, delta in deltas.items():
        name, weight = stored(module), before[f"{module}.weight"].double() + delta
        heads = HEADS.get(name.rpartition(".")[2])
        exact = llama_order(weight, heads) if heads else weight
        assert relative(found[f"{name}.weight"], exact) < tolerance
        error = (found[f"{name}.weight"].double() - exact).norm() / delta.norm()
        if precision != "F32":
            assert metrics["rounding"]["modules"][module] == pytest.approx(float(error), rel=1e-2)
    assert torch.equal(found["output_norm.weight"], before["model.norm.weight"])
    assert relative(found["token_embd.weight"], before["model.embed_tokens.weight"]) < tolerance
    assert "output.weight" not in found  # tied
    assert metrics["parity"]["max_gap"] < metrics["parity"]["limit"]


def test_the_fields_of_a_model(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    run(base, sources, tmp_path / "out", format="gguf-merged")
    fields, _, _ = contents(tmp_path / "out" / "model.gguf")
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokens = fields["tokenizer.ggml.tokens"]
    assert all(tokens[number] == token for token, number in tokenizer["model"]["vocab"].items())
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in tokenizer["model"]["merges"]]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert [fields["tokenizer.ggml.token_type"][number] for number in (0, 1, 2, 3)] == [3, 3, 3, 1]
    assert (fields["tokenizer.ggml.bos_token_id"], fields["tokenizer.ggml.eos_token_id"]) == (0, 2)
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.chat_template"] == (base / "chat_template.jinja").read_text()
    expected = {
        "llama.block_count": 2, "llama.embedding_length": 32, "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8, "llama.context_length": 256, "llama.vocab_size": len(tokens),
        "general.file_type": 1,
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.rope.freq_base"] == pytest.approx(10_000)
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_an_untied_head(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, targets=["lm_head"])
    run(base, [item], tmp_path / "out", format="gguf-merged", gguf_type="F32")
    _, found, _ = contents(tmp_path / "out" / "model.gguf")
    embedding = tensors(base)["model.embed_tokens.weight"]
    assert torch.equal(found["token_embd.weight"], embedding)
    assert relative(found["output.weight"], embedding.double() + dense([item])["lm_head"]) < 1e-6
    with pytest.raises(AdapterError, match="lm_head: it shares its weight"):
        run(base, [item], tmp_path / "adapter", format="gguf")


@pytest.mark.parametrize("family", ["llama3", "qwen2", "qwen3", "smollm2"])
def test_families_of_whole_models(tmp_path: Path, family: str) -> None:
    base = FAMILIES[family](tmp_path / "base")
    item = make_adapter(tmp_path / "a", base, 1)
    metrics = run(base, [item], tmp_path / "out", format="gguf-merged", gguf_type="F32")
    assert metrics["parity"]["max_gap"] < 1e-4
    _, found, _ = contents(tmp_path / "out" / "model.gguf")
    assert ("rope_freqs.weight" in found) == (family == "llama3")


def test_rope_factors_of_llama3(tmp_path: Path) -> None:
    """By llama.cpp's own formula: 1 for short waves, the factor for long ones, between the two in the middle."""
    base = FAMILIES["llama3"](tmp_path / "base")
    run(base, [make_adapter(tmp_path / "a", base, 1)], tmp_path / "out", format="gguf-merged", gguf_type="F32")
    _, found, _ = contents(tmp_path / "out" / "model.gguf")
    factors = []
    for frequency in 10_000.0 ** (-torch.arange(0, 8, 2).double() / 8):
        wave = 2 * np.pi / float(frequency)
        smooth = (64 / wave - 1) / (4 - 1)
        factors.append(1 if wave < 64 / 4 else 8 if wave > 64 / 1 else 1 / ((1 - smooth) / 8 + smooth))
    assert found["rope_freqs.weight"].tolist() == pytest.approx(factors, rel=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "phi3", "mistral", "smollm3"])
def test_families_of_adapters(tmp_path: Path, family: str) -> None:
    base = FAMILIES[family](tmp_path / "base")
    metrics = run(base, [make_adapter(tmp_path / "a", base, 1)], tmp_path / "out", format="gguf")
    assert metrics["parity"]["max_gap"] < 1e-5


@pytest.mark.parametrize(("family", "reason"), [
    ("gemma2", "gemma2 are not written"), ("mistral", "sliding window"), ("phi4", "phi3 are not written"),
    ("smollm3", "every fourth layer"), ("mixtral", "mixtral are not written"),
])  # fmt: skip
def test_models_that_llama_cpp_would_compute_otherwise(tmp_path: Path, family: str, reason: str) -> None:
    base = FAMILIES[family](tmp_path / "base")
    item = make_adapter(tmp_path / "a", base, 1)
    with pytest.raises(AdapterError, match=reason):
        run(base, [item], tmp_path / "out", format="gguf-merged")
    assert not (tmp_path / "out").exists()


def test_kinds_that_gguf_has_no_rules_for_here(tmp_path: Path) -> None:
    base = make_tiny_gpt2(tmp_path / "base")
    with pytest.raises(AdapterError, match="gpt2 are not written as GGUF"):
        run(base, [make_adapter(tmp_path / "a", base, 1)], tmp_path / "out", format="gguf")


@pytest.mark.parametrize(("change", "reason"), [
    ({"pre_tokenizer": {"type": "Whitespace"}}, "splits texts by"),
    ({"normalizer": {"type": "Lowercase"}}, "splits texts by"),
], ids=["splitting", "normalizer"])  # fmt: skip
def test_tokenizers_that_llama_cpp_does_not_share(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    base = make_tiny_model(tmp_path / "base")
    values = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps({**values, **change}))
    item = make_adapter(tmp_path / "a", base, 1)
    with pytest.raises(AdapterError, match=reason):
        run(base, [item], tmp_path / "out", format="gguf-merged")


def test_order_changes_no_bit(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    for layout, name in (("gguf", "adapter.gguf"), ("gguf-merged", "model.gguf")):
        run(base, sources, tmp_path / "one", format=layout)
        run(base, sources[::-1], tmp_path / "two", format=layout)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
