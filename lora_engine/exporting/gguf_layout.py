"""How llama.cpp names and orders the tensors of a model, for the families that this is known of exactly.

Llama's rotary embedding turns pairs (i, i + half) of a head's rows; llama.cpp turns neighbours instead. So in the
architectures that it inherits from Llama the rows of the query and key projections are written in another order:
within each head the first half and the second half alternate. An adapter's B has the same rows, and follows.
"""

from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.exporting import limits

# model_type of the config (`limits.GGUF_ADAPTERS`) → architecture, and whether rows of q and k are reordered.
_FAMILIES = {
    "llama": (gguf.MODEL_ARCH.LLAMA, True),
    "mistral": (gguf.MODEL_ARCH.LLAMA, True),
    "smollm3": (gguf.MODEL_ARCH.SMOLLM3, True),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, False),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, False),
    "gemma2": (gguf.MODEL_ARCH.GEMMA2, False),
    "gemma3_text": (gguf.MODEL_ARCH.GEMMA3, False),
    "phi3": (gguf.MODEL_ARCH.PHI3, False),
}


@dataclass(frozen=True, slots=True)
class GGUFLayout:
    """Of one model.

    Attributes:
        architecture: as `general.architecture` has it.
    """

    architecture: str
    _names: Any
    _reordered: bool
    _heads: int
    _key_heads: int

    def name(self, tensor: str) -> str:
        """The GGUF name of a tensor of the model ("model.layers.0.mlp.up_proj.weight").

        Raises:
            AdapterError: llama.cpp has no such tensor in this architecture.
        """
        found = self._names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AdapterError(f"{tensor}: llama.cpp has no such tensor in the architecture {self.architecture}")
        return str(found)

    def heads(self, tensor: str) -> int:
        """How many heads have their rows reordered in this tensor; 0: none."""
        if not self._reordered:
            return 0
        layer, _, _ = tensor.rpartition(".")  # without "weight" or "bias"
        return {"q_proj": self._heads, "k_proj": self._key_heads}.get(layer.rpartition(".")[2], 0)


def layout(config: Any) -> GGUFLayout:
    """Of a model, by its transformers config.

    Raises:
        AdapterError: a family whose tensors are not known here.
    """
    limits.check_gguf({"model_type": config.model_type})
    architecture, reordered = _FAMILIES[config.model_type]
    return GGUFLayout(
        architecture=gguf.MODEL_ARCH_NAMES[architecture],
        _names=gguf.get_tensor_name_map(architecture, config.num_hidden_layers),
        _reordered=reordered,
        _heads=config.num_attention_heads,
        _key_heads=config.num_key_value_heads,
    )


def reorder(rows: Tensor, heads: int) -> Tensor:
    """Rows of whole heads, `heads` of them, as llama.cpp has them: halves of each head alternate."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def restore(rows: Tensor, heads: int) -> Tensor:
    """The inverse of `reorder`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def stored_rows(count: int, heads: int) -> Tensor:
    """At which place of the reordered tensor each row lies, int64 (count)."""
    return restore(torch.arange(count), heads) if heads else torch.arange(count)
