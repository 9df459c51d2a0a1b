"""A tiny random model of every family the engine is tested on, with what is particular to the family made to matter.

Windows are shorter than a test's rows, caps as small as the scores they cap, heads wider than hidden / heads, and norms
and biases far from one and zero: a path that leaves one of them out gives other numbers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_model import make_tokenizer, token_ids

_SPREAD = 0.3  # of norm weights and biases around the values they are initialised to
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LLAMA3_ROPE = {  # wavelengths of 6, 63, 628 … tokens: one kept, one between the two, the others stretched
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _family(config_name: str, **own: Any) -> Callable[[Path], Path]:
    """Makes the folder of a model whose config is a `config_name` with the fields `own`."""

    def make(folder: Path) -> Path:
        tokenizer = make_tokenizer()
        common = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
        }
        config = getattr(transformers, config_name)(**{**common, **own, **token_ids(tokenizer)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.data += _SPREAD * torch.randn_like(parameter)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llama": _family("LlamaConfig"),
    "llama3": _family("LlamaConfig", rope_parameters=_LLAMA3_ROPE),
    "mistral": _family("MistralConfig", sliding_window=8),
    "qwen2": _family("Qwen2Config"),
    "qwen3": _family("Qwen3Config", head_dim=16),
    "gemma2": _family(
        "Gemma2Config",
        num_hidden_layers=3,
        layer_types=_GEMMA_LAYERS,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=4.0,
        tie_word_embeddings=True,
    ),
    "gemma3": _family(
        "Gemma3TextConfig",
        num_hidden_layers=3,
        layer_types=_GEMMA_LAYERS,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        rope_parameters={
            "sliding_attention": _ROPE,
            "full_attention": {"rope_type": "linear", "rope_theta": 100_000.0, "factor": 8.0},
        },
        tie_word_embeddings=True,
    ),
    "phi3": _family("Phi3Config", sliding_window=8),
    "phi4": _family("Phi3Config", rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}),
    "smollm2": _family("LlamaConfig", tie_word_embeddings=True),
    "smollm3": _family("SmolLM3Config", num_hidden_layers=4, no_rope_layers=[1, 0, 1, 0], tie_word_embeddings=True),
    "gpt2": _family("GPT2Config", tie_word_embeddings=True),
    "mixtral": _family("MixtralConfig", num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "qwen3_moe": _family(
        "Qwen3MoeConfig",
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
}
