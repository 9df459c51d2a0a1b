"""The tensors of a model on disk, by their names in its architecture, in parts small enough for any memory."""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_engine.errors import BaseModelError
from lora_engine.merging.arrays import Array, Wide
from lora_engine.safetensors_file import FLOATS, Entry, read_array, read_header
from lora_engine.weights import Weights

_CPU = torch.device("cpu")


def aligned(array: Array | Wide) -> Tensor:
    """A copy in fp32, in memory that PyTorch has asked for, whose alignment is always the same.

    NumPy's is not, and the products of some libraries differ in the last bit by it.
    """
    return torch.from_numpy(array).to(torch.float32, copy=True).contiguous()


class Tensors(Protocol):
    """Everything in fp32 on the CPU."""

    def __contains__(self, name: object) -> bool:
        """Whether `rows` can read the tensor of this name."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A slice of the tensor's first axis."""
        raise NotImplementedError

    def rest(self, streamed: Container[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all but `streamed`, of the shapes that the architecture has."""
        raise NotImplementedError


class FolderTensors:
    """Of a Hugging Face folder; `model` (fp32, on the meta device) says the names.

    Attributes:
        stored: stored name → file and where it lies in it, of all tensors of the files.
        names: name in the model → stored name, of the tensors stored as the model has them.
    """

    def __init__(self, folder: Path, model: Any) -> None:
        """Reads the headers.

        Raises:
            BaseModelError: as `Weights`.
        """
        self._weights = Weights(folder, model)
        self.stored: dict[str, tuple[Path, Entry]] = {
            name: (path, entry) for path in self._weights.files for name, entry in read_header(path).items()
        }
        self.names = {name: stored for name, (_, stored) in self._weights.places().items()}
        for name, parameter in model.state_dict().items():
            if name in self.names and self.stored[self.names[name]][1].shape != tuple(parameter.shape):
                shapes = f"{self.stored[self.names[name]][1].shape} instead of {tuple(parameter.shape)}"
                raise BaseModelError(f"tensor {name} has shape {shapes}")

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        path, entry = self.stored[self.names[name]]
        return aligned(read_array(path, entry, slice(start, stop)))

    def rest(self, streamed: Container[str]) -> Iterator[tuple[str, Tensor]]:
        # Not by `Weights`, which maps whole files: those count as the process's memory to some limits.
        floats = {name for name, stored in self.names.items() if self.stored[stored][1].dtype in FLOATS}
        for name in sorted(floats):
            if name not in streamed:
                path, entry = self.stored[self.names[name]]
                yield name, aligned(read_array(path, entry))
        yield from self._weights.tensors(_CPU, skip=floats)
