"""The nonlinear methods against their definitions on dense float64 tensors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lora_engine.merging import chance
from lora_engine.merging.arrays import Wide
from lora_engine.merging.config import NONLINEAR, OPTIONS
from lora_engine.merging.cutoffs import cutoffs, nth_largest
from lora_engine.merging.nonlinear import combine
from tests.lora_engine.merging import definitions

DIGESTS = ("a", "b", "c")
WEIGHTS = (0.7, -1.3, 2.0)
NAME = "model.layers.0.mlp.up_proj"


def deltas(seed: int = 0, rows: int = 7, columns: int = 11) -> Wide:
    return np.random.default_rng(seed).standard_normal((3, rows, columns)).astype(np.float32).astype(np.float64)


def ours(method: str, values: Wide, rows_at_once: int | None = None, **options: Any) -> Wide:
    """The method on weighted deltas, in blocks of so many rows."""
    X = torch.from_numpy(values * np.array(WEIGHTS)[:, None, None])
    options = {**OPTIONS[method], **options}
    size = rows_at_once or X.shape[1]
    parts = list(zip(DIGESTS, WEIGHTS, strict=True))

    def blocks() -> Iterator[tuple[Sequence[str], Tensor]]:
        return ((DIGESTS, X[:, start : start + size]) for start in range(0, X.shape[1], size))

    found = cutoffs(method, options, blocks)
    merged = [
        combine(method, options, X[:, start : start + size], parts, found, NAME, start)
        for start in range(0, X.shape[1], size)
    ]
    return torch.cat(merged).numpy()


@pytest.mark.parametrize("normalize", ["count", "weight", "none"])
@pytest.mark.parametrize("election", ["mass", "count"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(density: float, election: str, normalize: str) -> None:
    values = deltas()
    expected = definitions.ties(list(values), WEIGHTS, density, election, normalize)
    found = ours("ties", values, density=density, election=election, normalize=normalize)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert np.count_nonzero(found)


@pytest.mark.parametrize(("method", "gamma"), [("magnitude_prune", 0.0), ("breadcrumbs", 0.1)])
def test_pruned_and_added_up(method: str, gamma: float) -> None:
    values = deltas()
    pruned = [definitions.magnitude(delta, 0.4, gamma) for delta in values]
    options: dict[str, Any] = {"density": 0.4} | ({"gamma": gamma} if gamma else {})
    np.testing.assert_allclose(
        ours(method, values, **options),
        sum(weight * item for weight, item in zip(WEIGHTS, pruned, strict=True)),
        rtol=1e-12, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("density", [0.3, 0.7, 1.0])
def test_sce(density: float) -> None:
    values = deltas()
    expected = definitions.sce(values * np.array(WEIGHTS)[:, None, None], density)
    np.testing.assert_allclose(ours("sce", values, density=density), expected, rtol=1e-12, atol=1e-12)


def masks(values: Wide, chances: Wide) -> Wide:
    draws = [chance.uniform(chance.key(3, digest, NAME), 0, *values.shape[1:]).double().numpy() for digest in DIGESTS]
    return (np.stack(draws) < chances) / chances


@pytest.mark.parametrize("normalize", ["count", "weight", "none"])
def test_dare_drops_at_random_and_scales_up(normalize: str) -> None:
    values = deltas()
    dropped = values * masks(values, np.full_like(values, 0.6)) * np.array(WEIGHTS)[:, None, None]
    found = ours("dare_linear", values, density=0.6, seed=3)
    np.testing.assert_allclose(found, dropped.sum(axis=0), rtol=1e-12, atol=1e-12)
    found = ours("dare_ties", values, density=0.6, seed=3, normalize=normalize)
    expected = definitions.disjoint(dropped, WEIGHTS, "mass", normalize)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_della_keeps_large_entries_of_a_row_more_often() -> None:
    values = deltas()
    chances = np.stack([definitions.magprune(delta, 0.6, 0.3) for delta in values])
    assert chances.min() == pytest.approx(0.45)
    assert chances.max() == pytest.approx(0.75)
    dropped = values * masks(values, chances) * np.array(WEIGHTS)[:, None, None]
    found = ours("della", values, density=0.6, epsilon=0.3, seed=3)
    expected = definitions.disjoint(dropped, WEIGHTS, "mass", "count")
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", NONLINEAR)
def test_blocks_of_rows_give_what_the_whole_gives(method: str) -> None:
    values = deltas(rows=9)
    for rows in (1, 2, 4):
        # Energies are sums, whose last digit depends on the order.
        np.testing.assert_allclose(ours(method, values, rows), ours(method, values), rtol=1e-13 * (method == "sce"))


def test_random_numbers_are_uniform_and_independent() -> None:
    key = chance.key(0, "adapter", "tensor")
    draws = chance.uniform(key, 0, 600, 500).double()
    assert 0 <= float(draws.min()) < float(draws.max()) < 1
    assert float(draws.mean()) == pytest.approx(0.5, abs=4 * 12**-0.5 / 300_000**0.5)
    for share in (0.05, 0.5, 0.9):
        assert float((draws < share).double().mean()) == pytest.approx(share, abs=4 * 0.5 / 300_000**0.5)
    for other in (draws[:, 1:], chance.uniform(chance.key(1, "adapter", "tensor"), 0, 600, 500).double()):
        pair = torch.stack([draws[:, : other.shape[1]].flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / 300_000**0.5
    assert abs(float(torch.corrcoef(draws[:2])[0, 1])) < 4 / 500**0.5
    torch.testing.assert_close(chance.uniform(key, 17, 3, 500).double(), draws[17:20])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 2**100, width=32), min_size=1, max_size=60), st.data())
def test_the_nth_largest_is_exact(values: list[float], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, len(values)), min_size=1, max_size=3))
    blocks = [torch.tensor(values[start : start + 7], dtype=torch.float32) for start in range(0, len(values), 7)]
    ordered = sorted((float(np.float32(value)) for value in values), reverse=True)
    twice = [*(("one", block) for block in blocks), *(("double", 2 * block) for block in blocks)]
    asked: list[tuple[int, int]] = []

    def places(size: int, nonzero: int) -> list[int]:
        asked.append((size, nonzero))
        return counts

    found = nth_largest(lambda: twice, places)
    assert found["one"] == [ordered[count - 1] for count in counts]
    assert found["double"] == [2 * ordered[count - 1] for count in counts]
    assert asked == [(len(values), len(values) - ordered.count(0.0))] * 2
