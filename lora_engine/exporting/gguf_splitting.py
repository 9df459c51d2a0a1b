"""How a tokenizer splits texts before its merges, and whether llama.cpp is known to split them alike. No torch.

llama.cpp names ways to split a text before BPE ("tokenizer.ggml.pre") and knows each by its own code. Which one a
tokenizer has is told from its definition, not from its name; one that is not listed here is refused, as other tokens
would be other answers.
"""

import json
from collections.abc import Mapping
from typing import Any

from lora_engine.errors import AdapterError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_BYTES_ALONE = {**_BYTES, "use_regex": False}
REFUSED = "only byte-level BPE tokenizers whose splitting llama.cpp is known to share are written as GGUF"
# What a tokenizer.json may leave out.
_DEFAULTS = {
    "ByteLevel": {"use_regex": True},
    "Split": {"invert": False},
    "Digits": {"individual_digits": False},
}


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


# Of each name: normalizers, pre-tokenizers in their order, and whether whole words that are tokens skip the merges.
_KNOWN: dict[str, tuple[tuple[str | None, ...], list[dict[str, Any]], bool]] = {
    "gpt-2": ((None,), [_BYTES], False),
    "smollm": ((None,), [{"type": "Digits", "individual_digits": True}, _BYTES], False),
    "llama-bpe": ((None,), [_split(_WORDS + r"\p{N}{1,3}" + _REST), _BYTES_ALONE], True),
    "qwen2": ((None, "NFC"), [_split(_WORDS + r"\p{N}" + _REST), _BYTES_ALONE], False),
}


def check_kind(definition: Mapping[str, Any]) -> None:
    """Raises AdapterError for a tokenizer.json of another kind than byte-level BPE, whatever splits its texts."""
    model = definition["model"]
    name = model.get("type", "BPE")
    if name != "BPE" or model.get("byte_fallback"):
        kind = "BPE over characters" if name == "BPE" else name
        raise AdapterError(f"format: the tokenizer is of the kind {kind}; {REFUSED}: export it merged", field="format")


def splitting(definition: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way that a decoded tokenizer.json splits texts.

    Raises:
        AdapterError: a tokenizer of another kind, or a way without a name.
    """
    check_kind(definition)
    model, normalizer = definition["model"], definition.get("normalizer")
    steps = definition.get("pre_tokenizer") or {}
    listed = [_plain(step) for step in steps.get("pretokenizers", [steps])]
    for name, (normalizers, wanted, ignores_merges) in _KNOWN.items():
        kind = normalizer and normalizer["type"]
        if listed == wanted and kind in normalizers and bool(model.get("ignore_merges")) == ignores_merges:
            return name
    raise AdapterError(
        f"format: the tokenizer splits texts by {json.dumps(listed)[:300]}; {REFUSED}: export it merged", field="format"
    )


def _plain(step: Mapping[str, Any]) -> dict[str, Any]:
    """With its defaults, and without what only matters for offsets."""
    filled = {**_DEFAULTS.get(str(step.get("type")), {}), **step}
    return {name: value for name, value in filled.items() if name != "trim_offsets"}
