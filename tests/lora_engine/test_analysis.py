import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_engine import adapter, analysis_subspaces
from lora_engine.adapter import Adapter, LoraWeights
from lora_engine.analysis import analyze
from lora_engine.analysis_config import AnalyzeConfig, AnalyzeSpec
from lora_engine.errors import AdapterError, SpecError
from lora_engine.fields import from_mapping
from lora_engine.merging.config import WeightedAdapter
from lora_engine.merging.factors import Factors
from tests.lora_engine import peft_adapters
from tests.lora_engine.merging.adapters import SHAPES, Drawn
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

ADAPTERS = [
    (Drawn(seed=1, rank=3, rslora=True), 1.0),
    (Drawn(seed=2, rank=2, alpha=4.0, ranks={"q_proj": 5}), -0.5),
    (Drawn(seed=3, rank=4, targets=("q_proj",)), 2.0),
    (Drawn(seed=4, rank=1, targets=("down_proj",)), 1.0),
]


def written(folder: Path, **settings: Any) -> AnalyzeSpec:
    sources = [
        WeightedAdapter(path=str(item.write(folder / f"adapter {index}")), weight=weight)
        for index, (item, weight) in enumerate(ADAPTERS)
    ]
    return AnalyzeSpec(**{"adapters": sources, "output": str(folder / "out"), **settings})


def report_of(spec: AnalyzeSpec) -> dict[str, Any]:
    analyze(spec)
    report: dict[str, Any] = json.loads((Path(spec.output) / "report.json").read_text())
    return report


def dense(modules: list[str]) -> np.ndarray[Any, Any]:
    """The weighted deltas of the test's adapters (k × entries), zeros where one has no such module."""
    rows = []
    for item, weight in ADAPTERS:
        deltas = item.deltas()
        rows.append(np.concatenate([weight * deltas.get(name, np.zeros(SHAPES[name])).ravel() for name in modules]))
    return np.stack(rows)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return report_of(written(tmp_path_factory.mktemp("analysis"), analyze=AnalyzeConfig(density=0.3)))


@pytest.mark.parametrize("layer", [None, "model.layers.0", "model.layers.1"])
def test_cosines_norms_and_their_ratio_are_those_of_the_dense_deltas(report: dict[str, Any], layer: str | None) -> None:
    said = report["total"] if layer is None else report["layers"][layer]
    X = dense([name for name in SHAPES if layer is None or name.startswith(layer)])
    norms = np.linalg.norm(X, axis=1)
    np.testing.assert_allclose(said["norms"], norms, rtol=1e-10)
    np.testing.assert_allclose(said["cosines"], X @ X.T / np.outer(norms, norms), atol=1e-10)
    assert said["norm_ratio"] == pytest.approx(np.linalg.norm(X.sum(0)) / np.linalg.norm(norms), rel=1e-10)


def test_principal_angles_are_those_between_the_spaces_of_the_dense_deltas(report: dict[str, Any]) -> None:
    for name, said in report["modules"].items():
        places = [place for place, (item, _) in enumerate(ADAPTERS) if name in item.deltas()]
        found = [ADAPTERS[place][0].deltas()[name] for place in places]
        assert said["adapters"] == places
        for side in ("columns", "rows"):
            bases = []
            for delta in found:
                left, values, right = np.linalg.svd(delta)
                rank = int((values > 1e-9).sum())
                bases.append(left[:, :rank] if side == "columns" else right[:rank].T)
            for (i, j), angles in zip(combinations(range(len(found)), 2), said["angles"][side], strict=True):
                degrees = np.degrees(np.arccos(np.clip(np.linalg.svd(bases[i].T @ bases[j])[1], 0, 1)))
                assert angles["pair"] == [places[i], places[j]]
                expected = {
                    "smallest": degrees.min(),
                    "median": np.median(degrees),
                    "largest": degrees.max(),
                    "overlap": np.mean(np.cos(np.radians(degrees)) ** 2),
                }
                assert {key: angles[key] for key in expected} == pytest.approx(expected, abs=1e-5)


def test_directions_that_change_nothing_have_no_angles() -> None:
    random = np.random.default_rng(0)
    B, A = random.standard_normal((9, 4)), random.standard_normal((4, 7))
    B[:, 3] = B[:, 2]
    A[0] = A[1] = 0
    found = analysis_subspaces.spaces(Factors(B, A, np.ones(4)), slice(0, 4))
    left, values, right = np.linalg.svd(B @ A)
    rank = int((values > 1e-9).sum())
    assert rank == found.columns.shape[1] == found.rows.shape[1] == 1
    assert analysis_subspaces.angles(found.columns, left[:, :rank]) == pytest.approx([0], abs=1e-6)
    assert analysis_subspaces.angles(found.rows, right[:rank].T) == pytest.approx([0], abs=1e-6)


def test_signs_and_losses_are_those_of_trimming_every_module(report: dict[str, Any]) -> None:
    both, conflicts = np.zeros((4, 4)), np.zeros((4, 4))
    energy, kept, elected = np.zeros(4), np.zeros(4), np.zeros(4)
    for name in SHAPES:
        X = dense([name])
        trimmed = np.zeros_like(X)
        for row, values in zip(trimmed, X, strict=True):
            largest = np.argsort(-abs(values))[: max(1, int(0.3 * len(values)))]
            row[largest] = values[largest]
        signs = np.sign(trimmed)
        both += (signs != 0).astype(float) @ (signs != 0).T
        conflicts += ((signs != 0).astype(float) @ (signs != 0).T - signs @ signs.T) / 2
        chosen = np.where(trimmed.sum(0) >= 0, 1, -1)
        energy += (X**2).sum(1)
        kept += (trimmed**2).sum(1)
        elected += (trimmed**2 * (signs == chosen)).sum(1)
    said = report["total"]["signs"]
    assert said["conflicts"][2][3] is None  # no module in common
    found = np.array(said["conflicts"], dtype=float)
    np.testing.assert_allclose(found[both > 0], conflicts[both > 0] / both[both > 0], atol=1e-12)
    np.testing.assert_allclose(said["trim_loss"], 1 - kept / energy, rtol=1e-5)
    np.testing.assert_allclose(said["election_loss"], 1 - elected / kept, rtol=1e-5)


def test_row_blocks_of_any_size_give_the_same_signs(
    report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_engine.analysis_signs._BLOCK", 40)
    again = report_of(written(tmp_path, analyze=AnalyzeConfig(density=0.3)))
    assert again["total"]["signs"]["conflicts"] == report["total"]["signs"]["conflicts"]
    assert again["total"]["signs"]["trim_loss"] == pytest.approx(report["total"]["signs"]["trim_loss"], rel=1e-5)


def test_the_same_report_and_pictures_come_out_again(tmp_path: Path) -> None:
    names = ["legal $^{$ 2 €", "medical " * 9, "code\n", ""]
    for folder in ("a", "b"):
        spec = written(tmp_path / folder, names=names)
        metrics = analyze(spec)
        assert metrics["modules"] == 4
    first, second = ({item.name: item.read_bytes() for item in (tmp_path / x / "out").iterdir()} for x in "ab")
    assert sorted(first) == ["cosine.png", "cosine.svg", "layers.png", "layers.svg", "report.json"]
    assert first == second
    assert first["cosine.png"].startswith(b"\x89PNG")
    assert [item["name"] for item in json.loads(first["report.json"])["adapters"]] == names


def test_one_adapter_and_one_without_signs_have_a_report_too(tmp_path: Path) -> None:
    spec = AnalyzeSpec(
        adapters=[WeightedAdapter(path=str(Drawn().write(tmp_path / "a")))],
        output=str(tmp_path / "out"),
        analyze=AnalyzeConfig(signs=False),
    )
    total = report_of(spec)["total"]
    assert (total["cosines"], total["norm_ratio"], "signs" in total) == ([[pytest.approx(1)]], pytest.approx(1), False)


def test_layers_come_in_their_order_and_adapters_of_one_name_are_told_apart(tmp_path: Path) -> None:
    weights = {f"model.layers.{layer}.q_proj": LoraWeights(torch.ones(1, 3), torch.ones(3, 1)) for layer in (10, 9, 0)}
    for parent, alpha in (("first", 1), ("second", 2)):
        made = Adapter(weights, 1, alpha, base_model_name="tests/base", base_digest="b" * 64)
        adapter.write(made, tmp_path / parent / "adapter", lineage={})
    paths = [WeightedAdapter(path=str(tmp_path / parent / "adapter")) for parent in ("first", "second")]
    report = report_of(AnalyzeSpec(adapters=paths, output=str(tmp_path / "out")))
    assert list(report["layers"]) == ["model.layers.0", "model.layers.9", "model.layers.10"]
    assert [item["name"] for item in report["adapters"]] == ["first/adapter", "second/adapter"]


def zeros(folder: Path) -> Path:
    weights = {name: LoraWeights(torch.zeros(2, width), torch.zeros(out, 2)) for name, (out, width) in SHAPES.items()}
    adapter.write(Adapter(weights, 2, 2, base_model_name="tests/base", base_digest="b" * 64), folder, lineage={})
    return folder


def test_an_adapter_of_zeros_is_said_to_have_no_direction(tmp_path: Path) -> None:
    folders = [zeros(tmp_path / "zeros"), Drawn().write(tmp_path / "a")]
    report = report_of(
        AnalyzeSpec(adapters=[WeightedAdapter(path=str(item)) for item in folders], output=str(tmp_path / "out"))
    )
    assert report["total"]["cosines"] == [[None, None], [None, pytest.approx(1)]]
    assert report["total"]["signs"]["trim_loss"][0] is None
    assert report["modules"]["model.layers.0.mlp.down_proj"]["angles"]["rows"][0]["smallest"] is None


@pytest.mark.parametrize("tied", [True, False])
def test_deltas_are_measured_against_the_base_model(tied: bool, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", tied=tied)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    shapes = {"model.layers.0.mlp.down_proj": (32, 64), "lm_head": (len(model.lm_head.weight), 32)}
    weights = {name: LoraWeights(torch.randn(2, width), torch.randn(out, 2)) for name, (out, width) in shapes.items()}
    source = Adapter(weights, 2, 4)
    adapter.write(source, tmp_path / "a", lineage={})
    sources = [WeightedAdapter(path=str(tmp_path / "a"))]
    report = report_of(AnalyzeSpec(adapters=sources, output=str(tmp_path / "out"), base_model=str(base)))
    for name in shapes:
        expected = adapter.delta(source, name).norm() / model.get_submodule(name).weight.double().norm()
        assert report["modules"][name]["of_base"] == [pytest.approx(expected.item(), rel=1e-6)]
    other = make_tiny_gpt2(tmp_path / "gpt2")
    with pytest.raises(AdapterError, match="of another base model"):
        analyze(AnalyzeSpec(adapters=sources, output=str(tmp_path / "out"), base_model=str(other)))


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    spec = written(tmp_path)
    with pytest.raises(SpecError, match=r"adapters\[1\]: the same adapter as adapters\[0\]"):
        analyze(AnalyzeSpec(adapters=[spec.adapters[0], spec.adapters[0]], output=spec.output))
    other = peft_adapters.save_random(tmp_path / "other", 1, r=2, target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=r"different base models|is 32"):
        analyze(AnalyzeSpec(adapters=[spec.adapters[0], WeightedAdapter(path=str(other))], output=spec.output))
    with pytest.raises(SpecError, match="density"):
        from_mapping(AnalyzeConfig, {"density": 0})
    with pytest.raises(SpecError, match="names"):
        written(tmp_path / "again", names=["one"])
    assert not Path(spec.output).exists()


def test_a_tell_that_raises_leaves_nothing(tmp_path: Path) -> None:
    spec, told = written(tmp_path), []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analyze(spec, tell)
    assert told == [(0, 4), (1, 4), (2, 4)]
    assert not Path(spec.output).exists()
