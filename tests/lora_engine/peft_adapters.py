"""Adapters as PEFT itself makes and saves them, with random weights on a two-layer model."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

IDS = torch.arange(3, 19)[None]


def base_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_random(folder: Path, seed: int, base_name: str = "tests/tiny", **settings: Any) -> Path:
    """Save a PEFT adapter of these LoraConfig settings with A and B random."""
    base = base_model()
    base.name_or_path = base_name
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    return folder


def logits(folder: Path) -> torch.Tensor:
    """What stock PEFT computes with the adapter in `folder`."""
    model = PeftModel.from_pretrained(base_model(), str(folder)).eval()
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Stock PEFT's scaling · B · A in fp64, by full module name."""
    model = PeftModel.from_pretrained(base_model(), str(folder)).base_model.model
    result = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            result[name] = (module.scaling["default"] * (B @ A)).detach()
    return result
