"""Projections and differences of adapters, against dense matrices in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_engine import safetensors_file
from lora_engine.adapter_header import WEIGHTS
from lora_engine.errors import SpecError
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from tests.lora_engine.merging.adapters import SHAPES, Drawn, dense, merge_of

FIRST = Drawn(seed=1, rank=3)
OTHERS = [Drawn(seed=2, rank=2, rslora=True), Drawn(seed=2, rank=2), Drawn(seed=3, rank=1)]  # two span the same


def basis(matrix: Any) -> Any:
    U, S, _ = np.linalg.svd(matrix, full_matrices=False)
    return U[:, 1e-9 * S[0] < S]


@pytest.mark.parametrize("subspace", ["span", "column", "row", "both"])
def test_what_lies_in_the_subspace_is_gone(subspace: str, tmp_path: Path) -> None:
    pairs = [(FIRST, -2.0), *((other, 1.0) for other in OTHERS)]
    metrics = merge_of(tmp_path, pairs, method="project_out", subspace=subspace)
    found = dense(tmp_path / "out")
    for module in SHAPES:
        D = -2 * FIRST.deltas()[module]
        others = [other.deltas()[module] for other in OTHERS]
        U, V = basis(np.concatenate(others, axis=1)), basis(np.concatenate(others).T)
        if subspace == "span":
            flat = np.stack([other.reshape(-1) for other in others], axis=1)
            shares = np.linalg.lstsq(flat, D.reshape(-1), rcond=1e-9)[0]
            expected = D - (flat @ shares).reshape(D.shape)
        else:
            left = np.eye(len(D)) - U @ U.T if subspace != "row" else np.eye(len(D))
            right = np.eye(D.shape[1]) - V @ V.T if subspace != "column" else np.eye(D.shape[1])
            expected = left @ D @ right
        assert 0 < np.linalg.norm(expected) < 0.99999 * np.linalg.norm(D)
        assert np.linalg.norm(found[module] - expected) <= 1e-6 * np.linalg.norm(D)
    assert metrics["rank"] == (8 if subspace == "span" else 3)
    assert metrics["certificate"]["frobenius"] <= 1e-6


def test_a_column_that_reaches_nothing_is_in_no_subspace(tmp_path: Path) -> None:
    """B's last column meets a row of zeros in A: it is no column of B·A."""
    other = Drawn(seed=2, rank=2).write(tmp_path / "other")
    path = other / WEIGHTS
    arrays = {
        name: safetensors_file.read_array(path, item) for name, item in safetensors_file.read_header(path).items()
    }
    for name, array in arrays.items():
        if "lora_A" in name:
            array[-1] = 0
    safetensors_file.write(path, arrays, {})
    sources = [WeightedAdapter(path=str(folder)) for folder in (FIRST.write(tmp_path / "first"), other)]
    merge(MergeSpec(adapters=sources, output=str(tmp_path / "out"), method="project_out", subspace="column"))
    for module, (_, B) in Drawn(seed=2, rank=2).factors().items():
        found, before = dense(tmp_path / "out")[module], FIRST.deltas()[module]
        gone = B[:, 0].astype(float) / np.linalg.norm(B[:, 0])
        np.testing.assert_allclose(found, before - np.outer(gone, gone @ before), atol=1e-5)


def test_modules_that_the_others_lack_stay_as_they_are(tmp_path: Path) -> None:
    pairs = [(FIRST, 1.0), (Drawn(seed=2, targets=("q_proj",)), 1.0)]
    for subspace in ("span", "both"):
        merge_of(tmp_path / subspace, pairs, method="project_out", subspace=subspace)
        found = dense(tmp_path / subspace / "out")
        for module in SHAPES:
            same = np.linalg.norm(found[module] - FIRST.deltas()[module]) <= 1e-6 * np.linalg.norm(found[module])
            assert same == module.endswith("down_proj")


def test_modules_that_only_the_others_have_are_left_out(tmp_path: Path) -> None:
    pairs = [(Drawn(seed=2, targets=("q_proj",)), 1.0), (FIRST, 1.0)]
    merge_of(tmp_path, pairs, method="project_out")
    assert set(dense(tmp_path / "out")) == {name for name in SHAPES if name.endswith("q_proj")}


@pytest.mark.parametrize(("weights", "field"), [((1.0, 2.0), "adapters[1].weight"), ((0.0, 1.0), "adapters[0].weight")])
def test_weights_that_mean_nothing_are_refused(weights: tuple[float, float], field: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as caught:
        merge_of(tmp_path, list(zip((FIRST, OTHERS[0]), weights, strict=True)), method="project_out")
    assert caught.value.field == field


def test_the_difference_of_two_versions(tmp_path: Path) -> None:
    """And scaling, negating and adding: a stack with signs."""
    later = Drawn(seed=1, rank=3, alpha=8.1)
    merge_of(tmp_path, [(later, 1.0), (FIRST, -1.0)])
    for module, value in dense(tmp_path / "out").items():
        expected = later.deltas()[module] - FIRST.deltas()[module]
        assert np.linalg.norm(value - expected) <= 1e-6 * np.linalg.norm(FIRST.deltas()[module])
