"""Nonlinear merges into a model's weights equal their papers' definitions on the dense deltas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine.adapter import read, write
from lora_engine.config import from_mapping
from lora_engine.errors import SpecError
from lora_engine.exporting.config import ExportSpec
from lora_engine.exporting.export import export
from lora_engine.merging.config import WeightedAdapter
from lora_engine.quantized import nf4
from tests.lora_engine.exporting.made import dense, make_adapter, relative, tensors, weighted
from tests.tiny_model import make_tiny_gpt2, make_tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


def made(base: Path, folder: Path) -> list[WeightedAdapter]:
    return [
        weighted(make_adapter(folder / "a", base, 1, rank=3), 1.5),
        weighted(make_adapter(folder / "b", base, 2, rank=2), -0.5),
        make_adapter(folder / "c", base, 3, rank=2, targets=["q_proj"]),
    ]


def merge(base: Path, sources: list[WeightedAdapter], output: Path, layout: str = "merged", **options: Any) -> Any:
    values = {
        "base_model": str(base), "output": str(output), "export": {"format": layout}, "merge": options,
        "adapters": [{"path": item.path, "weight": item.weight} for item in sources],
    }  # fmt: skip
    return export(from_mapping(ExportSpec, values))


def ties(deltas: list[Tensor], density: float) -> Tensor:
    """TIES-merging (arXiv 2306.01708): trim, elect by mass, mean of those that agree; fp64."""
    trimmed = []
    for delta in deltas:
        kept = max(1, int(density * delta.numel()))
        cutoff = delta.abs().flatten().sort(descending=True).values[kept - 1]
        trimmed.append(torch.where(delta.abs() >= cutoff, delta, 0))
    stacked = torch.stack(trimmed)
    elected = torch.where(stacked.sum(dim=0) >= 0, 1.0, -1.0)
    agree = (stacked.sign() == elected) & (stacked != 0)
    return (stacked * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


@pytest.mark.parametrize("chunk", [262_144, 96])
def test_ties_is_the_papers(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(nf4, "_CHUNK", chunk)
    sources = made(base, tmp_path)
    metrics = merge(base, sources, tmp_path / "out", method="ties", density=0.3)
    before, after = tensors(base), tensors(tmp_path / "out")
    apart = [dense([item]) for item in sources]
    for module in apart[0]:
        want = ties([deltas[module] for deltas in apart if module in deltas], 0.3)
        # An entry on the border of the trim may fall to the other side in fp32.
        error = (after[f"{module}.weight"].double() - before[f"{module}.weight"].double() - want).abs()
        assert (error > 1e-5).sum() <= 1
    assert metrics["parity"]["max_gap"] < 1e-4
    assert metrics["rounding"]["total"] < 1e-5


def test_a_random_choice_is_the_same_in_any_order(base: Path, tmp_path: Path) -> None:
    sources = made(base, tmp_path)
    for name, given in (("one", sources), ("two", sources[::-1])):
        merge(base, given, tmp_path / name, method="dare_ties", density=0.5, seed=3)
    merge(base, sources, tmp_path / "other", method="dare_ties", density=0.5, seed=4)
    one, two, other = (tensors(tmp_path / name) for name in ("one", "two", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("method", ["magnitude_prune", "dare_linear", "breadcrumbs", "sce", "ties"])
def test_all_of_one_adapter_is_that_adapter(base: Path, tmp_path: Path, method: str) -> None:
    """With density 1 and nothing to disagree with, every method is the plain sum."""
    item = make_adapter(tmp_path / "a", base, 1)
    extra = {"gamma": 0.0} if method == "breadcrumbs" else {}
    merge(base, [item], tmp_path / "out", method=method, density=1.0, **extra)
    before, after = tensors(base), tensors(tmp_path / "out")
    for module, delta in dense([item]).items():
        assert relative(after[f"{module}.weight"], before[f"{module}.weight"].double() + delta) < 1e-6


def test_an_adapter_that_is_zero_somewhere_has_no_say_there(base: Path, tmp_path: Path) -> None:
    """As where a loader wants all layers of a kind: SCE's energies would count it otherwise."""
    alone = make_adapter(tmp_path / "a", base, 1, targets=["q_proj", "v_proj"])
    other = make_adapter(tmp_path / "b", base, 2, targets=["q_proj"])
    padded = make_adapter(tmp_path / "c", base, 2, targets=["q_proj", "v_proj"])
    found = read(Path(padded.path))
    for name, weights in found.weights.items():
        weights.B[:] = read(Path(other.path)).weights[name].B if "q_proj" in name else 0
        weights.A[:] = read(Path(other.path)).weights[name].A if "q_proj" in name else weights.A
    write(found, Path(padded.path), lineage={})
    for name, second in (("plain", other), ("padded", padded)):
        merge(base, [alone, second], tmp_path / name, method="sce", density=0.5)
    plain, got = tensors(tmp_path / "plain"), tensors(tmp_path / "padded")
    assert all(torch.equal(plain[name], got[name]) for name in plain if "v_proj" in name)


def test_cutoffs_over_whole_adapters_differ_from_those_of_modules(base: Path, tmp_path: Path) -> None:
    sources = made(base, tmp_path)
    for scope in ("module", "adapter"):
        merge(base, sources, tmp_path / scope, method="ties", density=0.3, scope=scope)
    module, adapter = tensors(tmp_path / "module"), tensors(tmp_path / "adapter")
    assert not all(torch.equal(module[name], adapter[name]) for name in module)


def test_weights_that_lie_the_other_way_round(tmp_path: Path) -> None:
    base = make_tiny_gpt2(tmp_path / "base")
    sources = [make_adapter(tmp_path / str(seed), base, seed) for seed in (1, 2)]
    metrics = merge(base, sources, tmp_path / "out", method="della", density=0.5)
    assert metrics["parity"]["max_gap"] < 1e-4


def test_into_a_gguf_model(base: Path, tmp_path: Path) -> None:
    metrics = merge(base, made(base, tmp_path), tmp_path / "out", "gguf-merged", method="ties", density=0.3)
    assert metrics["parity"]["max_gap"] < 0.01
    assert metrics["method"] == "ties"


@pytest.mark.parametrize(("layout", "options", "field"), [
    ("peft", {"method": "ties"}, "merge.method"),
    ("merged", {"method": "slerp"}, "merge.method"),
    ("merged", {"method": "ties", "rank": 4}, "merge.rank"),
    ("merged", {"dtype": "fp16"}, "merge.dtype"),
])  # fmt: skip
def test_what_an_export_cannot_merge(base: Path, tmp_path: Path, layout: str, options: Any, field: str) -> None:
    with pytest.raises(SpecError) as error:
        merge(base, [WeightedAdapter(path=str(tmp_path))], tmp_path / "out", layout, **options)
    assert error.value.field == field
