"""The model card and the lineage of an export."""

import json
from collections.abc import Mapping
from typing import Any

from lora_engine.exporting.deltas import Deltas

_USE = {
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "this folder")""",
    "merged": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")""",
    "gguf": "llama-cli -m base.gguf --lora adapter.gguf",
    "gguf-merged": "llama-cli -m model.gguf",
    "mlx": "mlx_lm.generate --model {base} --adapter-path .",
}


def text(facts: Mapping[str, Any]) -> str:
    """Markdown with the front matter that the Hugging Face hub reads; `facts` are the export's metrics."""
    base, parity = facts["base_model"], facts["parity"]
    kind = "peft" if facts["format"] == "peft-portable" else facts["format"]
    whole = kind in ("merged", "gguf-merged")
    use = _USE[kind].format(base=json.dumps(base))
    trained_on = f"as trained ({facts['trained_on']} weights; these are {facts['base']})"
    if facts["trained_on"] == "unknown":
        trained_on = f"on {facts['base']} weights (what the adapters were trained on is not known; of QLoRA say nf4)"
    return f"""---
base_model: {json.dumps(base)}
base_model_relation: {"merge" if whole else "adapter"}
pipeline_tag: text-generation
tags:
- lora
---

# {base} with LoRA adapters{" in its weights" if whole else ""}, exported as {facts["format"]} ({facts["precision"]})

```
{use}
```

| adapter (SHA-256) | weight |
|---|---|
{_rows(facts)}

Against base model and adapters {trained_on}, over \
{parity["predictions"]} predictions: largest log-probability gap {parity["max_gap"]:.2e}, mean \
{parity["mean_gap"]:.2e}, KL divergence {parity["kl"]:.2e}, same most likely token {parity["greedy_agreement"]:.1%}.
`certificate.json` has all figures.
"""


def lineage(facts: Mapping[str, Any], deltas: Deltas) -> dict[str, Any]:
    """What `lineage.json` says of it; how the adapters were trained, where they say."""
    names = ("base_digest", "base_model", "engine", "method", "parents")
    return {
        **{name: facts[name] for name in names},
        "export": {name: facts[name] for name in ("format", "precision", "base")},
        "recipe": deltas.plan.recipe,
    } | ({} if deltas.quantization is None else {"training": {"quantization": deltas.quantization}})


def _rows(facts: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| `{parent['digest']}` | {parent['weight']:g}"
        + "".join(f", {name} {weight:g}" for name, weight in parent.get("weights", {}).items())
        + " |"
        for parent in facts["parents"]
    )
