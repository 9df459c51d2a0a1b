"""A frozen base model in memory, streamed from safetensors.

The architecture comes from transformers or, where the fast pass needs no more than its outline, from `skeleton`. It is
built on the meta device; each tensor is then read, cast or quantised, and put in its place, so that beside the finished
model only one tensor at a time is in memory. Code that comes with a model is never run.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine import skeleton
from lora_engine import tokenizer as tokenizers
from lora_engine.errors import BaseModelError
from lora_engine.quantized import LAYERS, QuantizedLinear
from lora_engine.target_modules import Module
from lora_engine.weights import Weights, read_json, some, stored_names


@dataclass(slots=True)
class BaseModel:
    """A loaded, frozen base model; it outlives the jobs that use it.

    Attributes:
        model: a transformers causal language model in evaluation mode.
        digest: `base_files.digest` of its folder, where the caller knows it.
        datasets: tokenised with its tokenizer, by what they were made from; the training loop's.
    """

    model: Any
    tokenizer: Any
    folder: Path
    device: torch.device
    quantization: str
    compute_dtype: torch.dtype
    digest: str | None = None
    datasets: dict[tuple[str, int], Any] = field(default_factory=dict, repr=False)


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
        quantization: "none", or "nf4" or "int8" for every linear layer but the output head. Experts that lie
            together in one tensor, as in most mixtures of experts, are no such layers and keep the compute dtype.
        compute_dtype: "fp32", "bf16", or "auto": bf16 on CUDA, fp32 on CPU.
        device: "auto" is the first CUDA device, or the CPU.

    Raises:
        BaseModelError: files are missing or torn, need code of their own, hold other tensors than the config says, or
            values that are not finite; or the tokenizer has more ids than there are embeddings.
    """
    place = device_of(device)
    dtype = _dtype(compute_dtype, place)
    model: Any = _skeleton(folder, dtype, place)
    if model is None:
        model = architecture(folder, dtype)
    _fill(model, Weights(folder, model), place, quantization)
    if not isinstance(model, skeleton.Skeleton):
        rebuild_buffers(model, place)
    model.eval()
    model.requires_grad_(False)
    tokenizer = load_tokenizer(folder, len(model.get_input_embeddings().weight))
    return BaseModel(model, tokenizer, folder, place, quantization, dtype, digest)


def outline(folder: Path, *, quantization: str, compute_dtype: str) -> BaseModel:
    """A base model known by its config alone: on the meta device, with shapes and no values, without a tokenizer.

    Raises:
        BaseModelError: the config is not one of a causal language model that transformers knows.
    """
    meta = torch.device("meta")
    model = architecture(folder, _dtype(compute_dtype, meta))
    if quantization != "none":
        for module in linear_modules(model):
            if not module.head:
                plain = model.get_submodule(module.name)
                model.set_submodule(module.name, _quantized(plain, plain.weight, quantization))
    model.requires_grad_(False)
    return BaseModel(model, None, folder, meta, quantization, _dtype(compute_dtype, meta))


def describe(folder: Path) -> Description:
    """Read the architecture off the config, and from the files' headers whether they fit it; no tensor is loaded.

    Raises:
        BaseModelError: as `load`.
    """
    model = architecture(folder, torch.float32)
    if any(folder.glob("*.safetensors")):
        Weights(folder, model)
    return Description(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        context_length=context_length(model),
        modules=linear_modules(model),
    )


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
    if isinstance(module, nn.Linear | QuantizedLinear):
        return module.out_features, module.in_features
    if _is_transposed(module):
        return module.nf, module.nx  # type: ignore[return-value]
    return None


def _is_transposed(module: nn.Module) -> bool:
    """transformers' Conv1D, the linear layer of GPT-2, whose weight lies in × out."""
    return type(module).__name__ == "Conv1D"


def device_of(name: str) -> torch.device:
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


def _skeleton(folder: Path, dtype: torch.dtype, device: torch.device) -> skeleton.Skeleton | None:
    """The model without transformers, where that is possible."""
    values = _config_values(folder)
    if skeleton.config_of(values) is None:
        return None
    return skeleton.build(values, stored_names(folder), folder, dtype, device)


def architecture(folder: Path, dtype: torch.dtype) -> Any:
    """transformers' model of a folder's config, on the meta device.

    Raises:
        BaseModelError: the config is not one of a causal language model that transformers knows.
    """
    # Seconds of import, which training of the common families does without.
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    _config_values(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.tie_weights()
        return model
    except Exception as error:  # a config that does not fit together fails in ways of its own
        raise BaseModelError(f"not a causal language model that transformers knows: {error}") from error


def _config_values(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    if "auto_map" in values:
        raise BaseModelError("the model needs code of its own (auto_map in config.json), which is never run")
    if "/" in str(values.get("attn_implementation", values.get("_attn_implementation", ""))):
        raise BaseModelError("the config asks for an attention kernel from elsewhere, which is never loaded")
    if values.get("quantization_config"):
        raise BaseModelError("the weights are quantised already; use the model's original weights")
    return values


def load_tokenizer(folder: Path, embeddings: int) -> Any:
    """The tokenizer of a base model with so many embeddings.

    Raises:
        BaseModelError: it needs code of its own, cannot be loaded, or has more ids than there are embeddings.
    """
    config = folder / "tokenizer_config.json"
    if config.exists() and "auto_map" in read_json(config):
        raise BaseModelError("the tokenizer needs code of its own (auto_map), which is never run")
    tokenizer: Any = tokenizers.read(folder) or _automatic_tokenizer(folder)
    # Special tokens that no text needs may lie beyond: Gemma 3 without vision has one. `data.py` looks at each example.
    needed = [tokenizer.vocab_size - 1, tokenizer.bos_token_id, tokenizer.eos_token_id]
    needed += [number for number, token in tokenizer.added_tokens_decoder.items() if not token.special]
    highest = max(number for number in needed if number is not None)
    if highest >= embeddings:
        raise BaseModelError(
            f"the tokenizer has ids up to {highest}, but the model only {embeddings} embeddings: use the model's own "
            "tokenizer, or resize the embeddings (resize_token_embeddings in transformers) and save both together"
        )
    return tokenizer


def _automatic_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"the tokenizer cannot be loaded: {error}") from error


def _fill(model: Any, weights: Weights, device: torch.device, quantization: str) -> None:
    head = model.get_output_embeddings()
    for name, tensor in weights.tensors(device):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if quantization != "none" and leaf == "weight" and module is not head and linear_shape(module):
            model.set_submodule(path, _quantized(module, tensor, quantization))
        else:
            place(module, leaf, tensor)
    model.tie_weights(missing_keys=weights.missing, recompute_mapping=False)


def place(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `leaf` of `module`, frozen, as loaded."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # so that `rebuild_buffers` leaves it alone
    if leaf in module._parameters:
        parameter = nn.Parameter(tensor, requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[leaf] = parameter
    else:
        module._buffers[leaf] = tensor


def _quantized(module: nn.Module, weight: Tensor, quantization: str) -> QuantizedLinear:
    oriented = weight.t().contiguous() if _is_transposed(module) else weight
    return LAYERS[quantization](oriented, module._parameters.get("bias"), weight.dtype)


def rebuild_buffers(model: Any, device: torch.device) -> None:
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
        raise BaseModelError(f"transformers does not say how to compute the buffers {some(empty)}")
