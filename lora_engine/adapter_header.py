"""What an adapter folder says of itself, read from its config and the safetensors header before a tensor moves."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lora_engine import peft_config, strict_json
from lora_engine.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
LINEAGE = "lineage.json"
PREFIX = "base_model.model."
FACTORS = (".lora_A.weight", ".lora_B.weight")
_DTYPES = ("F32", "F16", "BF16")  # what fp32 holds exactly


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
    """An adapter folder, checked without reading a tensor."""

    folder: Path
    settings: peft_config.Settings
    modules: dict[str, ModuleHeader]
    base_digest: str | None

    @property
    def target_modules(self) -> tuple[str, ...]:
        return self.settings.target_modules or tuple(sorted(self.modules))


def inspect(folder: Path) -> Header:
    """Config and tensor shapes of an adapter folder.

    Raises:
        AdapterError: files missing or torn, a setting whose effect cannot be kept, tensors that do not fit the config.
    """
    settings = peft_config.parse(_load_json(folder / CONFIG))
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"{folder.name}: {WEIGHTS} is missing; other weight formats (.bin, .pt) are not read")
    shapes = _shapes(folder / WEIGHTS)
    modules = {name: _module_header(name, shapes, settings) for name in _module_names(shapes)}
    if not modules:
        raise AdapterError(f"{folder.name}: {WEIGHTS} holds no LoRA weights")
    for name in modules if settings.target_modules else ():
        if not any(targets(target, name) for target in settings.target_modules):
            raise AdapterError(f"{folder.name}: weights of {name}, which target_modules does not name")
    lineage = _load_json(folder / LINEAGE) if (folder / LINEAGE).exists() else {}
    return Header(folder, settings, modules, lineage.get("base_digest") if isinstance(lineage, dict) else None)


def targets(target: str, module: str) -> bool:
    """Whether an entry of `target_modules` names this module: in full, or by its last parts."""
    return module == target or module.endswith(f".{target}")


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            for key, item in slices.items():
                if item.get_dtype() not in _DTYPES:
                    raise AdapterError(f"{key}: weights of type {item.get_dtype()} are not read")
            return {key: tuple(item.get_shape()) for key, item in slices.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path.name}: {error}") from None


def _module_names(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    names = set()
    for key in shapes:
        factor = next((factor for factor in FACTORS if key.endswith(factor)), None)
        if factor is None or not key.startswith(PREFIX):
            raise AdapterError(f"{key}: not a LoRA weight of a linear layer")
        names.add(key.removeprefix(PREFIX).removesuffix(factor))
    return sorted(names)


def _module_header(module: str, shapes: Mapping[str, tuple[int, ...]], settings: peft_config.Settings) -> ModuleHeader:
    A, B = (shapes.get(f"{PREFIX}{module}{factor}") for factor in FACTORS)
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
