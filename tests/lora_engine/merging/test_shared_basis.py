"""KnOTS and Core Space, factored, against what their papers do with dense matrices."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lora_engine.merging import shared_basis
from lora_engine.merging.arrays import Wide
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.factors import load
from lora_engine.merging.shared_basis import dense_cutoffs, dense_error, exact, share
from lora_engine.merging.sources import Plan, plan, read
from lora_engine.merging.spectral import norms_of_dense
from tests.lora_engine.merging import definitions
from tests.lora_engine.merging.adapters import DOWN0, Q0, Q1, SHAPES, Drawn, certificate, dense, merge_of

PAIRS = [(Drawn(seed=1, rank=3), 0.7), (Drawn(seed=2, rank=2, rslora=True), -1.2), (Drawn(seed=3, rank=4), 0.5)]
WEIGHTS = [weight for _, weight in PAIRS]


def planned(folder: Path, **options: object) -> Plan:
    sources = [
        WeightedAdapter(path=str(item.write(folder / str(index))), weight=weight)
        for index, (item, weight) in enumerate(PAIRS)
    ]
    spec = MergeSpec(adapters=sources, output="none", method="ties", **options)  # type: ignore[arg-type]
    return plan(spec, read(spec))


def in_order(plan: Plan, module: str) -> list[tuple[Drawn, float]]:
    """The pairs in the order of their digests, as the plan has them."""
    found = {source.digest: pair for source, pair in zip(plan.sources, PAIRS, strict=True)}
    return [found[part.digest] for part in plan.modules[module].parts]


@pytest.mark.parametrize("basis", ["knots", "core"])
def test_the_basis_holds_every_delta(basis: str, tmp_path: Path) -> None:
    planning = planned(tmp_path)
    shared = share(load(Q0, planning.modules[Q0], weighted=False), basis)
    for (adapter, _), X in zip(in_order(planning, Q0), shared.X, strict=True):
        delta = adapter.deltas()[Q0]
        found = shared.left @ X if shared.right is None else shared.left @ X @ shared.right
        assert np.linalg.norm(found - delta) <= 1e-13 * np.linalg.norm(delta)
    np.testing.assert_allclose(shared.left.T @ shared.left, np.eye(9), atol=1e-13)


def test_knots_is_the_singular_value_decomposition_of_the_deltas_side_by_side(tmp_path: Path) -> None:
    planning = planned(tmp_path)
    shared = share(load(Q0, planning.modules[Q0], weighted=False), "knots")
    side_by_side = np.concatenate([item.deltas()[Q0] for item, _ in in_order(planning, Q0)], axis=1)
    U, S, Vt = np.linalg.svd(side_by_side, full_matrices=False)
    signs = np.sign((U[:, :9] * shared.left).sum(axis=0))
    np.testing.assert_allclose(shared.left * signs, U[:, :9], atol=1e-12)
    blocks = (S[:9, None] * Vt[:9]).reshape(9, 3, -1).transpose(1, 0, 2)
    np.testing.assert_allclose(shared.X * signs[:, None], blocks, atol=1e-11)


@pytest.mark.parametrize("basis", ["knots", "core"])
def test_directions_that_hold_nothing_are_left_out(basis: str, tmp_path: Path) -> None:
    """They would count as entries of which a share is kept."""
    twins = [Drawn(seed=1).write(tmp_path / "1"), Drawn(seed=1, alpha=3.0).write(tmp_path / "2")]
    spec = MergeSpec(adapters=[WeightedAdapter(path=str(path)) for path in twins], output="none", method="ties")
    planning = plan(spec, read(spec))
    shared = share(load(Q0, planning.modules[Q0]), basis)
    assert planning.modules[Q0].rank == 8
    assert shared.X.shape[:2] == (2, 4)


def dense_knots(deltas: list[Wide], weights: list[float]) -> Wide:
    U, S, Vt = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    kept = 1e-10 * S[0] < S
    blocks = np.split(S[kept, None] * Vt[kept], len(deltas), axis=1)
    return np.asarray(U[:, kept] @ definitions.ties(blocks, weights, 0.5, "mass", "count"))


def dense_core(adapters: list[tuple[Drawn, float]], module: str) -> Wide:
    factors = [item.factors()[module] for item, _ in adapters]
    scales = [item.scaling_of(module) for item, _ in adapters]
    scaled = [scale * B.astype(float) for scale, (_, B) in zip(scales, factors, strict=True)]
    U = np.linalg.svd(np.concatenate(scaled, axis=1), full_matrices=False)[0][:, :9]
    V = np.linalg.svd(np.concatenate([A.astype(float) for A, _ in factors]), full_matrices=False)[2][:9]
    cores = [U.T @ item.deltas()[module] @ V.T for item, _ in adapters]
    return np.asarray(U @ definitions.ties(cores, [weight for _, weight in adapters], 0.5, "mass", "count") @ V)


@pytest.mark.parametrize("basis", ["knots", "core"])
@pytest.mark.parametrize("module", [Q0, DOWN0])
def test_ties_in_the_shared_basis_equals_its_dense_version(module: str, basis: str, tmp_path: Path) -> None:
    planning = planned(tmp_path, basis=basis)
    pairs = in_order(planning, module)
    expected = (
        dense_core(pairs, module)
        if basis == "core"
        else dense_knots([item.deltas()[module] for item, _ in pairs], [weight for _, weight in pairs])
    )
    found = exact(planning, lambda: None)(module)
    product = found.B * found.scale @ found.A
    assert np.linalg.norm(product - expected) <= 1e-12 * np.linalg.norm(expected)
    assert found.scale.size == 9


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("scope", ["module", "adapter"])
def test_the_distance_to_the_dense_method_is_measured(
    scope: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_basis, "_BLOCK", block)
    merge_of(tmp_path / "merge", PAIRS, method="ties", scope=scope, density=0.3)
    found, certified = dense(tmp_path / "merge/out"), certificate(tmp_path / "merge/out")
    deltas = {module: [item.deltas()[module] for item, _ in PAIRS] for module in SHAPES}
    for module, (out, width) in SHAPES.items():
        if scope == "module":
            expected = definitions.ties(deltas[module], WEIGHTS, 0.3, "mass", "count")
        else:  # the whole adapter is trimmed at once
            flat = [np.concatenate([deltas[name][index].reshape(-1) for name in SHAPES]) for index in range(3)]
            start = sum(SHAPES[name][0] * SHAPES[name][1] for name in list(SHAPES)[: list(SHAPES).index(module)])
            whole = [definitions.magnitude(item[None], 0.3)[0, start : start + out * width] for item in flat]
            stacked = np.stack([w * item.reshape(out, width) for w, item in zip(WEIGHTS, whole, strict=True)])
            expected = definitions.disjoint(stacked, WEIGHTS, "mass", "count")
        error = found[module] - expected
        item = certified["modules"][module]
        assert item["dense_frobenius"] == pytest.approx(np.linalg.norm(error) / np.linalg.norm(expected), abs=1e-5)
        assert item["dense_spectral"] == pytest.approx(np.linalg.norm(error, 2) / np.linalg.norm(expected, 2), abs=1e-5)


def test_the_dense_result_is_measured_with_zero_distance_to_itself(tmp_path: Path) -> None:
    planning = planned(tmp_path)
    pairs = in_order(planning, Q1)
    expected = definitions.ties(
        [item.deltas()[Q1] for item, _ in pairs], [weight for _, weight in pairs], 0.5, "mass", "count"
    ).astype(np.float32)
    norms, error = dense_error(
        planning, Q1, np.eye(len(expected), dtype=np.float32), expected, dense_cutoffs(planning, lambda: None)
    )
    assert error.frobenius <= 1e-6 * norms.frobenius


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (500, 450), (600, 900)])
def test_norms_of_a_dense_matrix(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    found = norms_of_dense(torch.from_numpy(matrix))
    assert found.frobenius == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
    assert found.spectral == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-6)
    assert norms_of_dense(torch.zeros(3, 4)).spectral == 0
    assert norms_of_dense(torch.ones(40, 30)).spectral == pytest.approx(1200**0.5)
