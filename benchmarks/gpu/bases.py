"""Base models with random weights made on the device: nothing is downloaded, and nothing passes through the host.

Ours and the peers' get the same values: a tensor is a function of its name.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_engine import base_model, lora, skeleton
from lora_engine.base_model import BaseModel
from lora_engine.quantized import LAYERS, QuantizedLinear

_SHARD_BYTES = 4 << 30
_DEVIATION = 0.02


def tensors(shapes: dict[str, torch.Size], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """(name, bf16 tensor): norms are ones, everything else is normal with transformers' deviation."""
    for name, shape in shapes.items():
        if name.endswith("norm.weight"):
            yield name, torch.ones(shape, dtype=torch.bfloat16, device=device)
            continue
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        generator = torch.Generator(device).manual_seed(seed)
        values = torch.randn(shape, generator=generator, dtype=torch.bfloat16, device=device)
        yield name, values.mul_(_DEVIATION)


def ours(folder: Path, quantization: str, device: torch.device) -> BaseModel:
    """A base model of `folder`'s config as the engine has it after loading; without a tokenizer."""
    model = _skeleton(folder, device)
    for name, tensor in tensors(_shapes(model), device):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if quantization != "none" and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(path, LAYERS[quantization](tensor, None, tensor.dtype))
        else:
            base_model.place(module, leaf, tensor)
    model.eval().requires_grad_(False)
    return BaseModel(model, None, folder, device, quantization, torch.bfloat16)


def theirs(folder: Path, quantization: str, device: torch.device, attention: str = "sdpa") -> Any:
    """transformers' model with the same values, quantised by bitsandbytes where asked for."""
    model = base_model.architecture(folder, torch.bfloat16)
    for name, tensor in tensors(_shapes(model), device):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if quantization == "nf4" and isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            model.set_submodule(path, _four_bit(tensor, device))
        else:
            base_model.place(module, leaf, tensor)
    base_model.rebuild_buffers(model, device)
    model.set_attn_implementation(attention)
    model.requires_grad_(False)
    if quantization == "nf4":
        model.is_loaded_in_4bit = True  # as transformers' own loading marks it, for PEFT
    return model


def dequantised(base: BaseModel) -> dict[str, Tensor]:
    """fp32 weights by name, quantised ones as they are computed with."""
    found = {name: tensor.float() for name, tensor in base.model.state_dict().items()}
    layers = ((name, item) for name, item in base.model.named_modules() if isinstance(item, QuantizedLinear))
    return found | {f"{name}.weight": layer.dequantized().float() for name, layer in layers}


def write_folder(folder: Path, device: torch.device, tokenizer: Any) -> Path:
    """Fill a folder that holds a config with the same weights, in shards, and a tokenizer; the folder."""
    shapes = _shapes(_skeleton(folder, device))
    tokenizer.save_pretrained(folder)
    places: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors(shapes, device):
        shard[name] = tensor.cpu()
        size += tensor.nbytes
        if size > _SHARD_BYTES or name == list(shapes)[-1]:
            file = f"model-{len(set(places.values())):05}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
            shard, size = {}, 0
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_initial(path: Path, folder: Path, rank: int) -> Path:
    """The engine's own first A of every module, for the peers; the file."""
    modules = [module for module in base_model.describe(folder).modules if not module.head]
    save_file({module.name: lora.initial_factor(0, module.name, rank, module.inputs) for module in modules}, path)
    return path


def _skeleton(folder: Path, device: torch.device) -> skeleton.Skeleton:
    config = skeleton.config_of(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert config is not None
    with torch.device("meta"):
        model = skeleton.Skeleton(config, folder).to(torch.bfloat16)
    model.model.rotary_emb = skeleton.Rotary(config, device)
    return model


def _shapes(model: Any) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _four_bit(weight: Tensor, device: torch.device) -> Any:
    import bitsandbytes

    outputs, inputs = weight.shape
    layer = bitsandbytes.nn.Linear4bit(
        inputs, outputs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True,
        device="meta",
    )  # fmt: skip
    parameter = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    )
    layer.weight = parameter.to(device)
    return layer
