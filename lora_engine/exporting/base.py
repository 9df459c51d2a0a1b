"""The base model of an export, known from config, tokenizer and headers; its tensors stay on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.nn import ModuleList
from transformers.pytorch_utils import Conv1D

from lora_engine import base_files, base_model
from lora_engine.base_model import linear_modules
from lora_engine.errors import AdapterError, SpecError
from lora_engine.exporting import limits
from lora_engine.exporting.deltas import Deltas
from lora_engine.exporting.streamed import streamed
from lora_engine.exporting.sums import Piece
from lora_engine.exporting.tensors import FolderTensors, Tensors
from lora_engine.safetensors_file import FLOATS
from lora_engine.target_modules import Module
from lora_engine.weights import read_json, some

_STORED = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class Base:
    """A Hugging Face folder.

    Attributes:
        model: on the meta device, fp32; for names and shapes alone.
        modules: its linear layers.
    """

    folder: Path
    config: dict[str, Any]
    model: Any
    tensors: FolderTensors
    tokenizer: Any
    modules: tuple[Module, ...]

    def evaluated(self, tensors: Tensors | None = None, **options: Any) -> Any:
        """The model computing from disk, from its own tensors or others; options as of `streamed.streamed`."""
        return streamed(_outline(self.folder), self.tensors if tensors is None else tensors, **options)

    @property
    def layers(self) -> str:
        """Name of the list of decoder layers ("model.layers")."""
        lists = {name: module for name, module in self.model.named_modules() if isinstance(module, ModuleList)}
        return str(max(lists, key=lambda name: (len(lists[name]), -len(name))))

    @property
    def tied_head(self) -> str | None:
        """The output head's name, where it shares its weight with the input embeddings."""
        head = next((module.name for module in self.modules if module.head), None)
        return head if head and self.twins(f"{head}.weight") else None

    def twins(self, name: str) -> set[str]:
        """Other names that the tensor `name` goes by in the model."""
        ties = self.model.all_tied_weights_keys
        group = {ties.get(name, name)}
        return (group | {other for other, source in ties.items() if source in group}) - {name}


def open_base(folder: Path) -> Base:
    """Config, tokenizer and headers of a base model, or of a model that was exported.

    Raises:
        SpecError: not a folder.
        BaseModelError: as `base_model.load`.
    """
    if not folder.is_dir():
        raise SpecError(f"base_model: {folder} is not a folder", field="base_model")
    model = _outline(folder)
    tokenizer = base_model.load_tokenizer(folder, len(model.get_input_embeddings().weight))
    tensors = FolderTensors(folder, model)
    return Base(folder, read_json(folder / "config.json"), model, tensors, tokenizer, linear_modules(model))


def check(base: Base, deltas: Deltas, digest: str | None) -> str | None:
    """The base model's digest: the given one, or computed where the adapters say on which one they were trained.

    Raises:
        AdapterError: another base model; modules that it does not have, or has in other shapes.
    """
    deltas.check(base.modules)
    if deltas.plan.base_digest is None:
        return digest
    digest = digest or base_files.digest(base.folder)
    limits.check_digest(deltas.plan.base_digest, digest, base.folder.name)
    return digest


def pieces(base: Base, deltas: Deltas, dtype: str | None, quantization: str) -> list[Piece]:
    """What a merged model consists of: every stored tensor under its own name, and heads that are no longer tied.

    Args:
        dtype: "fp32", "fp16" or "bf16" for every tensor of floating-point numbers; None: as they are stored.
        quantization: "none", or what the linear layers but the head are quantised to and dequantised from.

    Raises:
        AdapterError: a weight that is stored in a form that nothing can be added to.
    """
    linear = {f"{module.name}.weight": module for module in base.modules}
    by_stored = {stored: name for name, stored in base.tensors.names.items()}
    targets = {f"{module}.weight" for module in deltas.modules}
    needed = targets | (
        {name for name, module in linear.items() if not module.head} if quantization != "none" else set()
    )
    if scattered := sorted(name for name in needed if not ({name} | base.twins(name)) & set(base.tensors.names)):
        raise AdapterError(
            f"{some(scattered)}: the base model's files hold it as a part of a tensor of another form, to which no "
            "delta can be added; export the adapter alone (peft-portable)"
        )
    names = base.tensors.names
    result = []
    for stored in sorted(base.tensors.stored):
        name = by_stored.get(stored, "")
        module = linear.get(name)
        result.append(
            _piece(base, stored, stored, dtype, module=module, targeted=name in targets, quantization=quantization)
        )
    for name in sorted(targets - set(names)):  # its twin is stored
        source = names[next(twin for twin in sorted(base.twins(name)) if twin in names)]
        result.append(_piece(base, name, source, dtype, module=linear[name], targeted=True, quantization=quantization))
    for name in sorted(targets & set(names)):  # its twins, stored under no name of their own, stay what they were
        result += [_piece(base, twin, names[name], dtype) for twin in sorted(base.twins(name) - set(names))]
    return result


def _piece(
    base: Base, name: str, stored: str, dtype: str | None, *, module: Module | None = None, targeted: bool = False,
    quantization: str = "none",
) -> Piece:  # fmt: skip
    """The tensor that the files have as `stored`, to be written as `name`; `module` whose weight it is."""
    path, entry = base.tensors.stored[stored]
    floating = entry.dtype in FLOATS
    kind = quantization if module is not None and not module.head else "none"
    if not floating and (targeted or kind != "none"):
        raise AdapterError(f"{name}: weights of type {entry.dtype} are not merged into; use the original weights")
    if not floating and dtype is not None and entry.dtype.startswith("F"):
        raise AdapterError(f"{name}: weights of type {entry.dtype} are not rounded to {dtype}; leave dtype out")
    return Piece(
        name=name,
        source=path,
        entry=entry,
        dtype=_STORED[dtype] if dtype and floating else entry.dtype,
        module=module.name if module is not None and targeted else None,
        transposed=module is not None and isinstance(base.model.get_submodule(module.name), Conv1D),
        quantization=kind,
    )


def _outline(folder: Path) -> Any:
    return base_model.outline(folder, quantization="none", compute_dtype="fp32").model
