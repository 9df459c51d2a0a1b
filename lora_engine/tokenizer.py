"""A tokenizer that its `tokenizer.json` describes in full, without transformers' classes around it.

It has the names of transformers' tokenizers that the engine uses, and gives the same ids and texts. Whatever asks for
more than the file, a class with habits of its own, is left to transformers, whose import takes longer than tokenising a
small dataset.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lora_engine.weights import read_json

_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # those that add nothing to the file
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
# Settings that change neither ids nor texts; with any other, transformers is asked.
_HARMLESS = {
    *_SPECIAL, "backend", "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens", "is_local",
    "model_input_names", "model_max_length", "padding_side", "tokenizer_class", "truncation_side",
}  # fmt: skip


class Tokenizer:
    """As transformers' `PreTrainedTokenizerFast` of the same folder."""

    def __init__(self, backend: Backend, special: Mapping[str, str], chat_template: str | None) -> None:
        self.backend_tokenizer = backend
        self.chat_template = chat_template
        self.added_tokens_decoder: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=False)
        self.special_tokens_map = dict(special)
        ids = {name: backend.token_to_id(special[name]) if name in special else None for name in _SPECIAL}
        self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id = ids.values()

    def __call__(
        self, text: str, *, add_special_tokens: bool = True, split_special_tokens: bool = False
    ) -> dict[str, list[int]]:
        """The ids of a text; with `split_special_tokens` what spells a special token is encoded as text."""
        self.backend_tokenizer.encode_special_tokens = split_special_tokens
        return {"input_ids": self.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def __len__(self) -> int:
        return self.backend_tokenizer.get_vocab_size(with_added_tokens=True)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return self.backend_tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self.backend_tokenizer.get_vocab(with_added_tokens=True)

    def get_chat_template(self) -> str:
        """Raises ValueError where there is none."""
        if self.chat_template is None:
            raise ValueError("the tokenizer has no chat template")
        return self.chat_template


def read(folder: Path) -> Tokenizer | None:
    """The tokenizer of `folder`; None where transformers has to say what its files mean.

    Raises:
        BaseModelError: a file is not JSON.
    """
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not (path.exists() and settings_path.exists()):
        return None
    settings = read_json(settings_path)
    template = _template(folder, settings)
    special = {name: settings[name] for name in _SPECIAL if settings.get(name) is not None}
    extra = settings.get("extra_special_tokens") or []
    plain = (
        settings.get("tokenizer_class") in _CLASSES
        and set(settings) <= _HARMLESS
        and not settings.get("clean_up_tokenization_spaces")
        and not any((folder / name).exists() for name in ("added_tokens.json", "special_tokens_map.json"))
        and not (folder / "additional_chat_templates").exists()
        and isinstance(template, str | None)
        and isinstance(extra, list)
        and all(isinstance(token, str) for token in (*special.values(), *extra))
    )
    if not plain:
        return None
    try:
        backend = Backend.from_file(str(path))
    except Exception:
        return None
    backend.no_truncation()
    backend.no_padding()
    known = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    return Tokenizer(backend, special, template) if {*special.values(), *extra} <= known else None


def _template(folder: Path, settings: Mapping[str, Any]) -> Any:
    path = folder / "chat_template.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else settings.get("chat_template")
