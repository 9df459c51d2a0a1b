"""Frobenius norms of a base model's linear layers, read from its files in blocks of rows. The model is not loaded."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from lora_engine import base_model, safetensors_file
from lora_engine.errors import AdapterError
from lora_engine.safetensors_file import FLOATS, Entry
from lora_engine.weights import Weights

_BLOCK_BYTES = 8 << 20


class BaseNorms:
    """‖W‖² by module name."""

    def __init__(self, folder: Path) -> None:
        """Reads the config and the files' headers.

        Raises:
            BaseModelError: as `base_model.load` does for these.
        """
        model = base_model.outline(folder, quantization="none", compute_dtype="fp32").model
        self._shapes = {item.name: (item.outputs, item.inputs) for item in base_model.linear_modules(model)}
        self._places = Weights(folder, model).places()
        self._ties: Mapping[str, str] = model.all_tied_weights_keys
        self._header = cache(safetensors_file.read_header)

    def check(self, modules: Mapping[str, tuple[int, int]]) -> None:
        """Raises AdapterError where a module is not in the base model, or has another shape (outputs, inputs) there."""
        for name, shape in modules.items():
            if (found := self._shapes.get(name)) != shape:
                instead = f"{found[0]} × {found[1]} there" if found else "not among its linear layers"
                raise AdapterError(
                    f"{name} ({shape[0]} × {shape[1]}) is {instead}: the adapter is of another base model"
                )

    def squared(self, module: str) -> float | None:
        """‖W‖² in fp64; None where no file holds the weight as it is (fused experts, other types)."""
        name = f"{module}.weight"
        place = self._places.get(name) or self._places.get(self._ties.get(name, ""))
        if place is None:
            return None
        path, stored = place
        entry = self._header(path)[stored]
        return _squared(path, entry) if entry.dtype in FLOATS else None


def _squared(path: Path, entry: Entry) -> float:
    rows = max(1, _BLOCK_BYTES * entry.shape[0] // max(entry.end - entry.start, 1))
    blocks = (slice(start, start + rows) for start in range(0, entry.shape[0], rows))
    arrays = (safetensors_file.read_array(path, entry, block) for block in blocks)
    return float(sum(np.vdot(wide := array.astype(np.float64), wide) for array in arrays))
