"""Chat templates, rendered in a confined process: a base model's template is a program that somebody else wrote.

The sandbox of Jinja stops attributes and long ranges, but neither nested loops nor a string of a gigabyte. The process
is started once and serves all templates. It gives them what transformers does, whose import would take seconds.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lora_engine.confined import Confined, Exceeded
from lora_engine.errors import DataError

MEMORY_BYTES = 512 << 20
SECONDS = 10.0
_EVERYTHING = (
    r"{{ '\u00e9\n' | tojson(indent=1) }}{{ [1] | pprint }}{{ ns is defined }}{{ 'a b' | wordwrap(1) }}"
    "{{ '<b>&amp;</b>' | striptags }}{{ lipsum(1) }}{{ 'a.de' | urlize }}{{ [1] | random }}{{ {'a': 1} | xmlattr }}"
    "{% generation %}{% for a in range(2) %}{% break %}{% endfor %}{% endgeneration %}"
)
_renderer = Confined(f"{__name__}:answer", memory_bytes=MEMORY_BYTES, seconds=SECONDS)


def render(
    template: str, turns: Sequence[Mapping[str, Any]], wanted: Sequence[tuple[int, bool]], names: Mapping[str, Any]
) -> list[str]:
    """The text of the first n turns for each (n, whether the assistant's next answer begins then) of `wanted`.

    `names` are what the template may use beside the messages: the tokenizer's special tokens.

    Raises:
        DataError: the template refuses the conversation, does not end, or takes too much memory.
    """
    request = {"template": template, "turns": [*turns], "wanted": [*wanted], "names": {**names}}
    try:
        texts: list[str] = _renderer.call(request)
    except Exceeded as error:
        raise DataError(f"the base model's chat template does not come to an end: {error}") from None
    return texts


def prepare() -> None:
    """Import what Jinja and Python only import once a template needs it: a confined process opens no file."""
    answer({"template": _EVERYTHING, "turns": [], "wanted": [(0, False)], "names": {}})
    with suppress(DataError):
        answer({"template": "{{ raise_exception('as it should') }}", "turns": [], "wanted": [(0, False)], "names": {}})


def answer(request: dict[str, Any]) -> list[str]:
    """The other side of `render`."""
    turns = request["turns"]
    try:
        return [
            _compiled(request["template"]).render(
                **request["names"],
                messages=turns[:count],
                tools=None,
                documents=None,
                add_generation_prompt=prompt,
            )
            for count, prompt in request["wanted"]
        ]
    except MemoryError:
        raise
    except Exception as error:  # a template is a program: it raises what it likes
        raise DataError(f"the base model's chat template refuses the conversation: {str(error)[:300]}") from None


class _Generation(Extension):
    """The tag around what an assistant says, which the engine finds otherwise: a block without an effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


@lru_cache(maxsize=8)
def _compiled(template: str) -> Template:
    """With the settings, filters and functions that chat templates are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(template)


class _Dict:
    """What a template calls to make a dict: it has nothing of the type but this."""

    def __call__(self, /, *arguments: Any, **items: Any) -> dict[Any, Any]:
        return dict(*arguments, **items)

    def fromkeys(self, keys: Iterable[Any], value: Any = None, /) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """Jinja's, for names that do not begin with an underscore: Python's own do."""

    def __init__(self, /, *arguments: Any, **items: Any) -> None:
        given = dict(*arguments, **items)
        for name in given:
            _allow(name)
        super().__init__(given)

    def __setitem__(self, name: str, value: Any) -> None:
        _allow(name)
        super().__setitem__(name, value)


def _allow(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore: {name!r}")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)
