"""Our first A for PEFT models in any environment."""

from typing import Any

import torch
from safetensors.torch import load_file


@torch.no_grad()
def copy_initial(model: Any, path: str) -> None:
    """Give each adapted module of a PEFT model our initial A; B is zero in both."""
    factors = load_file(path)
    for name, parameter in model.named_parameters():
        module, found, _ = name.partition(".lora_A.")
        if found:
            parameter.copy_(factors.pop(module.removeprefix("base_model.model.")))
    if factors:
        raise SystemExit(f"not adapted: {sorted(factors)[:5]}")
