"""Which files make a base model, and what identifies their content. Standard library only.

A base model is an ordinary Hugging Face folder: config, tokenizer, chat template and safetensors. Two folders
with the same digest train the same adapters.
"""

import hashlib
from pathlib import Path
from typing import Any

NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "model.safetensors.index.json",
)
_CHUNK = 1 << 20


def file_list(folder: Path) -> list[dict[str, Any]]:
    """The files that matter, sorted by name: `{"name", "size" (bytes), "sha256"}` each."""
    paths = sorted(path for path in folder.iterdir() if path.name in NAMES or path.suffix == ".safetensors")
    return [{"name": path.name, "size": path.stat().st_size, "sha256": sha256_file(path)} for path in paths]


def digest(folder: Path) -> str:
    """SHA-256 over the sorted names and SHA-256 of the files that matter, in hexadecimal."""
    return digest_of(file_list(folder))


def digest_of(files: list[dict[str, Any]]) -> str:
    """`digest` for a list from `file_list`, without reading the files again."""
    lines = sorted(f"{item['name']} {item['sha256']}\n" for item in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal, in constant memory."""
    result = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            result.update(chunk)
    return result.hexdigest()
