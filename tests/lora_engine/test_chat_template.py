"""A base model's chat template renders as transformers does, and what it does to a machine stays in its process."""

from typing import Any

import pytest

from lora_engine import chat_template
from lora_engine.confined import Confined
from lora_engine.errors import DataError
from tests.tiny_model import make_tokenizer

TURNS = [{"role": "user", "content": "héllo"}, {"role": "assistant", "content": "hi"}]


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> Any:
    with Confined("lora_engine.chat_template:answer", memory_bytes=200 << 20, seconds=0.5) as renderer:
        monkeypatch.setattr(chat_template, "_renderer", renderer)
        yield renderer


def test_the_text_is_that_of_transformers() -> None:
    tokenizer = make_tokenizer()
    template = "{% generation %}{{ bos_token }}{% endgeneration %}{{ {'a': 'é'} | tojson }}" + tokenizer.chat_template
    for count, prompt in ((2, False), (1, True)):
        (text,) = chat_template.render(template, TURNS, [(count, prompt)], tokenizer.special_tokens_map)
        assert text == tokenizer.apply_chat_template(
            TURNS[:count], tokenize=False, add_generation_prompt=prompt, chat_template=template
        )


TEMPLATES = [
    "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "{% generation %}{% set x = 1 %}{{ x }}{% endgeneration %}{{ x is defined }}",
    "{{ messages | tojson }} {{ messages[0] | tojson(indent=2) }} {{ tools is none }} {{ documents is none }}",
    "{%- set ns = namespace(n=0) -%}\n{% for m in messages %}\n{% set ns.n = ns.n + 1 %}\n{% endfor %}{{ ns.n }}",
    "{{ messages | tojson(true, 1, [';', '='], true) }}{{ messages | tojson(ensure_ascii=true, indent='\\t') }}",
    "{{ 'one two three' | wordwrap(5) }}{{ '<p>a &eacute;&lt; <b>b</b></p>' | striptags }}{{ messages | pprint }}",
    "{{ 'see example.org, a@b.de' | urlize(8, true) }}{{ {'a': '<', 'b': none} | xmlattr }}{{ '<' | escape }}",
    "{{ 2048 | filesizeformat(true) }}{{ [3, 1] | sort | join('-') }}{{ messages | groupby('role') | list }}",
    "{{ '%05.1f' | format(2.25) }}{{ '{:>5}'.format('é') }}{{ 'x y' | urlencode }}{{ 'ab' | indent(2, true) }}",
    "{{ (lipsum(2, html=false) | length) > 9 }}{{ [1, 1] | random }}{{ cycler('a', 'b').next() }}{{ joiner()() }}",
    "{{ dict(a=1) }}{{ dict([['b', 2]], c=3).items() | list }}{{ dict.fromkeys(['a'], 0) }}{{ dict.mro }}",
    "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}{{ ns.a + ns.self + ns.b }}{{ ns.c is defined }}",
    "  {% if add_generation_prompt %}\n yes {{ eos_token }}{{ unk_token }}\n  {% endif %}\n",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_environment_is_that_of_transformers(template: str, prompt: bool) -> None:
    tokenizer = make_tokenizer()
    (text,) = chat_template.render(template, TURNS, [(2, prompt)], tokenizer.special_tokens_map)
    assert text == tokenizer.apply_chat_template(
        TURNS, tokenize=False, add_generation_prompt=prompt, chat_template=template
    )


@pytest.mark.parametrize(
    "template",
    ["{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 'a' * 10**9 }}",
     "{% for a in range(9) %}{{ ('a' * 10**7) * 10 }}{% endfor %}"],
    ids=["O8 nested loops", "O8 a gigabyte", "O8 many strings"],
)  # fmt: skip
def test_what_does_not_end_is_ended_and_the_next_one_renders(tight: Any, template: str) -> None:
    with pytest.raises(DataError, match="does not come to an end"):
        chat_template.render(template, TURNS, [(2, False)], {})
    assert chat_template.render("{{ messages[0].content }}", TURNS, [(2, False)], {}) == ["héllo"]


@pytest.mark.parametrize(
    "template",
    ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
     "{{ dict.__class__.mro() }}", "{{ namespace(_a=1) }}", "{{ namespace({'__class__': 1}) }}",
     "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
     "{% include '/etc/passwd' %}", "{{ raise_exception('no') }}", "{% if", "{% for a in range(10**9) %}{% endfor %}"],
    ids=["O8 classes", "O8 globals", "O8 a dict's class", "O8 a namespace's names",
         "O8 a namespace's class", "O8 a name set", "O8 a file",
         "O8 an exception", "O8 no template", "O8 a long range"],
)  # fmt: skip
def test_what_a_template_may_not_is_refused(template: str) -> None:
    with pytest.raises(DataError, match="refuses the conversation"):
        chat_template.render(template, TURNS, [(2, False)], {})
