"""What an adapter folder says of itself, read from its config and the safetensors header before a tensor moves."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine import peft_config, strict_json
from lora_engine.errors import AdapterError
from lora_engine.name_patterns import NAME, ends
from lora_engine.safetensors_file import FLOATS, Entry, read_header

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, slots=True)
class ModuleHeader:
    """One module as its file's header has it; `scaling` multiplies B·A."""

    rank: int
    inputs: int
    outputs: int
    alpha: float
    scaling: float


@dataclass(frozen=True, slots=True)
class Header:
    """An adapter folder, checked without reading a tensor. `tensors` says where in `WEIGHTS` each one lies."""

    folder: Path
    settings: peft_config.Settings
    modules: dict[str, ModuleHeader]
    base_digest: str | None
    tensors: Mapping[str, Entry]

    @property
    def target_modules(self) -> tuple[str, ...]:
        return self.settings.target_modules or tuple(sorted(self.modules))


def inspect(folder: Path) -> Header:
    """Config and tensor shapes of an adapter folder.

    Raises:
        AdapterError: files missing or torn, a setting whose effect cannot be kept, tensors that do not fit the config.
    """
    config = _load_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder.name}: {WEIGHTS} is missing; other weight formats (.bin, .pt) are not read")
    lineage = _load_json(folder / LINEAGE) if (folder / LINEAGE).exists() else {}
    return check(folder, config, read_header(folder / WEIGHTS), lineage)


def check(folder: Path, config: Any, tensors: Mapping[str, Entry], lineage: Any) -> Header:
    """As `inspect`, of what was read already: the decoded config and lineage, and the entries of the weights' header.

    The files need not be there: a service reads the first bytes of what lies in its storage.

    Raises:
        AdapterError: as `inspect` does.
    """
    settings = peft_config.parse(config)
    for key, entry in tensors.items():
        if entry.dtype not in FLOATS:
            raise AdapterError(f"{key}: weights of type {entry.dtype} are not read")
    modules = {name: _module_header(name, tensors, settings) for name in _module_names(tensors)}
    if not modules:
        raise AdapterError(f"{folder.name}: {WEIGHTS} holds no LoRA weights")
    named = set(settings.target_modules)
    for name in modules if named else ():
        if named.isdisjoint(ends(name)):
            raise AdapterError(f"{folder.name}: weights of {name}, which target_modules does not name")
    base_digest = lineage.get("base_digest") if isinstance(lineage, dict) else None
    if not isinstance(base_digest, str | None):
        raise AdapterError(f"{folder.name}: {LINEAGE}: base_digest is not a string")
    return Header(folder, settings, modules, base_digest, tensors)


def digest(folder: Path) -> str:
    """SHA-256 over what the adapter computes with: its config and its weights, by name and content."""
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            total.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


def targets(target: str, module: str) -> bool:
    """Whether an entry of `target_modules` names this module: in full, or by its last parts."""
    return module == target or module.endswith(f".{target}")


def _module_names(tensors: Mapping[str, Entry]) -> list[str]:
    names = set()
    for key in tensors:
        factor = next((factor for factor in FACTORS if key.endswith(factor)), None)
        if factor is None or not key.startswith(PREFIX):
            raise AdapterError(f"{key}: not a LoRA weight of a linear layer")
        names.add(key.removeprefix(PREFIX).removesuffix(factor))
        if not NAME.fullmatch(key):
            raise AdapterError(f"{key}: not the name of a module")
    return sorted(names)


def _module_header(module: str, tensors: Mapping[str, Entry], settings: peft_config.Settings) -> ModuleHeader:
    A, B = (tensors[key].shape if (key := f"{PREFIX}{module}{factor}") in tensors else None for factor in FACTORS)
    if A is None or B is None:
        raise AdapterError(f"{module}: {'lora_A' if A is None else 'lora_B'} is missing")
    rank, alpha = settings.rank_of(module), settings.alpha_of(module)
    if len(A) != 2 or len(B) != 2 or A[0] != rank or B[1] != rank:
        raise AdapterError(f"{module}: A {A} and B {B} do not have the config's rank {rank}")
    return ModuleHeader(rank, A[1], B[0], alpha, peft_config.scaling_of(rank, alpha, settings.use_rslora))


def _load_json(path: Path) -> Any:
    try:
        return strict_json.loads(path.read_bytes())
    except OSError:
        raise AdapterError(f"{path.parent.name}: {path.name} is missing or unreadable") from None
    except strict_json.StrictJSONError as error:
        raise AdapterError(f"{path.name}: {error}") from None
