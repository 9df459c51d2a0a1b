"""Options that a method does not know are refused, not ignored."""

import subprocess
import sys
from dataclasses import fields
from typing import Any

import pytest

from lora_engine.errors import SpecError
from lora_engine.fields import from_mapping, to_mapping
from lora_engine.merging.config import OPTIONS, ExtractConfig, MergeConfig, MergeSpec, WeightedAdapter

VALUES: dict[str, Any] = {
    "rank": 4, "energy": 0.9, "max_bytes": 100, "fit": "vllm", "density": 0.5, "gamma": 0.1, "epsilon": 0.2,
    "election": "count", "scope": "adapter", "basis": "core", "normalize": "none", "subspace": "row", "seed": 3,
    "dtype": "bf16",
}  # fmt: skip


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("option", VALUES)
def test_every_option_of_every_method(method: str, option: str) -> None:
    assert set(VALUES) == {item.name for item in fields(MergeConfig)} - {"method"}
    mapping = {"method": method, option: VALUES[option]}
    if option in OPTIONS[method]:
        assert from_mapping(MergeConfig, mapping).options[option] == VALUES[option]
    else:
        with pytest.raises(SpecError, match=f"{option}: {method} has no such option; it has") as caught:
            from_mapping(MergeConfig, mapping)
        assert caught.value.field == option


@pytest.mark.parametrize(
    ("mapping", "field"),
    [
        ({"method": "average"}, "method"),
        ({"method": "linear", "rank": 0}, "rank"),
        ({"method": "linear", "rank": 4, "energy": 0.5}, "energy"),
        ({"method": "linear", "energy": 0.0}, "energy"),
        ({"method": "linear", "energy": 1.1}, "energy"),
        ({"method": "linear", "max_bytes": 4, "energy": 0.5}, "max_bytes"),
        ({"method": "linear", "fit": "vllm", "energy": 0.5}, "fit"),
        ({"method": "linear", "fit": "vllm", "rank": 513}, "rank"),
        ({"method": "linear", "fit": "tgi"}, "fit"),
        ({"method": "ties", "density": 0.0}, "density"),
        ({"method": "ties", "density": float("nan")}, "density"),
        ({"method": "ties", "election": "loudest"}, "election"),
        ({"method": "breadcrumbs", "density": 0.9, "gamma": 0.2}, "gamma"),
        ({"method": "della", "density": 0.9, "epsilon": 0.3}, "epsilon"),
        ({"method": "della", "density": 0.1, "epsilon": 0.2}, "epsilon"),
        ({"method": "dare_ties", "seed": -1}, "seed"),
        ({"method": "stack", "ties": True}, "ties"),
    ],
)
def test_values_that_cannot_be(mapping: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        from_mapping(MergeConfig, mapping)
    assert caught.value.field == field


def test_specs_survive_json() -> None:
    spec = MergeSpec(
        adapters=[WeightedAdapter(path="a", weight=-1.0, weights={"layers.[0-7].*": 0.5}), WeightedAdapter(path="b")],
        output="out", method="ties", basis="core", rank=8,
    )  # fmt: skip
    assert from_mapping(MergeSpec, to_mapping(spec)) == spec


@pytest.mark.parametrize(
    ("adapter", "field"),
    [
        ({"path": "a", "weight": float("inf")}, "adapters[0].weight"),
        ({"path": "a", "weights": {"(a+)+": 1.0}}, "adapters[0].weights"),
        ({"path": "a", "weights": {"q_proj": 1e5}}, "adapters[0].weights"),
        ({"path": "a", "weights": {"q_proj": "1"}}, "adapters[0].weights"),
    ],
)
def test_adapters_and_weights_that_cannot_be(adapter: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        from_mapping(MergeSpec, {"adapters": [adapter], "output": "o"})
    assert caught.value.field == field


def test_how_many_adapters() -> None:
    one = WeightedAdapter(path="a")
    for method, count in (("slerp", 3), ("project_out", 1), ("stack", 257), ("stack", 0)):
        with pytest.raises(SpecError, match="adapters: "):
            from_mapping(MergeSpec, {"adapters": [{"path": "a"}] * count, "output": "o", "method": method})
    assert MergeSpec(adapters=[one], output="o").method == "stack"


def test_extraction() -> None:
    with pytest.raises(SpecError, match="at most one"):
        ExtractConfig(rank=3, energy=0.5)
    with pytest.raises(SpecError) as caught:
        from_mapping(ExtractConfig, {"other_changes": "ignore"})
    assert caught.value.field == "other_changes"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("merging.config, merging.recipe, merging.sources", ("torch", "safetensors", "numpy")),
        ("merging.stack, merging.result, merging.merge, merging.low_rank, merging.verify", ("torch", "safetensors")),
    ],
)
def test_what_needs_no_torch_imports_none(modules: str, absent: tuple[str, ...]) -> None:
    names = ", ".join(f"lora_engine.{name.strip()}" for name in modules.split(","))
    code = f"import sys; import {names}; print([name for name in {absent} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
