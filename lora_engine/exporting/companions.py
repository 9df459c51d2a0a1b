"""What travels with a model's weights: config, tokenizer, chat template, stop tokens; and whether it has arrived."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_engine import base_files, base_model, chat
from lora_engine.errors import AdapterError
from lora_engine.exporting.base import Base
from lora_engine.exporting.parity import texts
from lora_engine.weights import read_json

_GENERATION = "generation_config.json"
_TRANSFORMERS_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def copy_tokenizer(base: Base, folder: Path) -> None:
    """Tokenizer files and chat template, byte for byte."""
    for name in base_files.NAMES:
        path = base.folder / name
        if path.exists() and name not in ("config.json", _GENERATION, "model.safetensors.index.json"):
            shutil.copyfile(path, folder / name)


def write_configs(base: Base, folder: Path, *, dtype: str | None, untied: bool) -> None:
    """config.json with what the export has changed, and a generation config that knows every stop token."""
    config = dict(base.config)
    for part in [config, *(value for key, value in config.items() if key == "text_config" and isinstance(value, dict))]:
        if dtype is not None:
            part.pop("torch_dtype", None)
            part["dtype"] = _TRANSFORMERS_DTYPES[dtype]
        if untied:
            part["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    _write_json(folder / _GENERATION, generation_config(base))


def generation_config(base: Base) -> dict[str, Any]:
    """The base model's, with the tokens at which its chat template ends a turn among those that end a text."""
    path = base.folder / _GENERATION
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    known = {name: base.config[name] for name in ids if base.config.get(name) is not None}
    found = {**known, **(read_json(path) if path.exists() else {})}
    ends = _ids(found.get("eos_token_id"))
    ends += sorted(chat.stop_ids(base.tokenizer) - set(ends))
    found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    return found


def check_companions(base: Base, folder: Path) -> None:
    """Reads tokenizer, chat template and, of a whole model, stop tokens from disk again.

    Raises:
        AdapterError: they are not the base model's.
    """
    tokenizer = base_model.load_tokenizer(folder, len(base.model.get_input_embeddings().weight))
    if tokenizer.chat_template != base.tokenizer.chat_template:
        raise AdapterError(f"{folder.name}: the chat template is not the base model's")
    if texts(tokenizer) != texts(base.tokenizer):
        raise AdapterError(f"{folder.name}: the tokenizer gives other ids than the base model's")
    if (folder / _GENERATION).exists():
        missing = chat.stop_ids(tokenizer) - set(_ids(read_json(folder / _GENERATION).get("eos_token_id")))
        if missing:
            raise AdapterError(f"{folder.name}: the generation config does not know the stop tokens {sorted(missing)}")


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
