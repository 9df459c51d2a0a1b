import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_engine import adapter_header, safetensors_file
from lora_engine.errors import AdapterError
from lora_engine.strict_json import loads
from tests.lora_engine.merging.adapters import Drawn

TORCH_FREE = ("adapter_header", "adapter_folder", "analysis_config", "ingest_config", "ingest_plan", "safetensors_file")


def test_what_is_read_by_ranges_is_checked_as_a_folder_is(tmp_path: Path) -> None:
    folder = Drawn(ranks={"q_proj": 2}, rslora=True).write(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    size, content = path.stat().st_size, path.read_bytes()
    first = content[: safetensors_file.data_offset(content[:8], size)]
    config, lineage = (loads((folder / name).read_bytes()) for name in ("adapter_config.json", "lineage.json"))
    header = adapter_header.check(folder, config, safetensors_file.header_of(first, size), lineage)
    assert header.modules == adapter_header.inspect(folder).modules
    assert header.base_digest == "b" * 64
    assert header.modules["model.layers.0.self_attn.q_proj"].rank == 2


def test_weights_that_fp32_does_not_hold_exactly_are_refused(tmp_path: Path) -> None:
    folder = Drawn().write(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.double() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(AdapterError, match="weights of type F64 are not read"):
        adapter_header.inspect(folder)


def test_a_digest_in_the_lineage_must_be_one(tmp_path: Path) -> None:
    folder = Drawn().write(tmp_path / "adapter")
    (folder / "lineage.json").write_text(json.dumps({"base_digest": ["b"]}))
    with pytest.raises(AdapterError, match="base_digest is not a string"):
        adapter_header.inspect(folder)


def test_a_pattern_that_would_take_years_is_read_at_once(tmp_path: Path) -> None:
    folder = Drawn().write(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"alpha_pattern": {r"(([a-z._0-9]+)+)+X": 3}}))
    found = adapter_header.inspect(folder)
    assert {item.alpha for item in found.modules.values()} == {8.0}


def test_nothing_of_torch_is_imported_for_headers_and_plans(tmp_path: Path) -> None:
    folder = Drawn().write(tmp_path / "adapter")
    code = (
        f"import sys; from pathlib import Path; from lora_engine import {', '.join(TORCH_FREE)};"
        "folder = Path(sys.argv[1]); adapter_header.inspect(folder); adapter_header.digest(folder);"
        "print(sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
