"""Whole merges against dense float64: any mix of ranks, alphas, rsLoRA, patterns, targets and signs."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_engine import safetensors_file
from lora_engine.errors import AdapterError
from lora_engine.merging.config import GEOMETRIC, NONLINEAR, OPTIONS, MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from tests.lora_engine.merging.adapters import (
    DOWN0,
    DOWN1,
    Q0,
    Q1,
    Drawn,
    best,
    certificate,
    dense,
    drawn,
    merge_of,
    weighted_sum,
    weights,
)  # fmt: skip

# Different adapters: of the same one twice the weights may cancel out, which has a test of its own.
PAIRS = st.lists(st.tuples(drawn(), weights()), min_size=1, max_size=4, unique_by=lambda pair: pair[0].seed)
THREE = [(Drawn(seed=1), 0.7), (Drawn(seed=2, rank=3, rslora=True), -1.2), (Drawn(seed=3, ranks={"q_proj": 6}), 0.5)]
FEW = settings(max_examples=30, deadline=None)


def norm(matrix: Any) -> float:
    return float(np.linalg.norm(matrix))


@FEW
@given(PAIRS)
def test_a_stack_is_the_weighted_sum(pairs: list[tuple[Drawn, float]]) -> None:
    with TemporaryDirectory() as folder:
        merge_of(Path(folder), pairs)
        found, expected = dense(Path(folder) / "out"), weighted_sum(pairs)
        assert set(found) == set(expected)
        for module, value in expected.items():
            scale = sum(norm(weight * item.deltas()[module]) for item, weight in pairs if module in item.modules)
            assert norm(found[module] - value) <= 1e-6 * scale
            certified = certificate(Path(folder) / "out")["modules"][module]
            if norm(value) > 1e-3 * scale:
                assert abs(certified["frobenius"] - norm(found[module] - value) / norm(value)) <= 1e-9


@FEW
@given(PAIRS, st.integers(1, 12), st.sampled_from(["fp32", "fp16", "bf16"]))
def test_a_linear_merge_is_the_dense_optimum_and_its_certificate_is_what_is_measured(
    pairs: list[tuple[Drawn, float]], rank: int, dtype: str
) -> None:
    with TemporaryDirectory() as folder:
        merge_of(Path(folder), pairs, method="linear", rank=rank, dtype=dtype)
        found, certified = dense(Path(folder) / "out"), certificate(Path(folder) / "out")
        squares = []
        for module, value in weighted_sum(pairs).items():
            if dtype == "fp32":
                assert norm(found[module] - best(value, rank)) <= 1e-5 * norm(value)
            error = found[module] - value
            item = certified["modules"][module]
            assert abs(item["frobenius"] - norm(error) / norm(value)) <= 1e-5
            assert abs(item["spectral"] - np.linalg.norm(error, 2) / np.linalg.norm(value, 2)) <= 1e-5
            assert item["sum_frobenius"] == item["frobenius"]
            squares.append((norm(error) ** 2, norm(value) ** 2))
        total = np.sqrt(sum(item for item, _ in squares) / sum(item for _, item in squares))
        assert abs(certified["totals"]["frobenius"] - total) <= 1e-5


@pytest.mark.parametrize("basis", ["knots", "core"])
@pytest.mark.parametrize("method", NONLINEAR)
def test_the_certificate_of_a_nonlinear_merge_is_what_is_measured(method: str, basis: str, tmp_path: Path) -> None:
    merge_of(tmp_path, THREE, method=method, basis=basis, rank=5)
    found, certified = dense(tmp_path / "out"), certificate(tmp_path / "out")
    for module, value in weighted_sum(THREE).items():
        item = certified["modules"][module]
        error = found[module] - value
        assert abs(item["sum_frobenius"] - norm(error) / norm(value)) <= 1e-5
        assert abs(item["sum_spectral"] - np.linalg.norm(error, 2) / np.linalg.norm(value, 2)) <= 1e-5
        assert item["rank"] == 5
        assert 0.01 < item["dense_frobenius"] < 2


@pytest.mark.parametrize("method", OPTIONS)
def test_the_order_of_the_sources_changes_no_bit(method: str, tmp_path: Path) -> None:
    pairs = [(item, abs(weight)) for item, weight in THREE]
    if method == "slerp":
        pairs = pairs[:2]
    if method == "peft_linear":
        pairs = [(Drawn(seed=1), 0.7), (Drawn(seed=2), -1.2), (Drawn(seed=3, rslora=True), 0.5)]
    if method == "model_stock":  # of adapters at right angles it leaves nothing
        pairs = [(Drawn(seed=1), 0.7), (Drawn(seed=1, alpha=3.0), 1.2), (Drawn(seed=2), 0.5)]
    if method == "project_out":  # there the first is another thing than the others
        pairs = [(pairs[0][0], 1.0), (pairs[1][0], 1.0), (pairs[2][0], 1.0)]
    first, second = tmp_path / "first", tmp_path / "second"
    merge_of(first, pairs, method=method)
    merge_of(second, pairs[::-1] if method != "project_out" else pairs, method=method)
    names = {path.name for path in (first / "out").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "certificate.json", "lineage.json"}
    for name in names:
        assert (first / "out" / name).read_bytes() == (second / "out" / name).read_bytes()


@pytest.mark.parametrize("basis", ["knots", "core", None])
@pytest.mark.parametrize("method", [method for method in OPTIONS if method != "project_out"])
def test_one_adapter_with_weight_1_gives_itself(method: str, basis: str | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {"density": 1.0} if "density" in OPTIONS[method] else {}
    if "basis" in OPTIONS[method] and basis:
        options["basis"] = basis
    options |= {"epsilon": 0.0} if method == "della" else {"gamma": 0.0} if method == "breadcrumbs" else {}
    adapter = Drawn(seed=5, rank=3, rslora=True, ranks={"q_proj": 5}, alphas={"down_proj": 3.0})
    metrics = merge_of(tmp_path, [(adapter, 1.0)], method=method, **options)
    found = dense(tmp_path / "out")
    for module, value in adapter.deltas().items():
        assert norm(found[module] - value) <= 1e-6 * norm(value)
    assert metrics["certificate"]["sum_frobenius"] <= 1e-6
    assert metrics["rank"] == 5


def test_nothing_is_left_of_modules_where_weights_of_the_same_adapter_cancel_out(tmp_path: Path) -> None:
    other, both = Drawn(seed=1, targets=("q_proj",)), Drawn(seed=2, rank=1, rslora=True)
    merge_of(tmp_path, [(other, 1.0), (both, 1.0), (both, -1.0)])
    found = dense(tmp_path / "out")
    assert set(found) == {Q0, Q1}
    np.testing.assert_allclose(found[Q0], other.deltas()[Q0], atol=1e-6)


def test_weights_by_module(tmp_path: Path) -> None:
    first, second = Drawn(seed=1), Drawn(seed=2, targets=("q_proj",))
    sources = [
        WeightedAdapter(
            path=str(first.write(tmp_path / "1")), weight=2.0, weights={"layers.0.*": -1.0, "down_proj": 0.0}
        ),
        WeightedAdapter(path=str(second.write(tmp_path / "2")), weights={Q1: 3.0}),
    ]
    merge(MergeSpec(adapters=sources, output=str(tmp_path / "out")))
    found = dense(tmp_path / "out")
    one, two = first.deltas(), second.deltas()
    assert set(found) == {Q0, Q1}  # of down_proj nothing is left
    np.testing.assert_allclose(found[Q0], -one[Q0] + two[Q0], atol=1e-5)
    np.testing.assert_allclose(found[Q1], 2 * one[Q1] + 3 * two[Q1], atol=1e-5)


@pytest.mark.parametrize("method", [method for method in OPTIONS if method != "project_out"])
def test_a_module_left_out_in_some_layers_is_written_as_zeros(method: str, tmp_path: Path) -> None:
    """Loaders drop a whole kind of module where one layer lacks it."""
    source = WeightedAdapter(path=str(Drawn().write(tmp_path / "1")), weights={"layers.0.mlp.*": 0.0})
    merge(MergeSpec(adapters=[source], output=str(tmp_path / "out"), method=method))  # type: ignore[arg-type]
    found = dense(tmp_path / "out")
    assert set(found) == {Q0, DOWN0, Q1, DOWN1}
    assert not found[DOWN0].any()
    assert found[DOWN1].any()
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["target_modules"] == ["down_proj", "q_proj"]


@pytest.mark.parametrize("method", ["ties", "karcher"])
def test_preparations_can_be_ended(method: str, tmp_path: Path) -> None:
    """Whole adapters are looked through before the first module is merged."""
    told = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise InterruptedError

    source = WeightedAdapter(path=str(Drawn().write(tmp_path / "1")))
    with pytest.raises(InterruptedError):
        merge(MergeSpec(adapters=[source], output=str(tmp_path / "out"), method=method, scope="adapter"), tell)  # type: ignore[arg-type]
    assert told == [(0, 4)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_the_base_model_has_one_name_whatever_the_order(tmp_path: Path) -> None:
    folders: list[WeightedAdapter] = []
    for name in ("b-name", "a-name"):
        folder = Drawn(seed=len(folders)).write(tmp_path / name)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        folders.append(WeightedAdapter(path=str(folder)))
    for order, name in ((folders, "1"), (folders[::-1], "2")):
        merge(MergeSpec(adapters=order, output=str(tmp_path / name)))
        assert json.loads((tmp_path / name / "lineage.json").read_text())["base_model"] == "a-name"


@pytest.mark.parametrize("basis", ["knots", "core", None])
@pytest.mark.parametrize("method", [*GEOMETRIC, *NONLINEAR])
def test_a_module_of_zeros_counts_as_one_that_is_not_there(method: str, basis: str | None, tmp_path: Path) -> None:
    """Adapters are written with zeros where loaders want a module in every layer."""
    first, third = Drawn(seed=1), Drawn(seed=3)
    random = method in ("dare_linear", "dare_ties", "della")  # whose numbers are those of the adapter's digest
    for name, silent in (("absent", ("q_proj",)), ("zeros", ("q_proj", "down_proj"))):
        folders = [first.write(tmp_path / name / "1"), third.write(tmp_path / name / "3")]
        padded = Drawn(seed=1, alpha=3.0, targets=silent).write(tmp_path / name / "2")
        path = padded / "adapter_model.safetensors"
        arrays = {
            key: safetensors_file.read_array(path, entry) * ("down_proj" not in key or "lora_A" in key)
            for key, entry in safetensors_file.read_header(path).items()
        }
        safetensors_file.write(path, arrays, {})
        options = {"basis": basis} if basis and "basis" in OPTIONS[method] else {}
        used = [folders[0], padded] if method == "slerp" else [*folders, padded]
        given = [WeightedAdapter(path=str(folder), weight=0.5) for folder in used]
        merge(MergeSpec(adapters=given, output=str(tmp_path / name / "out"), method=method, **options))  # type: ignore[arg-type]
    absent, zeros = dense(tmp_path / "absent/out"), dense(tmp_path / "zeros/out")
    for module in (DOWN0, DOWN1) if random else absent:
        assert norm(absent[module] - zeros[module]) <= 1e-6 * norm(absent[module])


def test_what_tell_raises_ends_the_merge_and_leaves_nothing(tmp_path: Path) -> None:
    told = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        if done == 3:
            raise InterruptedError

    source = WeightedAdapter(path=str(Drawn().write(tmp_path / "1")))
    spec = MergeSpec(adapters=[source], output=str(tmp_path / "out"), method="linear", max_bytes=9000)
    with pytest.raises(InterruptedError):
        merge(spec, tell)
    assert told == [(1, 8), (2, 8), (3, 8)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]
    merge(spec)
    assert (tmp_path / "out" / "certificate.json").exists()


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    adapter = Drawn().write(tmp_path / "sick")
    path = adapter / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(data)
    with pytest.raises(AdapterError, match=r"sick: base_model\.model\.model\.layers\.1\.self_attn\.q_proj\.lora_B"):
        merge(MergeSpec(adapters=[WeightedAdapter(path=str(adapter))], output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["stack", "linear", "ties", "sce"])
@pytest.mark.parametrize(("alpha", "factor"), [(1e299, 1.0), (1.0, 1e25)])
def test_absurd_numbers_are_named(alpha: float, factor: float, method: str, tmp_path: Path) -> None:
    folder = Drawn(alpha=alpha).write(tmp_path / "absurd")
    path = folder / "adapter_model.safetensors"
    entries = safetensors_file.read_header(path)
    arrays = {name: safetensors_file.read_array(path, entry) * np.float32(factor) for name, entry in entries.items()}
    safetensors_file.write(path, arrays, {})
    with pytest.raises(AdapterError):
        merge(MergeSpec(adapters=[WeightedAdapter(path=str(folder))], output=str(tmp_path / "out"), method=method))  # type: ignore[arg-type]


def test_a_result_of_zeros_is_refused(tmp_path: Path) -> None:
    adapter = Drawn().write(tmp_path / "1")
    twin = Drawn(alpha=16.0).write(tmp_path / "2")  # another digest, twice the delta
    sources = [WeightedAdapter(path=str(path)) for path in (adapter, twin)]
    for subspace in ("span", "column", "row", "both"):
        with pytest.raises(AdapterError, match="nothing is left"):
            merge(MergeSpec(adapters=sources, output=str(tmp_path / "out"), method="project_out", subspace=subspace))
    opposite = Drawn(alpha=-8.0).write(tmp_path / "3")
    sources = [WeightedAdapter(path=str(path)) for path in (adapter, opposite)]
    with pytest.raises(AdapterError, match="nothing is left"):
        merge(MergeSpec(adapters=sources, output=str(tmp_path / "out"), method="model_stock"))


def test_lineage_card_and_metrics_say_what_was_done(tmp_path: Path) -> None:
    for index, (adapter, _) in enumerate(THREE):
        folder = adapter.write(tmp_path / str(index))
        lineage = {"base_digest": "b" * 64, "training": {"quantization": "nf4"}}
        (folder / "lineage.json").write_text(json.dumps(lineage))
    sources = [WeightedAdapter(path=str(tmp_path / str(index)), weight=item[1]) for index, item in enumerate(THREE)]
    spec = MergeSpec(adapters=sources, output=str(tmp_path / "out"), method="linear", rank=4)
    metrics = merge(spec, lineage={"found_by": "search"}, files={"table.json": "{}"})
    lineage = json.loads((tmp_path / "out/lineage.json").read_text())
    assert lineage["found_by"] == "search"
    assert (tmp_path / "out/table.json").read_text() == "{}"
    assert lineage["recipe_digest"] == metrics["recipe_digest"] == certificate(tmp_path / "out")["recipe_digest"]
    assert lineage["recipe"]["options"]["rank"] == 4
    assert lineage["parents"] == metrics["parents"] == sorted(metrics["parents"], key=lambda item: item["digest"])
    assert lineage["training"] == {"quantization": "nf4"}
    assert lineage["base_digest"] == "b" * 64
    assert metrics["certificate"] == certificate(tmp_path / "out")["totals"]
    assert metrics["ranks_before"] == [4, 3, 6]
    card = (tmp_path / "out/README.md").read_text()
    assert f"{metrics['certificate']['frobenius']:.2e}" in card
    assert metrics["parents"][0]["digest"] in card
