"""An adapter as llama.cpp loads it with `--lora`: GGUF, by the rules of its `convert_lora_to_gguf.py`.

    general.type = "adapter", adapter.type = "lora", adapter.lora.alpha
    <tensor>.lora_a (rank × in), <tensor>.lora_b (out × rank)

llama.cpp computes W·x + alpha / rank · B·A·x with the rank of each tensor by itself and one alpha for all, so B holds
what that leaves out of the scale.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.exporting.deltas import Deltas, FactoredDelta
from lora_engine.exporting.gguf_layout import GGUFLayout, reorder, restore
from lora_engine.exporting.tensors import aligned
from lora_engine.merging.arrays import Array

_TYPES = {"F32": np.float32, "F16": np.float16}
_FACTORS = (".lora_a", ".lora_b")


def write(deltas: Deltas, layout: GGUFLayout, path: Path, *, base_name: str, precision: str) -> None:
    """Write the adapter; `precision` is "F32" or "F16".

    Raises:
        AdapterError: a module that llama.cpp does not know, or a value beyond the type.
    """
    names = {module: layout.name(f"{module}.weight") for module in deltas.modules}
    alpha = max(deltas.rank(module) for module in deltas.modules)
    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(f"Adapter of {base_name}")
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for module, name in names.items():
        weights = deltas.factors(module)
        B = weights.B * (len(weights.A) / alpha)
        if heads := layout.heads(f"{module}.weight"):
            B = reorder(B, heads)
        for factor, tensor in zip(_FACTORS, (weights.A, B), strict=True):
            writer.add_tensor(name + factor, _typed(tensor, module, precision))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _typed(tensor: Tensor, module: str, precision: str) -> Any:
    with np.errstate(over="ignore"):
        found = tensor.contiguous().numpy().astype(_TYPES[precision])
    if not np.isfinite(found).all():
        raise AdapterError(f"{module}: values beyond what {precision} holds; export it as F32")
    return found


class GGUFDeltas:
    """An adapter read from a GGUF file, with the modules' names of the model."""

    def __init__(self, path: Path, layout: GGUFLayout, modules: Sequence[str]) -> None:
        """`modules` are those that it may have; what is in the file for others is an error.

        Raises:
            AdapterError: no adapter, or tensors that belong to no module.
        """
        reader = gguf.GGUFReader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        if fields.get(gguf.Keys.General.TYPE) != "adapter" or fields.get(gguf.Keys.Adapter.TYPE) != "lora":
            raise AdapterError(f"{path.name}: not an adapter")
        self._alpha = float(fields[gguf.Keys.Adapter.LORA_ALPHA])
        self._layout = layout
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._names = {name: layout.name(f"{name}.weight") for name in modules}
        self._names = {name: stored for name, stored in self._names.items() if stored + _FACTORS[0] in self._tensors}
        if len(self._tensors) != 2 * len(self._names):
            raise AdapterError(f"{path.name}: {len(self._tensors)} tensors for {len(self._names)} modules")

    @property
    def modules(self) -> Sequence[str]:
        return tuple(self._names)

    def delta(self, module: str) -> FactoredDelta:
        """A and B, fp32, in the model's own order of rows."""
        A, B = (aligned(self._read(self._names[module] + factor)) for factor in _FACTORS)
        if heads := self._layout.heads(f"{module}.weight"):
            B = restore(B, heads)
        return FactoredDelta(A, B * (self._alpha / len(A)))

    def _read(self, name: str) -> Array:
        tensor = self._tensors[name]
        found: Array = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return found
