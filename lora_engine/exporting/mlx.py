"""An adapter as mlx-lm loads it: ``y = W·x + scale · lora_bᵀ·(lora_aᵀ·x)`` with one rank and one scale for all.

    adapter_config.json    fine_tune_type, num_layers, lora_parameters: rank, scale, keys (names within a layer)
    adapters.safetensors   <module>.lora_a (in × rank) and <module>.lora_b (rank × out)

As in the portable profile the scale lies in B, smaller ranks are padded, and layers without weights have zeros.
"""

import json
from pathlib import Path
from typing import Any

from lora_engine import safetensors_file
from lora_engine.adapter_header import CONFIG
from lora_engine.exporting import limits
from lora_engine.exporting.deltas import Deltas, FactoredDelta
from lora_engine.exporting.peft import TYPES, padded
from lora_engine.exporting.tensors import aligned
from lora_engine.merging.arrays import Array
from lora_engine.safetensors_file import read_array, read_header
from lora_engine.target_modules import Module

WEIGHTS = "adapters.safetensors"
_FACTORS = (".lora_a", ".lora_b")


def write(deltas: Deltas, modules: tuple[Module, ...], layers: str, folder: Path, dtype: str) -> None:
    """Config and weights.

    Args:
        modules: the base model's linear layers.
        layers: name of the list of decoder layers in the model ("model.layers").

    Raises:
        AdapterError: a module outside the layers, or a value that `dtype` cannot hold.
    """
    limits.check_layers(deltas.modules, layers)
    rank = max(deltas.rank(name) for name in deltas.modules)
    keys = sorted({_within(name, layers) for name in deltas.modules})
    arrays: dict[str, Array] = {}
    for module in modules:
        if module.name.startswith(f"{layers}.") and _within(module.name, layers) in keys:
            A, B = padded(deltas, module, rank)
            arrays |= {module.name + _FACTORS[0]: A.T, module.name + _FACTORS[1]: B.T}
    safetensors_file.write(folder / WEIGHTS, arrays, {"format": "mlx"}, TYPES[dtype])
    config = {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": keys, "rank": rank, "scale": 1.0},
        "num_layers": 1 + max(int(name[len(layers) + 1 :].partition(".")[0]) for name in arrays),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _within(module: str, layers: str) -> str:
    """A module's name in its layer: "self_attn.q_proj"."""
    return module[len(layers) + 1 :].partition(".")[2]


class MLXDeltas:
    """An adapter as it was written, read back."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / WEIGHTS
        self._entries = read_header(self._path)
        config: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        self._scale = float(config["lora_parameters"]["scale"])

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(_FACTORS[0]) for name in self._entries if name.endswith(_FACTORS[0]))

    def delta(self, module: str) -> FactoredDelta:
        A, B = (read_array(self._path, self._entries[module + factor]).T for factor in _FACTORS)
        return FactoredDelta(aligned(A), aligned(B * self._scale))
