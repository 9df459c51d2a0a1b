"""A tokenizer read from its file alone gives what transformers' gives, or is left to it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_engine import base_model, chat, tokenizer
from lora_engine.examples import Conversation, Example, Message, PromptCompletion
from lora_engine.tokenizer import Tokenizer
from tests.tiny_model import make_tokenizer

TEXTS = [
    "", " ", "one two three", "Zwölf Boxkämpfer – 日本語 🙂\n\n", "<|turn|>user\nhi<|end|>\n", "<|bos|>a<|bos|>",
    "a" * 500,
]  # fmt: skip
EXAMPLES: list[Example] = [
    Conversation((Message("user", "What is the capital?", False), Message("assistant", "Paris.", True))),
    PromptCompletion("one two", " three"),
]


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_it_gives_what_transformers_gives(folder: Path) -> None:
    ours: Any = base_model.load_tokenizer(folder, 320)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert isinstance(ours, Tokenizer)
    for special, split in ((True, False), (False, False), (False, True)):
        asked = {"add_special_tokens": special, "split_special_tokens": split}
        assert [ours(text, **asked)["input_ids"] for text in TEXTS] == [
            theirs(text, **asked)["input_ids"] for text in TEXTS
        ]
    ids = theirs("<|bos|>one two<|end|>")["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "vocab_size", "chat_template",
                 "special_tokens_map"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert {number: str(token) for number, token in ours.added_tokens_decoder.items()} == {
        number: str(token) for number, token in theirs.added_tokens_decoder.items()
    }
    assert [chat.tokenize(ours, example) for example in EXAMPLES] == [
        chat.tokenize(theirs, example) for example in EXAMPLES
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": ...},
        {"add_bos_token": True},
        {"clean_up_tokenization_spaces": True},
        {"eos_token": {"content": "<|end|>"}},
        {"eos_token": "not there"},
        {"extra_special_tokens": ["not there"]},
    ],
    ids=str,
)
def test_settings_that_ask_for_more_are_left_to_transformers(change: dict[str, Any], folder: Path) -> None:
    assert tokenizer.read(folder) is not None
    settings(folder, **change)
    assert tokenizer.read(folder) is None


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_files_beside_the_tokenizer_are_left_to_transformers(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    assert tokenizer.read(folder) is None


def test_a_file_that_is_no_tokenizer_is_left_to_transformers_to_refuse(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer.read(folder) is None
