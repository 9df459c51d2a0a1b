"""Whether adapters can be searched with, or exported, on a base model: told before a job is queued.

From the catalogue's entry, and from the model's own config and tokenizer where this process can read them; where it
cannot, or they leave something open, the job says it.
"""

import json
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_engine import weight_search_limits
from lora_engine.exporting import gguf_splitting, limits
from lora_engine.exporting.config import ExportConfig
from lora_engine.merging.sources import Plan
from lora_engine.target_modules import Module
from service.models import BaseModel

_LAYER = re.compile(r"(.+?)\.\d+\.")
# Classes of tokenizers that add nothing to their tokenizer.json.
_PLAIN = ("PreTrainedTokenizerFast", "TokenizersBackend")


def check_search(base: BaseModel, plan: Plan) -> None:
    """Raises SpecError, AdapterError: the stack is too wide for a search, or cannot run on the base model."""
    headers = [source.header for source in plan.sources]
    weight_search_limits.check_fit(_modules(base), _tied_head(base), base.digest, headers)
    weight_search_limits.stacked_ranks(headers)


def check_export(config: ExportConfig, base: BaseModel, plan: Plan) -> None:
    """Raises AdapterError: the adapters are not of the base model, or the format has no place for one of the two."""
    shapes = {name: (item.outputs, item.inputs) for name, item in plan.modules.items() if item.parts}
    limits.check_modules(shapes, _modules(base))
    limits.check_digest(plan.base_digest, base.digest, base.id)
    limits.check_quantizations(config.base, limits.quantizations(source.header for source in plan.sources))
    if config.format == "mlx":
        limits.check_layers(shapes, _layers(base))
    elif config.format == "gguf":
        _check_gguf(base)
        limits.check_untied(_tied_head(base), shapes)
    elif config.format == "gguf-merged":
        _check_gguf(base, whole=True)
        _check_tokenizer(base.folder, base.digest)


def _check_gguf(base: BaseModel, *, whole: bool = False) -> None:
    config = _read(Path(base.folder) / "config.json")
    if not config or "text_config" in config:  # which part of it counts, transformers says
        return
    limits.check_gguf(config)
    if whole:
        limits.check_gguf_model(config)


@lru_cache(maxsize=32)  # of whom nothing was wrong: the files have megabytes, and a digest's never change
def _check_tokenizer(folder: str, digest: str) -> None:
    del digest
    tokenizer, settings = (_read(Path(folder) / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    if tokenizer.get("model"):
        gguf_splitting.check_kind(tokenizer)
        if settings.get("tokenizer_class") in _PLAIN:
            gguf_splitting.splitting(tokenizer)


def _tied_head(base: BaseModel) -> str | None:
    """The output head, where the config says that it shares its weight with the input embeddings."""
    tied = _read(Path(base.folder) / "config.json").get("tie_word_embeddings") is True
    return next((module.name for module in _modules(base) if module.head), None) if tied else None


def _layers(base: BaseModel) -> str:
    """Name of the list that most linear layers lie in ("model.layers")."""
    found = Counter(match[1] for module in base.modules if (match := _LAYER.match(module["name"])))
    return found.most_common(1)[0][0] if found else ""


def _modules(base: BaseModel) -> list[Module]:
    return [Module(**module) for module in base.modules]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where it cannot be had here, which is for the job to say."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
