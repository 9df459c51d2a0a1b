"""A tokenizer read from its file alone gives what transformers' gives, or is left to it."""

import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateError
from transformers import AutoTokenizer

from lora_engine import base_model, chat, tokenizer
from lora_engine.examples import Conversation, Example, Message, PromptCompletion
from lora_engine.tokenizer import Tokenizer
from tests.tiny_model import make_tokenizer

TEXTS = [
    "", " ", "one two three", "Zwölf Boxkämpfer – 日本語 🙂\n\n", "<|turn|>user\nhi<|end|>\n", "<|bos|>a<|bos|>",
    "a" * 500,
]  # fmt: skip
TURNS = [{"role": "system", "content": "be <brief>"}, {"role": "user", "content": "hi"}]
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
    for special in (True, False):
        assert [ours(text, add_special_tokens=special)["input_ids"] for text in TEXTS] == [
            theirs(text, add_special_tokens=special)["input_ids"] for text in TEXTS
        ]
    ids = theirs("<|bos|>one two<|end|>")["input_ids"]
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "vocab_size", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert {number: str(token) for number, token in ours.added_tokens_decoder.items()} == {
        number: str(token) for number, token in theirs.added_tokens_decoder.items()
    }
    assert [chat.tokenize(ours, example) for example in EXAMPLES] == [
        chat.tokenize(theirs, example) for example in EXAMPLES
    ]


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ tools is none }} {{ documents is none }}",
    "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n{% set ns.n = ns.n + 1 %}\n{% endfor %}{{ ns.n }}",
    "  {% if add_generation_prompt %}\n yes {{ eos_token }}{{ unk_token }}\n  {% endif %}\n",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_are_rendered_as_transformers_does(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    ours: Any = tokenizer.read(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    for prompt in (True, False):
        assert ours.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt) == (
            theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=prompt)
        )


@pytest.mark.parametrize(
    ("template", "error"),
    [("{{ raise_exception('no') }}", TemplateError), ("{{ messages.append(1) }}", SecurityError)],
)
def test_a_template_can_refuse_and_change_nothing(template: str, error: type[Exception], folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    ours: Any = tokenizer.read(folder)
    with pytest.raises(error):
        ours.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)


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


@pytest.mark.parametrize(
    "template",
    [
        "{% generation %}a{% endgeneration %}",
        "{{ messages.__class__ }}",
        "{{ x._y }}",
        "{%- set ns = namespace(_a=1) %}",
    ],
)
def test_templates_beyond_jinja_are_left_to_transformers(template: str, folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template)
    assert tokenizer.read(folder) is None


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_files_beside_the_tokenizer_are_left_to_transformers(name: str, folder: Path) -> None:
    (folder / name).write_text("{}")
    assert tokenizer.read(folder) is None


def test_a_file_that_is_no_tokenizer_is_left_to_transformers_to_refuse(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer.read(folder) is None
