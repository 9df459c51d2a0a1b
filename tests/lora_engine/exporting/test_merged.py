"""A merged folder is the dense sum, rounded once, whatever the order; transformers loads it; nothing torn appears."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from lora_engine import base_model, generate
from lora_engine.adapter import read
from lora_engine.errors import AdapterError, SpecError
from lora_engine.exporting import sums
from lora_engine.exporting.base import open_base
from lora_engine.exporting.config import ExportConfig
from lora_engine.merging.config import WeightedAdapter
from lora_engine.quantized import LAYERS
from tests.lora_engine.exporting.made import dense, make_adapter, relative, run, tensors, weighted
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def sources(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[WeightedAdapter]:
    """Other ranks, alphas, a rsLoRA, targets that overlap in part, a negative weight and one by module."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        weighted(make_adapter(folder / "a", base, 1, rank=3, alpha=5.0), 0.7, q_proj=-1.3),
        weighted(make_adapter(folder / "b", base, 2, rank=5, use_rslora=True, targets=["q_proj", "up_proj"]), -0.4),
        make_adapter(folder / "c", base, 3, rank=2, targets=["down_proj"]),
    ]


def test_fp32_weights_are_the_dense_sum(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    metrics = run(base, sources, tmp_path / "out", format="merged")
    before, after = tensors(base), tensors(tmp_path / "out")
    deltas = dense(sources)
    assert set(after) == set(before)
    for name, weight in after.items():
        module = name.removesuffix(".weight")
        if module not in deltas:
            assert torch.equal(weight, before[name]), name
            continue
        assert relative(weight, before[name].double() + deltas[module]) < 1e-7, name
        rounding = (weight.double() - before[name].double() - deltas[module]).norm() / deltas[module].norm()
        # fp32's own rounding is told exactly; the factors' product has one of its own, which lies below.
        assert metrics["rounding"]["modules"][module] == pytest.approx(float(rounding), rel=0.5)
    assert metrics["parity"]["max_gap"] < 1e-4
    assert metrics["parity"]["greedy_agreement"] == 1
    assert (metrics["base"], metrics["trained_on"]) == ("original", "unknown")


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_sixteen_bits_are_rounded_once(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, dtype: str, stored: torch.dtype
) -> None:
    metrics = run(base, sources, tmp_path / "out", format="merged", dtype=dtype)
    before, after, deltas = tensors(base), tensors(tmp_path / "out"), dense(sources)
    errors = total = 0.0
    for module, delta in deltas.items():
        got, exact = after[f"{module}.weight"], before[f"{module}.weight"].double() + delta
        assert got.dtype == stored
        # The one rounding from fp32: nothing else within a hundredth of the last place.
        assert (got != exact.to(stored)).double().mean() < 0.01
        error = (got.double() - exact).norm()
        assert metrics["rounding"]["modules"][module] == pytest.approx(float(error / delta.norm()), rel=1e-3)
        errors, total = errors + float(error) ** 2, total + float(delta.norm()) ** 2
    assert metrics["rounding"]["total"] == pytest.approx((errors / total) ** 0.5, rel=1e-3)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")


def test_without_kernels_the_same_is_written(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(base, sources, tmp_path / "one", format="merged")
    monkeypatch.setattr(sums.kernels, "adds", lambda *_: False)
    two = run(base, sources, tmp_path / "two", format="merged")
    with_kernels, without = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert set(with_kernels) == set(without)
    assert all(relative(with_kernels[name], without[name]) < 1e-7 for name in without)
    assert one["rounding"]["total"] == pytest.approx(two["rounding"]["total"], rel=0.1)


def test_the_order_of_the_adapters_changes_no_bit(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path
) -> None:  # fmt: skip
    run(base, sources, tmp_path / "one", format="merged", dtype="bf16")
    run(base, sources[::-1], tmp_path / "two", format="merged", dtype="bf16")
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_transformers_loads_it_and_computes_what_the_adapter_computes(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path
) -> None:
    single = sources[2]
    run(base, [single], tmp_path / "out", format="merged", max_shard_bytes=20_000)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    loaded = base_model.load(base, compute_dtype="fp32")
    with torch.no_grad(), generate.attached(loaded, read(Path(single.path))):
        want = loaded.model(IDS).logits
    with torch.no_grad():
        assert (model(IDS).logits - want).abs().max() < 1e-4


def test_shards_and_their_index(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    run(base, sources, tmp_path / "whole", format="merged")
    run(base, sources, tmp_path / "parts", format="merged", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "parts" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert set(whole) == set(parts) == set(index["weight_map"])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    # One tensor is larger than a shard may be: it has a file of its own.
    assert all(
        path.stat().st_size < 24_000 or len(tensors_of(path)) == 1
        for path in (tmp_path / "parts").glob("*.safetensors")
    )


def tensors_of(path: Path) -> list[str]:
    from lora_engine.safetensors_file import read_header

    return list(read_header(path))


def test_blocks_and_parts_of_any_size_make_the_same_sum(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(base, sources, tmp_path / "one", format="merged")
    monkeypatch.setattr(sums, "BLOCK_BYTES", 640)
    monkeypatch.setattr(sums.nf4, "_CHUNK", 96)
    run(base, sources, tmp_path / "two", format="merged")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(relative(two[name], one[name]) < 1e-7 for name in one)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_onto_the_dequantised_base_that_it_was_trained_on(base: Path, tmp_path: Path, quantization: str) -> None:
    item = make_adapter(tmp_path / "a", base, 1, quantization=quantization, targets=["q_proj"])
    metrics = run(base, [item], tmp_path / "out", format="merged")
    assert metrics["base"] == metrics["trained_on"] == quantization
    assert metrics["parity"]["max_gap"] < 1e-4
    before, after, deltas = tensors(base), tensors(tmp_path / "out"), dense([item])
    for name, weight in after.items():
        module = name.removesuffix(".weight")
        if "_proj" not in name:
            assert torch.equal(weight, before[name]), name
        else:
            dequantised = LAYERS[quantization](before[name], None, torch.float32).dequantized().double()
            assert relative(weight, dequantised + deltas.get(module, 0)) < 1e-7, name


def test_another_base_than_the_training_had_fails_by_its_parity(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, quantization="nf4")
    with pytest.raises(AdapterError, match=r"parity: .* were trained on nf4 weights and these are original"):
        run(base, [item], tmp_path / "out", format="merged", base="original")
    assert not (tmp_path / "out").exists()
    metrics = run(base, [item], tmp_path / "out", format="merged", base="original", max_gap=100)
    assert metrics["parity"]["max_gap"] > 0.001
    assert (metrics["base"], metrics["trained_on"]) == ("original", "nf4")


@pytest.mark.parametrize(("other", "told"), [("int8", "int8, nf4"), (None, "nf4, unknown")])
def test_adapters_of_different_quantisations_need_a_base_named(
    base: Path, tmp_path: Path, other: str | None, told: str
) -> None:
    items = [
        make_adapter(tmp_path / name, base, seed, quantization=quantization)
        for seed, (name, quantization) in enumerate([("a", "nf4"), ("b", other)])
    ]
    with pytest.raises(AdapterError, match=rf"base: .*{told}"):
        run(base, items, tmp_path / "out", format="merged")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_untied(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, targets=["lm_head"])
    metrics = run(base, [item], tmp_path / "out", format="merged")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert metrics["head_untied"]
    embedding = before["model.embed_tokens.weight"]
    assert torch.equal(after["model.embed_tokens.weight"], embedding)
    assert relative(after["lm_head.weight"], embedding.double() + dense([item])["lm_head"]) < 1e-7
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert torch.equal(model.lm_head.weight, after["lm_head.weight"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_tied_head_that_is_stored_under_its_own_name_alone(tmp_path: Path, dtype: str) -> None:
    base = make_tiny_model(tmp_path / "base")
    stored = tensors(base)
    embedding = stored.pop("model.embed_tokens.weight")
    save_file({**stored, "lm_head.weight": embedding}, base / "model.safetensors", {"format": "pt"})
    item = make_adapter(tmp_path / "a", base, 1, targets=["lm_head"])
    run(base, [item], tmp_path / "out", format="merged", dtype=dtype)
    after = tensors(tmp_path / "out")
    assert torch.equal(after["model.embed_tokens.weight"], embedding.to(after["lm_head.weight"].dtype))
    tolerance = 1e-7 if dtype == "fp32" else 3e-3
    assert relative(after["lm_head.weight"], embedding.double() + dense([item])["lm_head"]) < tolerance
    with torch.no_grad():
        want = base_model.load(base, compute_dtype="fp32").model(IDS).logits
    assert torch.equal(open_base(base).evaluated()(IDS).logits, want)


def test_gpt2_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    base = make_tiny_gpt2(tmp_path / "base")
    item = make_adapter(tmp_path / "a", base, 1, quantization="nf4")
    run(base, [item], tmp_path / "out", format="merged", base="original", max_gap=100)
    before, after, deltas = tensors(base), tensors(tmp_path / "out"), dense([item])
    prefix = "" if "h.0.attn.c_attn.weight" in before else "transformer."
    for module, delta in deltas.items():
        name = f"{prefix}{module.removeprefix('transformer.')}.weight"
        assert relative(after[name], before[name].double() + delta.t()) < 1e-7
    metrics = run(base, [item], tmp_path / "dequantised", format="merged")
    assert metrics["parity"]["max_gap"] < 1e-4


def test_what_travels_along(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    run(base, sources, tmp_path / "out", format="merged")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2  # <|end|>, at which the template ends a turn
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["parents"] == json.loads((tmp_path / "out" / "lineage.json").read_text())["parents"]
    assert "log-probability gap" in (tmp_path / "out" / "README.md").read_text()


def test_a_stop_token_that_the_generation_config_lacks_is_added(
    sources: list[WeightedAdapter], base: Path, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "base")
    values = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps({**values, "eos_token_id": 1}))
    item = make_adapter(tmp_path / "a", other, 1)
    run(other, [item], tmp_path / "out", format="merged")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 2]


def test_values_beyond_fp16_are_refused(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, size=500.0)
    with pytest.raises(AdapterError, match=r"layers.0.*F16"):
        run(base, [item], tmp_path / "out", format="merged", dtype="fp16")
    assert not list(tmp_path.glob("*out*"))


def test_a_large_delta_in_few_bits_comes_with_advice(base: Path, tmp_path: Path) -> None:
    item = make_adapter(tmp_path / "a", base, 1, size=0.005)
    metrics = run(base, [item], tmp_path / "out", format="merged", dtype="bf16")
    assert metrics["rounding"]["total"] > 0.1
    assert "unmerged" in metrics["advice"]


def test_another_base_model_is_found_before_anything_is_written(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=5)
    with pytest.raises(AdapterError, match="another base model"):
        run(other, sources, tmp_path / "out", format="merged")
    gpt2 = make_tiny_gpt2(tmp_path / "gpt2")
    with pytest.raises(AdapterError, match="no linear layer of this name"):
        run(gpt2, sources, tmp_path / "out", format="merged")
    with pytest.raises(SpecError, match="base_model"):
        run(tmp_path / "nowhere", sources, tmp_path / "out", format="merged")


class Stopped(Exception):
    pass


def test_a_stopped_export_leaves_nothing(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(base, sources, tmp_path / "out", format="merged", tell=stop)
    assert not list(tmp_path.iterdir())


def test_progress_ends_at_the_total(base: Path, sources: list[WeightedAdapter], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    run(base, sources, tmp_path / "out", format="merged", tell=lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_a_full_disk_leaves_nothing(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, views: Any, offset: int) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(OSError, match="No space left"):
        run(base, sources, tmp_path / "out", format="merged")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_found_first(
    base: Path, sources: list[WeightedAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_engine.exporting import export

    monkeypatch.setattr(export, "_SPARE_BYTES", 1 << 62)
    with pytest.raises(OSError, match=r"bytes, and .* are free"):
        run(base, sources, tmp_path / "out", format="merged")
    assert not list(tmp_path.iterdir())


def test_default_shards_and_precision() -> None:
    config = ExportConfig(format="merged")
    assert (config.shard_bytes, config.precision) == (5_000_000_000, None)
