"""Models by their shapes alone, and the sizes at which they are measured."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _llama(vocabulary: int, inner: int, key_heads: int, theta: float, longest: int, **sizes: int) -> dict[str, Any]:
    shape: dict[str, Any] = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32} | sizes
    return shape | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "intermediate_size": inner,
        "num_key_value_heads": key_heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": longest,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "bfloat16",
    }


# config.json by name; `small` is for correctness, `toy` stands for the large ones where there is no GPU.
MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _llama(32_000, 11_008, 32, 1e4, 4096),
    "llama-3-8b": _llama(128_256, 14_336, 8, 5e5, 8192),
    "small": _llama(1024, 512, 2, 1e4, 512, hidden_size=256, num_hidden_layers=4, num_attention_heads=4),
    "toy": _llama(512, 128, 2, 1e4, 512, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
}
# LitGPT's names of them.
LITGPT = {"llama-2-7b": "Llama-2-7b-hf", "llama-3-8b": "Llama-3-8B"}
ALPACA = "alpaca"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """What a run measures.

    Attributes:
        seven, eight: the models that stand for 7B and 8B.
        lengths: of documents in tokens, beside Alpaca's; `memory` is the one of the article's first row.
        tokens: of one optimizer step.
        steps: timed ones of a cell; `rounds` of `run` steps each against peers.
        epoch: examples of the article's epoch, of which `share` are trained on.
    """

    seven: str
    eight: str
    lengths: tuple[int, ...]
    memory: int
    ranks: tuple[int, ...]
    tokens: int
    steps: int
    rounds: int
    run: int
    epoch: int
    article_batch: int
    share: float = 0.1


FULL = Scale(
    seven="llama-2-7b", eight="llama-3-8b", lengths=(512, 1304, 2048), memory=1304, ranks=(16, 8, 256), tokens=8192,
    steps=8, rounds=4, run=4, epoch=52_002, article_batch=128,
)  # fmt: skip
TOY = Scale(
    seven="toy", eight="toy", lengths=(32, 64), memory=32, ranks=(4, 8), tokens=128, steps=2, rounds=2, run=1,
    epoch=80, article_batch=8,
)  # fmt: skip


def write_config(folder: Path, name: str) -> Path:
    """A model folder that holds nothing but its config; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name], indent=1), encoding="utf-8")
    return folder
