"""Merges by angles against the same formulas on dense vectors in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine.errors import AdapterError, SpecError
from lora_engine.merging.geometry import coefficients
from tests.lora_engine.merging.adapters import Q0, SHAPES, Drawn, dense, merge_of

# Adapters that have something in common: the same factors with another alpha, and others.
PAIRS = [
    (Drawn(seed=1), 0.7),
    (Drawn(seed=1, alpha=3.0, alphas={"q_proj": 40.0}), 1.2),
    (Drawn(seed=2, rank=3, rslora=True), 0.5),
]


def slerp(vectors: Any, weights: Any) -> Any:
    """Shoemake's formula, with the angle between the directions, as mergekit's nuslerp."""
    (first, second), share = vectors, weights[1] / sum(weights)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = np.arccos(np.clip(cosine, -1, 1))
    return (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / np.sin(angle)


def karcher(vectors: Any, weights: Any) -> Any:
    """The point on the sphere whose tangents to all directions cancel, by small steps."""
    lengths = np.array([np.linalg.norm(vector) for vector in vectors])
    directions, shares = np.array(vectors) / lengths[:, None], np.array(weights) / sum(weights)
    mean = shares @ directions
    mean /= np.linalg.norm(mean)
    for _ in range(300):
        tangent = np.zeros_like(mean)
        for share, direction in zip(shares, directions, strict=True):
            cosine = np.clip(direction @ mean, -1, 1)
            across = direction - cosine * mean
            if np.linalg.norm(across) > 1e-12:
                tangent += share * np.arccos(cosine) * across / np.linalg.norm(across)
        mean = mean + 0.2 * tangent
        mean /= np.linalg.norm(mean)
    return mean * (shares @ lengths)


def model_stock(vectors: Any, weights: Any) -> Any:
    scaled = [weight * vector for weight, vector in zip(weights, vectors, strict=True)]
    count = len(scaled)
    cosines = [
        first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
        for index, first in enumerate(scaled)
        for second in scaled[:index]
    ]
    cosine = max(float(np.mean(cosines)), 0)
    return count * cosine / (1 + (count - 1) * cosine) * np.mean(scaled, axis=0)


DENSE = {"slerp": slerp, "karcher": karcher, "model_stock": model_stock}


@pytest.mark.parametrize("scope", ["module", "adapter"])
@pytest.mark.parametrize("method", DENSE)
def test_against_dense_vectors(method: str, scope: str, tmp_path: Path) -> None:
    pairs = PAIRS[1:] if method == "slerp" else PAIRS
    metrics = merge_of(tmp_path, pairs, method=method, scope=scope)
    found = dense(tmp_path / "out")
    weights = [weight for _, weight in pairs]
    deltas = [item.deltas() for item, _ in pairs]
    if scope == "adapter":
        whole = DENSE[method]([np.concatenate([item[name].reshape(-1) for name in SHAPES]) for item in deltas], weights)
        result = np.concatenate([found[name].reshape(-1) for name in SHAPES])
        assert np.linalg.norm(result - whole) <= 2e-6 * np.linalg.norm(whole)
    else:
        for name in SHAPES:
            expected = DENSE[method]([item[name].reshape(-1) for item in deltas], weights)
            assert np.linalg.norm(found[name].reshape(-1) - expected) <= 2e-6 * np.linalg.norm(expected)
    assert metrics["certificate"]["frobenius"] <= 1e-6
    assert metrics["certificate"]["sum_frobenius"] > 1e-3


def test_where_one_adapter_alone_has_a_module_it_stays_as_it_is(tmp_path: Path) -> None:
    pairs = [(Drawn(seed=1), 1.0), (Drawn(seed=2, targets=("down_proj",)), 3.0)]
    merge_of(tmp_path, pairs, method="slerp")
    delta = pairs[0][0].deltas()[Q0]
    assert np.linalg.norm(dense(tmp_path / "out")[Q0] - delta) <= 1e-6 * np.linalg.norm(delta)


def test_on_one_line_the_arc_is_the_line() -> None:
    parallel = np.array([[1.0, 2.0], [2.0, 4.0]])
    np.testing.assert_allclose(coefficients("slerp", parallel, np.array([1.0, 3.0])), [0.25, 0.75])


def test_opposite_directions_have_no_mean() -> None:
    opposite = np.array([[1.0, -1.0], [-1.0, 1.0]])
    with pytest.raises(AdapterError, match="opposite directions"):
        coefficients("karcher", opposite, np.ones(2))


def test_a_delta_of_zeros_takes_no_part() -> None:
    inner = np.array([[4.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 1.0]])
    for method in ("karcher", "model_stock"):
        found = coefficients(method, inner, np.array([1.0, 5.0, 2.0]))
        assert found[1] == 0
        np.testing.assert_array_equal(
            found[[0, 2]], coefficients(method, inner[np.ix_([0, 2], [0, 2])], np.array([1.0, 2.0]))
        )
    np.testing.assert_array_equal(coefficients("slerp", inner[:2, :2], np.array([1.0, 2.0])), [1.0, 0.0])
    assert not coefficients("karcher", np.zeros((2, 2)), np.ones(2)).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_the_mean_on_the_sphere_has_the_mean_length(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    vectors, weights = random.standard_normal((count, 20)) + 1, random.uniform(0.1, 2, count)
    found = coefficients("karcher", vectors @ vectors.T, weights) @ vectors
    length = weights / weights.sum() @ np.linalg.norm(vectors, axis=1)
    assert np.linalg.norm(found) == pytest.approx(length, rel=1e-9)
    mean = found / np.linalg.norm(found)
    directions = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    angles = np.arccos(np.clip(directions @ mean, -1, 1))
    across = directions - np.outer(directions @ mean, mean)
    pull = (weights * angles / np.sin(angles)) @ across
    assert np.linalg.norm(pull) <= 1e-9 * weights.sum()


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        (PAIRS, {"method": "slerp"}, "slerp takes at most 2"),
        ([(PAIRS[0][0], 1.0), (PAIRS[2][0], -1.0)], {"method": "slerp"}, "those at .* add up to 0"),
        (
            [(Drawn(targets=("q_proj",)), 1.0), (Drawn(targets=("down_proj",)), -1.0)],
            {"method": "slerp", "scope": "adapter"},
            "those of the adapters add up to 0",
        ),
        ([(PAIRS[0][0], 1.0), (PAIRS[2][0], -1.0)], {"method": "karcher"}, "takes no negative weight"),
    ],
)
def test_refusals(pairs: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        merge_of(tmp_path, pairs, **options)
