"""What can be asked of an export, and that asking imports no torch."""

import subprocess
import sys
from typing import Any

import pytest

from lora_engine.config import from_mapping
from lora_engine.errors import SpecError
from lora_engine.exporting.config import ExportConfig, ExportSpec, gap_limit


@pytest.mark.parametrize(("values", "field"), [
    ({"format": "onnx"}, "format"),
    ({"format": "merged", "dtype": "fp8"}, "dtype"),
    ({"format": "gguf", "dtype": "fp16"}, "dtype"),
    ({"format": "peft", "base": "nf4"}, "base"),
    ({"format": "merged", "gguf_type": "F16"}, "gguf_type"),
    ({"format": "gguf", "gguf_type": "Q8_0"}, "gguf_type"),
    ({"format": "gguf-merged", "max_shard_bytes": 1_000_000}, "max_shard_bytes"),
    ({"format": "merged", "max_shard_bytes": 1}, "max_shard_bytes"),
    ({"format": "merged", "max_gap": 0.0}, "max_gap"),
    ({"format": "merged", "max_gap": float("nan")}, "max_gap"),
])  # fmt: skip
def test_options_that_cannot_be(values: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as error:
        ExportConfig(**values)
    assert error.value.field == field


def test_defaults_by_format() -> None:
    precisions = {
        "peft": "fp32", "peft-portable": "fp32", "mlx": "fp32", "merged": None, "gguf": "F32", "gguf-merged": "F16",
    }  # fmt: skip
    assert {name: ExportConfig(format=name).precision for name in precisions} == precisions  # type: ignore[arg-type]
    assert gap_limit(ExportConfig(), "fp32") < gap_limit(ExportConfig(), "fp16") < gap_limit(ExportConfig(), "bf16")
    assert gap_limit(ExportConfig(max_gap=0.25), "fp32") == 0.25


def test_a_spec_names_its_fields() -> None:
    values = {"base_model": "b", "output": "o", "adapters": []}
    with pytest.raises(SpecError) as error:
        from_mapping(ExportSpec, values)
    assert error.value.field == "adapters"
    wrong = {**values, "adapters": [{"path": "a"}], "export": {"format": "onnx"}}
    with pytest.raises(SpecError) as error:
        from_mapping(ExportSpec, wrong)
    assert error.value.field == "export.format"


def test_no_torch() -> None:
    code = "import sys, lora_engine.exporting.config as _; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
