"""A merge is recomputed from its sources, and what was altered since is named."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_engine import safetensors_file
from lora_engine.adapter_header import WEIGHTS
from lora_engine.errors import AdapterError
from lora_engine.merging.config import OPTIONS, MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge
from lora_engine.merging.verify import verify
from tests.lora_engine.merging.adapters import Q0, Drawn, merge_of

PAIRS = [(Drawn(seed=1), 0.7), (Drawn(seed=1, alpha=3.0, rslora=True), 1.2), (Drawn(seed=3), 0.5)]


def merged(folder: Path, **options: Any) -> list[Path]:
    pairs = PAIRS[:2] if options.get("method") == "slerp" else PAIRS
    if options.get("method") == "project_out":
        pairs = [(PAIRS[0][0], 0.7), (PAIRS[2][0], 1.0)]
    merge_of(folder, pairs, **options)
    return [folder / str(index) for index in reversed(range(len(pairs)))]


@pytest.mark.parametrize("method", OPTIONS)
def test_what_was_merged_is_verified(method: str, tmp_path: Path) -> None:
    found = verify(tmp_path / "out", merged(tmp_path, method=method))
    assert found["faults"] == []
    assert found["verified"]
    assert found["modules"] == 4


@pytest.mark.parametrize(
    "options", [{"rank": 2}, {"energy": 0.8}, {"max_bytes": 3000}, {"dtype": "bf16"}, {"rank": 3, "fit": "vllm"}]
)
def test_compressed_and_rounded(options: dict[str, Any], tmp_path: Path) -> None:
    assert verify(tmp_path / "out", merged(tmp_path, method="linear", **options))["verified"]


def test_altered_weights(tmp_path: Path) -> None:
    sources = merged(tmp_path)
    path = tmp_path / "out" / WEIGHTS
    entries = safetensors_file.read_header(path)
    arrays = {name: safetensors_file.read_array(path, entry) for name, entry in entries.items()}
    arrays[f"base_model.model.{Q0}.lora_A.weight"] *= np.float32(1.001)
    safetensors_file.write(path, arrays, {"format": "pt"})
    found = verify(tmp_path / "out", sources)
    assert not found["verified"]
    assert any(fault.startswith(f"{Q0}: frobenius is ") for fault in found["faults"])
    assert found["totals"]["frobenius"] > 1e-4 > found["certified"]["frobenius"]


def versions(folder: Path, apart: float) -> list[WeightedAdapter]:
    """Two versions of an adapter of which only q_proj was trained on, and their difference."""
    found = []
    for index, weight in enumerate((0.3, -0.3)):
        made = Drawn(seed=1).write(folder / str(index))
        path = made / WEIGHTS
        random = np.random.default_rng(9)
        entries = safetensors_file.read_header(path)
        arrays = {name: safetensors_file.read_array(path, entry) for name, entry in entries.items()}
        for name, array in arrays.items():
            if index and "q_proj" in name:
                array += (apart * random.standard_normal(array.shape)).astype(np.float32)
        config = json.loads((made / "adapter_config.json").read_text())
        (made / "adapter_config.json").write_text(json.dumps({**config, "revision": str(index)}))
        safetensors_file.write(path, arrays, {"format": "pt"})
        found.append(WeightedAdapter(path=str(made), weight=weight))
    return found


@pytest.mark.parametrize("apart", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("options", [{}, {"method": "linear", "rank": 4}, {"method": "linear", "energy": 0.99},
                                     {"method": "ties"}, {"method": "sce"}, {"method": "peft_linear"}])  # fmt: skip
def test_the_difference_of_two_versions(options: dict[str, Any], apart: float, tmp_path: Path) -> None:
    adapters = versions(tmp_path, apart)
    merge(MergeSpec(adapters=adapters, output=str(tmp_path / "out"), **options))
    found = verify(tmp_path / "out", [Path(item.path) for item in adapters])
    assert found["faults"] == []
    if options.get("method", "stack") in ("stack", "linear"):  # what both have alike is nothing, not noise
        document = json.loads((tmp_path / "out/certificate.json").read_text())
        certified = document["modules"]["model.layers.0.mlp.down_proj"]
        assert certified["norm"] == certified["frobenius"] == 0
        assert options.get("method") != "linear" or certified["rank"] == 0


@pytest.mark.parametrize("name", ["certificate.json", "lineage.json"])
def test_altered_documents(name: str, tmp_path: Path) -> None:
    sources = merged(tmp_path, method="linear", rank=2)
    document = json.loads((tmp_path / "out" / name).read_text())
    if name == "certificate.json":
        document["totals"]["frobenius"] /= 2
    else:
        document["recipe"]["sources"][0]["weight"] += 0.01
    (tmp_path / "out" / name).write_text(json.dumps(document))
    faults = verify(tmp_path / "out", sources)["faults"]
    assert any(("totals" if name == "certificate.json" else "the recipe is not the one") in fault for fault in faults)


def test_sources_that_are_missing_or_have_changed(tmp_path: Path) -> None:
    sources = merged(tmp_path)
    with pytest.raises(AdapterError, match=r"was made of [0-9a-f]{64} too; give all"):
        verify(tmp_path / "out", sources[1:])
    with pytest.raises(AdapterError, match="only merged adapters"):
        verify(sources[0], sources)


@pytest.mark.parametrize(
    "recipe",
    [
        None,
        [],
        {"method": "stack"},
        {"method": "stack", "options": {"rank": 1}, "sources": []},
        {"method": "stack", "options": {}, "sources": [{"digest": "a", "weight": "1", "weights": []}]},
        {"method": "stack", "options": {}, "sources": [{"digest": "a", "weight": 1.0, "weights": [1]}]},
        {"method": "stack", "options": 3, "sources": [3]},
    ],
)
def test_a_lineage_that_is_no_recipe(recipe: Any, tmp_path: Path) -> None:
    sources = merged(tmp_path)
    (tmp_path / "out/lineage.json").write_text(json.dumps({"recipe": recipe}))
    with pytest.raises(AdapterError):
        verify(tmp_path / "out", sources)


@pytest.mark.parametrize("document", [{}, {"modules": 3, "totals": []}, {"modules": {Q0: None}, "totals": {}}])
def test_a_certificate_that_says_nothing(document: Any, tmp_path: Path) -> None:
    sources = merged(tmp_path)
    (tmp_path / "out/certificate.json").write_text(json.dumps(document))
    found = verify(tmp_path / "out", sources)
    assert not found["verified"]
    assert any("certified is None" in fault for fault in found["faults"])
