"""Adapters as files: PEFT's LoRA layout, written so that every loader computes the same delta. No torch.

    adapter_config.json         PEFT's config, in the portable profile of `peft_config.portable`
    adapter_model.safetensors   base_model.model.<module>.lora_A.weight (rank × in) and .lora_B.weight (out × rank)
    README.md                   the model card
    lineage.json                base model's name and digest, and how the adapter came to be

Same adapter, same bytes: no time stamps, keys in a fixed order.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_engine import peft_config, safetensors_file
from lora_engine.adapter_header import CONFIG, FACTORS, LINEAGE, PREFIX, WEIGHTS, Header
from lora_engine.errors import AdapterError
from lora_engine.folders import published
from lora_engine.safetensors_file import Array


def load_module(header: Header, module: str) -> tuple[Array, Array]:
    """A (rank × in) and B (out × rank) of one module, fp32, in memory of their own.

    Raises:
        AdapterError: a value that is not finite, or the file cannot be read.
    """
    import numpy as np

    keys = [f"{PREFIX}{module}{factor}" for factor in FACTORS]
    A, B = (safetensors_file.read_array(header.folder / WEIGHTS, header.tensors[key]) for key in keys)
    for key, array in zip(keys, (A, B), strict=True):
        if not np.isfinite(array).all():
            raise AdapterError(f"{key}: weights are not finite")
    return A, B


def write(
    folder: Path,
    weights: Mapping[str, tuple[Array, Array]],
    *,
    alpha: int,
    base_model_name: str,
    base_digest: str | None,
    target_modules: Sequence[str],
    lineage: Mapping[str, Any],
    files: Mapping[str, str] | None = None,
    notes: str = "",
) -> None:
    """Write an adapter of one rank; all of it appears, or nothing.

    Args:
        weights: module name → A (rank × in) and B (out × rank), fp32, of the same rank everywhere.
        alpha: of every module; what multiplies B·A is alpha / rank.
        target_modules: last names that stand for exactly these modules in the base; empty: the full names.
        lineage: what `lineage.json` says beside the base model.
        files: texts by name, to lie beside the adapter.
        notes: Markdown, to end the model card with.

    Raises:
        AdapterError: ranks that differ, a value that is not finite.
    """
    ranks = {rank for A, B in weights.values() for rank in (A.shape[0], B.shape[1])}
    if len(ranks) != 1:
        raise AdapterError(f"an adapter is written with one rank, these modules have {sorted(ranks)}")
    config = peft_config.portable(ranks.pop(), alpha, base_model_name, sorted(set(target_modules) or weights))
    facts = {"base_model": base_model_name, "base_digest": base_digest, **lineage}
    arrays = {
        f"{PREFIX}{name}{key}": item for name, pair in weights.items() for key, item in zip(FACTORS, pair, strict=True)
    }
    card = _card(config) + (f"\n{notes}" if notes else "")
    publish(folder, config, arrays, lineage=facts, files={**(files or {}), "README.md": card})


def publish(
    folder: Path,
    config: Mapping[str, Any],
    arrays: Mapping[str, Array],
    *,
    dtype: str = "F32",
    lineage: Mapping[str, Any],
    files: Mapping[str, str],
) -> None:
    """Write config, weights (as safetensors' `dtype`), lineage and other texts; all of it appears, or nothing."""
    with published(folder) as temporary:
        safetensors_file.write(temporary / WEIGHTS, arrays, {"format": "pt"}, dtype)
        texts = {CONFIG: dump_json(config), LINEAGE: dump_json(dict(sorted(lineage.items()))), **files}
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8")


def dump_json(value: Any) -> str:
    """As the files of an adapter have it; not sorted, as of several entries of a rank pattern the first one counts."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _card(config: Mapping[str, Any]) -> str:
    base_model, names = config["base_model_name_or_path"], config["target_modules"]
    return f"""---
base_model: {json.dumps(base_model)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
---

# A LoRA adapter for {base_model}

Rank {config["r"]}, alpha {config["lora_alpha"]}, on {", ".join(names[:8])}{" …" if names[8:] else ""}.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(base_model)})
model = PeftModel.from_pretrained(base, "this folder")
```

`lineage.json` says how it came to be.
"""
