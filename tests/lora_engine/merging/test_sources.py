"""Everything a merge is refused for is found from configs and headers, and names adapter, tensor and remedy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora_engine import safetensors_file
from lora_engine.adapter_header import CONFIG, LINEAGE, WEIGHTS, Header, ModuleHeader, inspect
from lora_engine.errors import AdapterError, EngineError, SpecError
from lora_engine.merging.config import MergeConfig, MergeSpec, WeightedAdapter
from lora_engine.merging.sources import Source, plan, read
from tests.lora_engine.merging.adapters import DOWN0, Q0, Q1, SHAPES, Drawn


def adapter(folder: Path, made: Drawn = Drawn(), **lineage: Any) -> Path:  # noqa: B008 - frozen
    made.write(folder)
    if lineage:
        (folder / LINEAGE).write_text(json.dumps(lineage))
    return folder


def sources(*folders: Path, **options: Any) -> list[Source]:
    return read(MergeSpec(adapters=[WeightedAdapter(path=str(folder), **options) for folder in folders], output="none"))


def renamed(folder: Path, old: str, new: str, *, without_digest: bool = False) -> Path:
    """An adapter whose modules are called otherwise."""
    entries = safetensors_file.read_header(folder / WEIGHTS)
    arrays = {
        name.replace(old, new): safetensors_file.read_array(folder / WEIGHTS, entry) for name, entry in entries.items()
    }
    safetensors_file.write(folder / WEIGHTS, arrays, {})
    if without_digest:
        (folder / LINEAGE).unlink()
    return folder


def wider(folder: Path, module: str) -> Path:
    """An adapter whose module has one more output."""
    entries = safetensors_file.read_header(folder / WEIGHTS)
    arrays = {name: safetensors_file.read_array(folder / WEIGHTS, entry) for name, entry in entries.items()}
    name = f"base_model.model.{module}.lora_B.weight"
    arrays[name] = np.pad(arrays[name], ((0, 1), (0, 0)))
    safetensors_file.write(folder / WEIGHTS, arrays, {})
    return folder


def test_another_base_model(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "mine"), adapter(tmp_path / "yours", base_digest="c" * 64)
    with pytest.raises(
        AdapterError, match=r"different base models: mine of tests/base \(bbbb.*yours of tests/base \(cc"
    ):
        plan(MergeConfig(), sources(first, second))


def test_another_tokenizer_or_shape(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "mine"), wider(adapter(tmp_path / "yours"), Q0)
    with pytest.raises(AdapterError, match=r"yours: .*q_proj is 13 × 16, but 12 × 16 in mine.*leave one"):
        plan(MergeConfig(), sources(first, second))


def test_layers_of_another_architecture(tmp_path: Path) -> None:
    first = adapter(tmp_path / "mine")
    second = renamed(adapter(tmp_path / "yours"), "model.layers.", "transformer.h.", without_digest=True)
    with pytest.raises(
        AdapterError, match=r"yours: its layers are called transformer\.h\.…, those of mine model\.layers"
    ):
        plan(MergeConfig(), sources(first, second))
    other_targets = renamed(adapter(tmp_path / "same", Drawn(targets=("down_proj",))), "x", "x", without_digest=True)
    assert plan(MergeConfig(), sources(first, other_targets)).modules


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.5, -0.5)])
def test_no_weight_is_left(weights: tuple[float, float], tmp_path: Path) -> None:
    folder = adapter(tmp_path / "1")
    named = [WeightedAdapter(path=str(folder), weight=weight) for weight in weights]
    with pytest.raises(SpecError, match="every weight is 0") as caught:
        plan(MergeConfig(), read(MergeSpec(adapters=named, output="none")))
    assert caught.value.field == "adapters"


def test_a_pattern_that_names_nothing(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "mine")
    with pytest.raises(SpecError, match="mine has no module called 'k_proj'; there are down_proj, q_proj") as caught:
        plan(MergeConfig(), sources(folder, weights={"q_proj": 1.0, "k_proj": 2.0}))
    assert caught.value.field == "adapters[0].weights"


def test_of_several_patterns_the_last_one_counts(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "1")
    found = plan(
        MergeConfig(), sources(folder, weight=9.0, weights={"query": 1.0, "layers.0.*": 2.0, Q0: 3.0, Q1: -1.0})
    )
    assert {name: item.parts[0].weight for name, item in found.modules.items()} == {
        Q0: 3.0, DOWN0: 2.0, Q1: -1.0, "model.layers.1.mlp.down_proj": 9.0,
    }  # fmt: skip


def test_the_same_adapter_with_other_patterns_adds_up(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "1")
    named = [
        WeightedAdapter(path=str(folder), weight=2.0),
        WeightedAdapter(path=str(folder), weight=1.0, weights={"q_proj": -2.0}),
    ]
    found = plan(MergeConfig(), read(MergeSpec(adapters=named, output="none")))
    assert {name: [part.weight for part in item.parts] for name, item in found.modules.items()} == {
        name: [] if name.endswith("q_proj") else [3.0] for name in SHAPES if not name.endswith("q_proj")
    }


def test_too_many_ranks(tmp_path: Path) -> None:
    header = inspect(adapter(tmp_path / "1"))
    large = {name: ModuleHeader(3000, item.inputs, item.outputs, 1.0, 1.0) for name, item in header.modules.items()}
    named = [Source(Header(header.folder, header.settings, large, "b", header.tensors), digest) for digest in "xy"]
    with pytest.raises(SpecError, match=r"add up to 6000 .* at most 4096 can be merged: compress"):
        plan(MergeConfig(), named)


def test_factors_of_unlike_ranks_are_not_added_up(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2", Drawn(rank=3))
    with pytest.raises(SpecError, match=r"peft_linear adds up factors.*use linear") as caught:
        plan(MergeConfig(method="peft_linear"), sources(first, second))
    assert caught.value.field == "method"


def test_an_adapter_is_not_projected_out_of_itself(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2", Drawn(rank=3))
    with pytest.raises(SpecError, match="the first adapter again"):
        plan(MergeConfig(method="project_out"), sources(first, second, first))
    with pytest.raises(SpecError, match="expected at least 2"):
        plan(MergeConfig(method="project_out"), sources(first, first))


def test_nothing_is_read_but_configs_and_headers(tmp_path: Path) -> None:
    """The weights of both are cut off after the header: every check passes, and the first one that reads fails."""
    first, second = adapter(tmp_path / "1"), adapter(tmp_path / "2", Drawn(rank=3))
    read_before = sources(first, second)
    for folder in (first, second):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[: safetensors_file.data_offset(path.read_bytes()[:8], path.stat().st_size)])
    found = plan(MergeConfig(method="linear", rank=3), read_before)
    assert {name: item.rank for name, item in found.modules.items()} == dict.fromkeys(SHAPES, 7)
    with pytest.raises(EngineError):
        inspect(first)


def test_target_modules_keep_last_names_only_where_all_have_them(tmp_path: Path) -> None:
    first, second = adapter(tmp_path / "1", Drawn(targets=("q_proj",))), adapter(tmp_path / "2")
    config = json.loads((second / CONFIG).read_text())
    (second / CONFIG).write_text(json.dumps({**config, "target_modules": ["mlp.down_proj", "q_proj"]}))
    assert plan(MergeConfig(), sources(first, second)).target_modules == ("mlp.down_proj", "q_proj")


def test_a_budget_for_nothing(tmp_path: Path) -> None:
    found = sources(adapter(tmp_path / "1"))
    with pytest.raises(SpecError, match=r"it takes [0-9]+") as caught:
        plan(MergeConfig(method="linear", max_bytes=100), found)
    least = int(caught.value.message.rpartition(" ")[2])
    assert plan(MergeConfig(method="linear", max_bytes=least), found)
    with pytest.raises(SpecError):
        plan(MergeConfig(method="linear", max_bytes=least - 1), found)
