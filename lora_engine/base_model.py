"""A frozen base model in memory, streamed from safetensors.

The architecture comes from transformers, built on the meta device; each tensor is then read, cast or quantised, and
put in its place, so that beside the finished model only one tensor at a time is in memory. Code that comes with a model
is never run.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

from lora_engine import strict_json
from lora_engine.errors import BaseModelError
from lora_engine.nf4 import NF4Linear

# Rotary frequencies are computed, not loaded; old checkpoints still carry them.
_COMPUTED = re.compile(r"rotary_emb\.inv_freq$")


@dataclass(slots=True)
class BaseModel:
    """A loaded, frozen base model; it outlives the jobs that use it.

    Attributes:
        model: a transformers causal language model in evaluation mode.
        digest: `base_files.digest` of its folder, where the caller knows it.
    """

    model: Any
    tokenizer: Any
    folder: Path
    device: torch.device
    quantization: str
    compute_dtype: torch.dtype
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer that can be adapted: y (outputs) = W · x (inputs). `head` marks the output head."""

    name: str
    inputs: int
    outputs: int
    head: bool


@dataclass(frozen=True, slots=True)
class Description:
    """What a base model is, known from its config alone."""

    architecture: str
    parameters: int
    context_length: int | None
    modules: tuple[Module, ...]


def load(
    folder: Path,
    *,
    quantization: str = "none",
    compute_dtype: str = "auto",
    device: str = "auto",
    digest: str | None = None,
) -> BaseModel:
    """Load a base model and its tokenizer.

    Args:
        quantization: "none", or "nf4" for every linear layer but the output head.
        compute_dtype: "fp32", "bf16", or "auto": bf16 on CUDA, fp32 on CPU.
        device: "auto" is the first CUDA device, or the CPU.

    Raises:
        BaseModelError: files are missing, torn, of another shape than the config says, or need code of their own.
    """
    place = _device(device)
    dtype = _dtype(compute_dtype, place)
    model = _skeleton(folder, dtype)
    _fill(model, folder, place, dtype, quantization == "nf4")
    _rebuild_buffers(model, place)
    model.eval()
    model.requires_grad_(False)
    return BaseModel(model, _tokenizer(folder), folder, place, quantization, dtype, digest)


def describe(folder: Path) -> Description:
    """Read the architecture off the config, and from the files' headers whether they fit it; no tensor is loaded.

    Raises:
        BaseModelError: as `load`.
    """
    model = _skeleton(folder, torch.float32)
    if any(folder.glob("*.safetensors")):
        _check_names(model, folder)
    return Description(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_length=context_length(model),
        modules=linear_modules(model),
    )


def _check_names(model: Any, folder: Path) -> None:
    expected, renamings = model.state_dict(), _renamings(model)
    stored: set[str] = set()
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                stored |= set(shard.keys())
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{path.name} cannot be read: {error}") from None
    known = {_name_in_model(name, expected, model.base_model_prefix, renamings) for name in stored}
    tied = set(model.all_tied_weights_keys)
    if missing := set(expected) - known - tied:
        raise BaseModelError(f"tensors missing: {_some(missing)}")


def context_length(model: Any) -> int | None:
    """The longest sequence, in tokens, that the model's positions are made for, where the config says."""
    config = model.config.get_text_config()
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def linear_modules(model: Any) -> tuple[Module, ...]:
    """Every linear layer of `model`, in its own order."""
    head = model.get_output_embeddings()
    found = ((name, module, linear_shape(module)) for name, module in model.named_modules())
    return tuple(Module(name, shape[1], shape[0], module is head) for name, module, shape in found if shape)


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear layer of any kind we know, None for anything else."""
    if isinstance(module, nn.Linear | NF4Linear):
        return module.out_features, module.in_features
    if isinstance(module, Conv1D):  # GPT-2's: the weight lies in × out
        return module.nf, module.nx
    return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BaseModelError(f"device {name!r} cannot be used: {error}") from None
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = strict_json.loads(path.read_bytes())
    except (OSError, strict_json.StrictJSONError) as error:
        raise BaseModelError(f"{path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise BaseModelError(f"{path.name} is not a JSON object")
    return value


def _skeleton(folder: Path, dtype: torch.dtype) -> Any:
    values = _read_json(folder / "config.json")
    if "auto_map" in values:
        raise BaseModelError("the model needs code of its own (auto_map in config.json), which is never run")
    if "/" in str(values.get("attn_implementation", values.get("_attn_implementation", ""))):
        raise BaseModelError("the config asks for an attention kernel from elsewhere, which is never loaded")
    if values.get("quantization_config"):
        raise BaseModelError("the weights are quantised already; use the model's original weights")
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # a config that does not fit together fails in ways of its own
        raise BaseModelError(f"not a causal language model that transformers knows: {error}") from error


def _tokenizer(folder: Path) -> Any:
    config = folder / "tokenizer_config.json"
    if config.exists() and "auto_map" in _read_json(config):
        raise BaseModelError("the tokenizer needs code of its own (auto_map), which is never run")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"the tokenizer cannot be loaded: {error}") from error


def _shards(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    weight_map = _read_json(index).get("weight_map")
    names: list[Any] = list(weight_map.values()) if isinstance(weight_map, dict) else [None]
    # Other names would escape the folder, or the hashes that pin it.
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise BaseModelError("model.safetensors.index.json: it names files outside its folder, or no safetensors")
    return [folder / name for name in sorted(set(names))]


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in _shards(folder):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (the handle cannot be iterated)
                    yield name, shard.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise BaseModelError(f"{path.name} cannot be read: {error}") from None


def _fill(model: Any, folder: Path, device: torch.device, dtype: torch.dtype, quantize: bool) -> None:
    expected = model.state_dict()
    head = model.get_output_embeddings()
    missing, unexpected = set(expected), []
    renamings = _renamings(model)
    for stored_name, tensor in _tensors(folder):
        name = _name_in_model(stored_name, expected, model.base_model_prefix, renamings)
        if name is None:
            unexpected.append(stored_name)
            continue
        if tensor.shape != expected[name].shape:
            shapes = f"{list(tensor.shape)} instead of {list(expected[name].shape)}"
            raise BaseModelError(f"tensor {stored_name} has shape {shapes}")
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        # A copy, always: pages of the mapped file would otherwise stay resident beside the model.
        placed = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        missing.discard(name)
        if quantize and leaf == "weight" and module is not head and linear_shape(module):
            _quantize(model, path, module, placed, dtype)
        else:
            _place(module, leaf, placed)
    _ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), _COMPUTED.pattern]
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in _ignored)]
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing or unexpected:
        raise BaseModelError(f"tensors missing: {_some(missing)}; not in the architecture: {_some(unexpected)}")


def _renamings(model: Any) -> list[WeightRenaming]:
    """What transformers renames in the files of this architecture.

    Raises:
        BaseModelError: it also computes tensors anew (fused experts), which is not done here.
    """
    transforms = get_model_conversion_mapping(model)
    if any(isinstance(transform, WeightConverter) for transform in transforms):
        raise BaseModelError(
            f"{type(model).__name__}: its files hold experts that have to be fused, which is not supported"
        )
    return [transform for transform in transforms if isinstance(transform, WeightRenaming)]


def _name_in_model(
    name: str, expected: dict[str, Tensor], prefix: str, renamings: Sequence[WeightRenaming]
) -> str | None:
    """Checkpoints of a bare trunk leave the prefix out ("h.0.…"); those of a headed model have it."""
    renamed = name
    for renaming in renamings:
        renamed = renaming.rename_source_key(renamed)[0]
    candidates = (name, renamed, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((candidate for candidate in candidates if candidate in expected), None)


def _place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # so that `_rebuild_buffers` leaves it alone
    if leaf in module._parameters:
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[leaf] = parameter
    else:
        module._buffers[leaf] = tensor


def _quantize(model: Any, path: str, module: nn.Module, weight: Tensor, dtype: torch.dtype) -> None:
    oriented = weight.t().contiguous() if isinstance(module, Conv1D) else weight
    bias = module._parameters.get("bias")
    model.set_submodule(path, NF4Linear(oriented, bias, dtype))


def _rebuild_buffers(model: Any, device: torch.device) -> None:
    """Compute what is in no file: rotary frequencies, masks. transformers' own initialisation knows how."""
    for module in model.modules():
        module._is_hf_initialized = True
    rebuilt = {name: buffer for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta}
    for name, buffer in rebuilt.items():
        path, _, leaf = name.rpartition(".")
        # NaN where it fits: what nobody fills must not pass for a value.
        fill = float("nan") if buffer.is_floating_point() else 0
        model.get_submodule(path)._buffers[leaf] = torch.full_like(buffer, fill, device=device)
        parts = path.split(".")
        # Some buffers are filled by a module further up. Loaded tensors carry a mark of their own.
        for depth in range(len(parts) + 1):
            model.get_submodule(".".join(parts[:depth]))._is_hf_initialized = False
    model.initialize_weights()
    buffers = dict(model.named_buffers())
    empty = [name for name in rebuilt if buffers[name].is_floating_point() and buffers[name].isnan().any()]
    if empty:
        raise BaseModelError(f"transformers does not say how to compute the buffers {_some(empty)}")


def _some(names: Any) -> str:
    listed = sorted(names)
    shown = ", ".join(listed[:5]) or "none"
    return shown + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
