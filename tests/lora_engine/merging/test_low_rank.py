"""Compression against numpy's dense decomposition in float64, well and badly conditioned, and its budgets."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.errors import SpecError
from lora_engine.merging.low_rank import decompose, ranks_within
from tests.lora_engine.merging.adapters import DOWN0, SHAPES, Drawn, best, certificate, dense, merge_of, weighted_sum

THREE = [(Drawn(seed=1, alpha=1.0), 1.0), (Drawn(seed=2, rslora=True), -1.2), (Drawn(seed=3, rank=2), 0.1)]


def random(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 30), st.integers(1, 30), st.integers(1, 12), st.integers(1, 12))
def test_values_and_best_factors(seed: int, out: int, width: int, ranks: int, kept: int) -> None:
    B, A, scale = random(seed, out, ranks), random(seed + 1, ranks, width), np.linspace(-2, 3, ranks)
    found = decompose(B, A, scale)
    D = (B.astype(float) * scale) @ A
    values = np.linalg.svd(D, compute_uv=False)[: len(found.values)]
    np.testing.assert_allclose(found.values, values, atol=1e-11 * max(values, default=1))
    left, right = found.factors(kept)
    expected = best(D, kept)
    assert np.linalg.norm(left @ right - expected) <= 1e-9 * np.linalg.norm(D)
    np.testing.assert_allclose(left.T @ left, right @ right.T, atol=1e-9 * max(values, default=1))  # √S on both sides
    beyond = found.beyond(kept)
    assert beyond.frobenius == pytest.approx(np.linalg.norm(D - expected), abs=1e-10 * float(np.linalg.norm(D)))


def nearly_dependent() -> tuple[Any, Any]:
    B, A = random(0, 40, 8), random(1, 8, 30)
    B[:, 1] = B[:, 0] * (1 + 1e-6)
    A[2] = A[3]
    return B, A


def unlike_lengths() -> tuple[Any, Any]:
    B, A = random(0, 40, 8), random(1, 8, 30)
    B[:, 1] *= 1e8
    A[1] *= 1e-8
    B[:, 2] *= 1e-8
    A[2] *= 1e8
    return B, A


def padded() -> tuple[Any, Any]:
    B, A = random(0, 40, 8), random(1, 8, 30)
    B[:, 3] = 0
    A[5:] = 0
    return B, A


def two_versions(apart: float = 1e-3) -> tuple[Any, Any]:
    """What differs between them is so much of either."""
    B, A = random(0, 40, 4), random(1, 4, 30)
    later = (B + apart * random(2, 40, 4)).astype(np.float32), (A + apart * random(3, 4, 30)).astype(np.float32)
    return np.concatenate([B, -later[0]], axis=1), np.concatenate([A, later[1]])


def nearly_the_same() -> tuple[Any, Any]:
    return two_versions(3e-6)


@pytest.mark.parametrize("make", [nearly_dependent, unlike_lengths, padded, two_versions, nearly_the_same])
def test_bad_conditions(make: Any) -> None:
    B, A = make()
    found = decompose(B, A, np.ones(8))
    D = B.astype(float) @ A
    left, right = found.factors(2)
    assert np.linalg.norm(left @ right - best(D, 2)) <= 1e-7 * np.linalg.norm(D)
    assert found.beyond(2).frobenius == pytest.approx(np.linalg.norm(D - best(D, 2)), rel=1e-6)


def test_a_module_of_nothing_but_zeros() -> None:
    found = decompose(np.zeros((5, 3), np.float32), random(0, 3, 4), np.ones(3))
    left, right = found.factors(2)
    assert left.shape == (5, 0)
    assert right.shape == (0, 4)
    assert found.beyond(0).frobenius == 0


def test_no_dense_delta_is_formed() -> None:
    """It would take 80 GB here; PEFT decomposes it densely."""
    B, A = random(0, 100_000, 6), random(1, 6, 100_000)
    found = decompose(B, A, np.ones(6))
    left, right = np.linalg.qr(B.astype(float))[1], np.linalg.qr(A.astype(float).T)[1]
    np.testing.assert_allclose(found.values, np.linalg.svd(left @ right.T)[1], rtol=1e-10)
    assert found.factors(2)[0].shape == (100_000, 2)


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_the_fewest_ranks_that_keep_the_energy(energy: float, tmp_path: Path) -> None:
    merge_of(tmp_path, THREE, method="linear", energy=energy)
    found, config = dense(tmp_path / "out"), json.loads((tmp_path / "out/adapter_config.json").read_text())
    for module, value in weighted_sum(THREE).items():
        squares = np.linalg.svd(value, compute_uv=False) ** 2
        needed = 1 + int((np.cumsum(squares) < energy * squares.sum() * (1 - 1e-9)).sum())
        assert certificate(tmp_path / "out")["modules"][module]["rank"] == needed
        assert np.linalg.norm(found[module] - best(value, needed)) <= 1e-5 * np.linalg.norm(value)
    assert config["target_modules"] == sorted(SHAPES)
    assert all(key.startswith("^model\\.layers\\.") for key in config["rank_pattern"])


@pytest.mark.parametrize("budget", [2600, 4000, 6000, 9000, 30_000])
def test_bytes_go_where_they_keep_most(budget: int, tmp_path: Path) -> None:
    """Against every other distribution of ranks whose file is no larger."""
    merge_of(tmp_path, THREE, method="linear", max_bytes=budget)
    size = (tmp_path / "out/adapter_model.safetensors").stat().st_size
    assert size <= budget
    squares = {name: np.linalg.svd(value, compute_uv=False) ** 2 for name, value in weighted_sum(THREE).items()}
    modules = certificate(tmp_path / "out")["modules"]
    ranks = {name: modules[name]["rank"] for name in squares}
    used = sum(ranks[name] * sum(SHAPES[name]) for name in ranks)
    kept = sum(squares[name][: ranks[name]].sum() for name in ranks)
    for other in product(range(9), repeat=len(ranks)):
        others = dict(zip(ranks, other, strict=True))
        if sum(others[name] * sum(SHAPES[name]) for name in ranks) <= used - 40:  # the last rank may not fit
            assert sum(squares[name][: others[name]].sum() for name in ranks) <= kept * (1 + 1e-9)
    found = dense(tmp_path / "out")
    assert set(found) == {name for name in ranks if ranks[name]}
    for name in found:
        value = weighted_sum(THREE)[name]
        assert np.linalg.norm(found[name] - best(value, ranks[name])) <= 1e-5 * np.linalg.norm(value)


def test_what_is_kept_is_counted_in_squares() -> None:
    """169 for 40 numbers is better than 100 for 28, though 13 for 40 is not better than 10 for 28."""
    shapes = {"cheap": SimpleNamespace(inputs=16, outputs=12), "dear": SimpleNamespace(inputs=24, outputs=16)}
    config = SimpleNamespace(max_bytes=4 * 40 + 400, options={"dtype": "fp32"})
    plan: Any = SimpleNamespace(config=config, modules=shapes)
    assert ranks_within(plan, {"cheap": np.array([10.0]), "dear": np.array([13.0])}) == {"cheap": 0, "dear": 1}


def test_a_budget_for_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="not one rank") as caught:
        merge_of(tmp_path, THREE, method="linear", max_bytes=100)
    assert caught.value.field == "max_bytes"


@pytest.mark.parametrize(
    ("options", "rank", "exact"),
    [
        ({"method": "stack"}, 16, True),
        ({"method": "linear", "rank": 5}, 8, False),
        ({"method": "linear", "rank": 8}, 8, False),
        ({"method": "ties"}, 16, False),
    ],
)
def test_ranks_that_vllm_takes(options: dict[str, Any], rank: int, exact: bool, tmp_path: Path) -> None:
    metrics = merge_of(tmp_path, THREE, fit="vllm", **options)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert metrics["rank"] == config["r"] == config["lora_alpha"] == rank
    assert (metrics["certificate"]["sum_frobenius"] < 1e-6) == exact


def test_what_is_above_all_of_vllms_ranks(tmp_path: Path) -> None:
    pairs = [(Drawn(seed=seed, rank=300), 1.0) for seed in (1, 2)]
    with pytest.raises(SpecError, match=r"rank 600 .* vLLM takes at most 512; use the method linear"):
        merge_of(tmp_path / "stack", pairs, fit="vllm")
    metrics = merge_of(tmp_path / "linear", pairs, method="linear", fit="vllm", rank=512)
    assert metrics["rank"] <= 512
    assert metrics["certificate"]["frobenius"] <= 1e-6  # the modules themselves have fewer


def test_linear_without_a_size_has_the_largest_rank_of_its_sources(tmp_path: Path) -> None:
    metrics = merge_of(tmp_path, THREE, method="linear")
    assert metrics["rank"] == 4
    value = weighted_sum(THREE)[DOWN0]
    error = np.linalg.norm(dense(tmp_path / "out")[DOWN0] - best(value, 4))
    assert error <= 1e-5 * np.linalg.norm(value)
