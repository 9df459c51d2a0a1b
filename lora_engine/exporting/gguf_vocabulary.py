"""A byte-level BPE tokenizer as the fields of a GGUF file, where llama.cpp is known to split text as it does."""

import json
from pathlib import Path
from typing import Any

import gguf

from lora_engine import chat
from lora_engine.errors import AdapterError
from lora_engine.exporting.gguf_splitting import REFUSED, splitting


def add(writer: Any, tokenizer: Any, embeddings: int) -> None:
    """Add tokens, merges, special tokens and chat template to a `GGUFWriter`; `embeddings` is the number of ids.

    Raises:
        AdapterError: a tokenizer of another kind.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting(backend))
    tokens, types = _tokens(tokenizer, embeddings)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = backend["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    _add_special(writer, tokenizer)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


def check(tokenizer: Any) -> None:
    """Raises AdapterError for a tokenizer that `add` would refuse."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise AdapterError(f"the tokenizer has no tokenizer.json; {REFUSED}")
    splitting(json.loads(tokenizer.backend_tokenizer.to_str()))


def check_written(path: Path, tokenizer: Any) -> None:
    """Reads chat template and stop tokens from a file again.

    Raises:
        AdapterError: they are not the tokenizer's, or llama.cpp would not stop at all of them.
    """
    fields = gguf.GGUFReader(path).fields
    keys = (gguf.Keys.Tokenizer.CHAT_TEMPLATE, gguf.Keys.Tokenizer.EOS_ID, gguf.Keys.Tokenizer.EOT_ID)
    template, *ends = (fields[key].contents() if key in fields else None for key in keys)
    if template != (tokenizer.get_chat_template() if tokenizer.chat_template else None):
        raise AdapterError(f"{path.name}: the chat template is not the base model's")
    if missing := chat.stop_ids(tokenizer) - set(ends):
        raise AdapterError(f"{path.name}: llama.cpp would not stop at {sorted(missing)}")


def _tokens(tokenizer: Any, embeddings: int) -> tuple[list[str], list[int]]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[int] = []
    for number in range(embeddings):
        if number not in by_id:
            tokens.append(f"[PAD{number}]")
            types.append(gguf.TokenType.UNUSED)
            continue
        tokens.append(added[number].content if number in added else by_id[number])
        kind = gguf.TokenType.NORMAL
        if number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        types.append(kind)
    return tokens, types


def _add_special(writer: Any, tokenizer: Any) -> None:
    known = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: tokenizer.eos_token_id,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
    }
    for add_id, number in known.items():
        if number is not None:
            add_id(number)
    bos = tokenizer.bos_token_id
    writer.add_add_bos_token(bos is not None and tokenizer("a")["input_ids"][:1] == [bos])
    turn = sorted(chat.stop_ids(tokenizer) - {tokenizer.eos_token_id})
    if turn:
        writer.add_eot_token_id(turn[0])
