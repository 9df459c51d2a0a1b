"""An adapter out of two checkpoints, against the dense difference of their weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lora_engine import adapter
from lora_engine.errors import SpecError
from lora_engine.merging.config import ExtractSpec
from lora_engine.merging.extract import best_factors, extract
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def tuned(base: Path, folder: Path, ranks: dict[str, int], *, others: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """A copy of a checkpoint with deltas of such ranks added to modules; the deltas (out × in), in fp32 as stored."""
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, parameter in model.named_parameters():
        module = name.removesuffix(".weight")
        if rank := ranks.get(module):
            before = parameter.data.clone()
            rows, columns = parameter.shape
            parameter.data += torch.randn(rows, rank, generator=generator) @ torch.randn(
                rank, columns, generator=generator
            )
            deltas[module] = parameter.data - before
        elif module in others:
            parameter.data = parameter.data * 1.5
    model.save_pretrained(folder)
    return deltas


def run(folder: Path, **options: Any) -> dict[str, Any]:
    spec = ExtractSpec(
        base_model=str(folder / "base"), tuned_model=str(folder / "tuned"), output=str(folder / "out"), **options
    )
    return extract(spec)


def test_a_difference_of_few_ranks_is_exact(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base")
    deltas = tuned(tmp_path / "base", tmp_path / "tuned", {Q: 3, DOWN: 5})
    told: list[tuple[int, int]] = []
    spec = ExtractSpec(
        base_model=str(tmp_path / "base"), tuned_model=str(tmp_path / "tuned"), output=str(tmp_path / "out"), rank=6,
        base_model_name="tests/tiny",
    )  # fmt: skip
    metrics = extract(spec, lambda done, total: told.append((done, total)))
    found = adapter.read(tmp_path / "out")
    assert set(found.weights) == {Q, DOWN}
    for module, delta in deltas.items():
        assert (adapter.delta(found, module) - delta).norm() <= 1e-6 * delta.norm()
    assert metrics["certificate"]["frobenius"] <= 1e-6
    assert found.base_model_name == "tests/tiny"
    assert told[-1] == (14, 14)


def test_a_difference_of_many_ranks_is_approximated_with_its_error(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base")
    deltas = tuned(tmp_path / "base", tmp_path / "tuned", {Q: 30, DOWN: 5})
    run(tmp_path, rank=8)
    found = adapter.read(tmp_path / "out")
    certified = json.loads((tmp_path / "out/certificate.json").read_text())["modules"]
    for module, delta in deltas.items():
        S = torch.linalg.svdvals(delta.double())
        error = adapter.delta(found, module) - delta
        assert certified[module]["frobenius"] == pytest.approx(float(error.norm() / delta.norm()), abs=1e-5)
        assert certified[module]["spectral"] == pytest.approx(
            float(torch.linalg.matrix_norm(error, 2) / S[0]), abs=1e-5
        )
        assert float(error.norm()) == pytest.approx(float(S[8:].norm()), abs=1e-5 * float(S.norm()))


def test_as_many_ranks_as_the_energy_takes(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base")
    deltas = tuned(tmp_path / "base", tmp_path / "tuned", {Q: 30, DOWN: 5})
    run(tmp_path, energy=0.9)
    certified = json.loads((tmp_path / "out/certificate.json").read_text())["modules"]
    for module, delta in deltas.items():
        S = torch.linalg.svdvals(delta.double()).square()
        needed = 1 + int((S.cumsum(0) < 0.9 * S.sum()).sum())
        assert certified[module]["rank"] == needed
    assert set(certified) == {Q, DOWN}


def test_the_weights_of_gpt2_lie_the_other_way_round(tmp_path: Path) -> None:
    make_tiny_gpt2(tmp_path / "base")
    name = "transformer.h.0.attn.c_proj"  # square: its shape does not tell
    deltas = tuned(tmp_path / "base", tmp_path / "tuned", {name: 2})
    run(tmp_path, rank=2)
    found = adapter.delta(adapter.read(tmp_path / "out"), name)
    assert (found - deltas[name].T).norm() <= 1e-6 * found.norm()


def test_what_no_adapter_can_hold_is_refused_or_stated(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base")
    tuned(tmp_path / "base", tmp_path / "tuned", {Q: 2}, others=("model.norm",))
    with pytest.raises(SpecError, match=r"most of all model\.norm\.weight \(by 0\.5"):
        run(tmp_path)
    assert not (tmp_path / "out").exists()
    metrics = run(tmp_path, other_changes="leave_out")
    assert metrics["left_out"] == {"model.norm.weight": pytest.approx(0.5)}
    assert json.loads((tmp_path / "out/certificate.json").read_text())["left_out"] == metrics["left_out"]


def test_a_head_that_was_tied_in_the_base_model(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base", tied=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "tuned")
    weights = load_file(tmp_path / "tuned/model.safetensors")
    head = weights["model.embed_tokens.weight"]
    change = torch.outer(torch.arange(len(head)).float() / len(head), torch.ones(head.shape[1]))
    save_file({**weights, "lm_head.weight": head + change}, tmp_path / "tuned/model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "tuned/config.json").read_text())
    (tmp_path / "tuned/config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    run(tmp_path, rank=1)
    found = adapter.read(tmp_path / "out")
    assert set(found.weights) == {"lm_head"}
    torch.testing.assert_close(adapter.delta(found, "lm_head").float(), change, atol=1e-5, rtol=1e-5)


def test_refusals(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base")
    with pytest.raises(SpecError, match=r"tuned_model: .* is not a folder"):
        run(tmp_path)
    make_tiny_model(tmp_path / "tuned")
    with pytest.raises(SpecError, match="no linear layer differs"):
        run(tmp_path)
    make_tiny_gpt2(tmp_path / "gpt2")
    (tmp_path / "tuned").rename(tmp_path / "same")
    (tmp_path / "gpt2").rename(tmp_path / "tuned")
    with pytest.raises(SpecError, match="one architecture"):
        run(tmp_path)
    with pytest.raises(SpecError, match="at most one of rank and energy"):
        run(tmp_path, rank=2, energy=0.5)


@pytest.mark.parametrize("rank", [4, 12])
def test_a_large_matrix_is_approximated_as_well_as_can_be(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    U, _ = torch.linalg.qr(torch.randn(700, 560, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(560, 560, generator=generator, dtype=torch.float64))
    S = 0.9 ** torch.arange(560)
    matrix = ((U * S) @ V.T).float()
    B, A = best_factors(matrix, rank)
    left_out = (matrix - B @ A).norm()
    assert float(left_out) == pytest.approx(float(S[rank:].norm()), rel=1e-4)
    B, A = best_factors(matrix, 1, energy=0.99)
    assert A.shape[0] == 1 + int((S.square().cumsum(0) < 0.99 * S.square().sum()).sum())
