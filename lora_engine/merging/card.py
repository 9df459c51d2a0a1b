"""The model card of a merged adapter: what it was made of, and how exact it is. No torch."""

import json
from collections.abc import Mapping
from typing import Any

from lora_engine.merging.recipe import digest
from lora_engine.merging.sources import Plan

_NATIVE = """
Its modules have ranks of their own, which PEFT alone reads; export it as `peft-portable` for other servers.
"""


def text(plan: Plan, rank: int, totals: Mapping[str, Any], *, native: bool) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    base = plan.base_model_name
    recipe = plan.recipe
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- merge
---

# A LoRA adapter for {base}

{len({source.digest for source in plan.sources})} adapters merged by `{plan.config.method}` into one of rank {rank}.
{_NATIVE if native else ""}
| adapter (SHA-256) | weight | by module |
|---|---|---|
{_rows(recipe)}

| relative error | Frobenius | spectral |
|---|---|---|
| against the method's exact result | {_number(totals["frobenius"])} | {_number(totals["spectral"])} |
| against the weighted sum of the adapters | {_number(totals["sum_frobenius"])} | {_number(totals["sum_spectral"])} |
| of which rounding to {plan.config.options["dtype"]} | {_number(totals["rounding"])} | |

`certificate.json` has this for every module, `lineage.json` the recipe (`{digest(recipe)[:16]}…`).

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})
model = PeftModel.from_pretrained(base, "this folder")
```
"""


def _rows(recipe: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| `{source['digest']}` | {source['weight']:g} | "
        f"{', '.join(f'{name} {weight:g}' for name, weight in source['weights'])} |"
        for source in recipe["sources"]
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}"
