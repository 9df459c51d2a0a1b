"""A base model's linear layers and other tensors, read from its files one at a time. The model is not loaded."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lora_engine import base_model
from lora_engine.errors import AdapterError
from lora_engine.exporting.tensors import FolderTensors
from lora_engine.target_modules import Module

_BLOCK = 1 << 21  # weights read at once for a norm


class BaseWeights:
    """The weights of a folder, by their names in the architecture.

    Attributes:
        modules: every linear layer by name.
    """

    def __init__(self, folder: Path) -> None:
        """Reads the config and the files' headers.

        Raises:
            BaseModelError: as `base_model.load` does for these.
        """
        self._model = base_model.outline(folder, quantization="none", compute_dtype="fp32").model
        self._expected = self._model.state_dict()
        self._tensors = FolderTensors(folder, self._model)
        self._ties: Mapping[str, str] = self._model.all_tied_weights_keys
        self.modules: dict[str, Module] = {item.name: item for item in base_model.linear_modules(self._model)}

    def check(self, modules: Mapping[str, tuple[int, int]]) -> None:
        """Raises AdapterError where a module is not in the base model, or has another shape (outputs, inputs) there."""
        for name, (outputs, inputs) in modules.items():
            found = self.modules.get(name)
            if found is None or (found.outputs, found.inputs) != (outputs, inputs):
                there = f"{found.outputs} × {found.inputs} there" if found else "not among its linear layers"
                added = "; or tokens were added to its vocabulary" if found and found.head else ""
                raise AdapterError(
                    f"{name} ({outputs} × {inputs}) is {there}: the adapter is of another base model{added}"
                )

    def is_tied(self, module: str) -> bool:
        """Whether a layer shares its weight with another, as many output heads do with the embedding."""
        return f"{module}.weight" in self._ties

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the parameter `name` in the architecture."""
        return tuple(self._expected[name].shape) if name in self._expected else None

    def read(self, name: str) -> Tensor | None:
        """A parameter in fp32; None where no file holds it as the architecture has it (fused experts, say)."""
        stored = name if name in self._tensors else self._ties.get(name, "")
        return self._tensors.rows(stored, 0, self._expected[name].shape[0]) if stored in self._tensors else None

    def weight(self, module: str) -> Tensor | None:
        """W (outputs × inputs) of a linear layer, fp32; None as in `read`."""
        W = self.read(f"{module}.weight")
        return None if W is None else self.oriented(module, W)

    def oriented(self, module: str, weight: Tensor) -> Tensor:
        """A weight as its file has it as outputs × inputs: GPT-2's lie the other way round."""
        return weight.T if isinstance(self._model.get_submodule(module), Conv1D) else weight

    def squared(self, module: str) -> float | None:
        """‖W‖² in fp64, in blocks of rows; None as in `read`."""
        name = f"{module}.weight"
        stored = name if name in self._tensors else self._ties.get(name, "")
        if stored not in self._tensors:
            return None
        count, width = self._expected[name].shape
        rows = max(1, _BLOCK // width)
        blocks = (self._tensors.rows(stored, start, min(start + rows, count)) for start in range(0, count, rows))
        return float(sum(block.to(torch.float64).square().sum() for block in blocks))
