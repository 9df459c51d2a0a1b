"""The tensors of a model's safetensors files, one at a time, as its architecture names and shapes them.

What transformers renames, stacks or splits when it loads a model (experts, as a rule) is renamed, stacked and split by
its own rules. Names are settled from the files' headers, before any tensor is read.
"""

import re
from collections.abc import Container, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_engine import strict_json
from lora_engine.errors import AdapterError, BaseModelError
from lora_engine.safetensors_file import read_header

if TYPE_CHECKING:  # seconds of import, which a model whose files have the architecture's own names does without
    from transformers.core_model_loading import WeightConverter

# Rotary frequencies are computed, not loaded; old checkpoints still carry them.
_COMPUTED = r"rotary_emb\.inv_freq$"
# Pages of a mapped file count as the process's memory until it is closed.
_MAPPED_BYTES = 64 << 20


@dataclass(slots=True)
class _Part:
    """Stored tensors that make one tensor of the model, or several: `converter` knows how, None means as it is."""

    converter: "WeightConverter | None"
    sources: list[tuple[str, str]] = field(default_factory=list)  # pattern of the converter, stored name


class Weights:
    """The files of `folder` for `model` (on the meta device)."""

    def __init__(self, folder: Path, model: Any) -> None:
        """Reads the headers.

        Raises:
            BaseModelError: a file cannot be read; tensors are missing, or there are some that have no place.
        """
        self._model = model
        self._expected: dict[str, Tensor] = model.state_dict()
        self._files = _Files(folder)
        self._parts: dict[str, _Part] = {}
        found, unexpected = self._assign()
        ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), _COMPUTED]
        unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored)]
        self.missing = set(self._expected) - found
        absent = [name for name in self.missing if not found & _tied_to(name, model.all_tied_weights_keys)]
        if absent or unexpected:
            raise BaseModelError(f"tensors missing: {some(absent)}; not in the architecture: {some(unexpected)}")

    @property
    def files(self) -> list[Path]:
        return self._files.paths

    def places(self) -> dict[str, tuple[Path, str]]:
        """Name in the model → file and stored name, of the tensors that lie in a file as the model has them."""
        as_they_are = {name: part.sources[0][1] for name, part in self._parts.items() if part.converter is None}
        return {name: (self._files.path(stored), stored) for name, stored in as_they_are.items()}

    def tensors(self, device: torch.device, skip: Container[str] = ()) -> Iterator[tuple[str, Tensor]]:
        """(name in the model, tensor on `device`, of the model's shape and dtype), all that the files hold.

        Those of `places` that are in `skip` are not read.

        Raises:
            BaseModelError: a tensor is torn, of another shape, or holds values that are no numbers.
        """
        for first, part in self._parts.items():
            if part.converter is None and first in skip:
                continue
            if part.converter is None:
                produced = {first: self._read(part.sources[0][1], self._expected[first].dtype, device)}
            else:
                produced = self._convert(part, part.converter, first, device)
            for name, tensor in produced.items():
                expected = self._expected[name]
                if tensor.shape != expected.shape:
                    shapes = f"{list(tensor.shape)} instead of {list(expected.shape)}"
                    raise BaseModelError(f"tensor {name} has shape {shapes}")
                yield name, tensor

    def _assign(self) -> tuple[set[str], list[str]]:
        """Find every stored tensor its place; the names in the model that are provided, and what found no place."""
        model, expected = self._model, self._expected
        stored_names = self._files.names()
        # Making the rules of all architectures takes as long as reading a small model.
        if all(name in expected for name in stored_names):
            self._parts = {name: _Part(None, [("", name)]) for name in sorted(stored_names, key=_natural)}
            return set(stored_names), []
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        found: set[str] = set()
        unexpected = []
        for stored in sorted(stored_names, key=_natural):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, expected)
            if name not in expected:  # a name that did not have to be changed
                name, pattern = rename_source_key(stored, [], [], model.base_model_prefix, expected)
            converter = None if pattern is None else by_pattern[pattern]
            if name not in expected or (converter is None and name in found):
                unexpected.append(stored)
                continue
            if name not in self._parts:
                self._parts[name] = _Part(deepcopy(converter))
            self._parts[name].sources.append((pattern or "", stored))
            targets = converter.target_patterns if converter else [name]
            found |= {name.replace(targets[0], target) for target in targets}
        return found, unexpected

    def _convert(
        self, part: _Part, converter: "WeightConverter", first: str, device: torch.device
    ) -> dict[str, Tensor]:  # fmt: skip
        dtype = self._expected[first].dtype
        for pattern, stored in part.sources:
            read: Any = partial(self._read, stored, dtype, device)
            converter.add_tensor(first, stored, pattern, read)
        try:
            produced = converter.convert(first, model=self._model, config=self._model.config)
        except BaseModelError:
            raise
        except Exception as error:  # whatever the operation finds wrong with what it is given
            raise BaseModelError(f"{some(stored for _, stored in part.sources)} do not make {first}: {error}") from None
        return {name: value[0] if isinstance(value, list) else value for name, value in produced.items()}

    def _read(self, stored: str, dtype: torch.dtype, device: torch.device) -> Tensor:
        tensor = self._files.read(stored)
        if tensor.is_floating_point() and not _finite(tensor):
            raise BaseModelError(
                f"tensor {stored} holds values that are not finite: the file is damaged, or the training that wrote it"
                " had diverged; use another copy"
            )
        # A copy, always: pages of the mapped file would otherwise stay resident beside the model.
        return tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


class _Files:
    """The safetensors files of a folder; one is open at a time."""

    def __init__(self, folder: Path) -> None:
        self._paths: dict[str, Path] = {}
        self._open: tuple[Path, Any] | None = None
        self._read_bytes = 0
        self.paths = _shards(folder)
        for path in self.paths:
            try:
                self._paths |= dict.fromkeys(read_header(path), path)
            except AdapterError as error:
                raise BaseModelError(f"{path.name} cannot be read: {error.message}") from None

    def names(self) -> list[str]:
        return list(self._paths)

    def path(self, name: str) -> Path:
        return self._paths[name]

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file."""
        path = self._paths[name]
        try:
            if self._open is None or self._open[0] != path or self._read_bytes > _MAPPED_BYTES:
                self._open, self._read_bytes = None, 0  # closes it
                self._open = path, safe_open(path, framework="pt")
            tensor: Tensor = self._open[1].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{path.name} cannot be read: {error}") from None
        self._read_bytes += tensor.nbytes
        return tensor


def stored_names(folder: Path) -> list[str]:
    """Of all tensors in the files of `folder`.

    Raises:
        BaseModelError: a file cannot be read.
    """
    return _Files(folder).names()


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(0, len(part), part) if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    # Other names would escape the folder, or the hashes that pin it.
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise BaseModelError("model.safetensors.index.json: it names files outside its folder, or no safetensors")
    return [folder / name for name in sorted(set(names))]


def _tied_to(name: str, ties: Mapping[str, str]) -> set[str]:
    """Other names of the tensor `name`."""
    return {ties.get(name, name)} | {other for other, source in ties.items() if source == name}


def _finite(tensor: Tensor) -> bool:
    """One pass without an intermediate result; what is neither NaN nor infinite has finite extremes."""
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(()),) * 2
    return bool((low.isfinite() & high.isfinite()).item())


def read_json(path: Path) -> dict[str, Any]:
    """A file of one JSON object.

    Raises:
        BaseModelError: it is none.
    """
    try:
        value = strict_json.loads(path.read_bytes())
    except (OSError, strict_json.StrictJSONError) as error:
        raise BaseModelError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{path.name} is not a JSON object")
    return value


def some(names: Any) -> str:
    """The first names of many, for a message."""
    listed = sorted(names)
    shown = ", ".join(listed[:5]) or "none"
    return shown + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
