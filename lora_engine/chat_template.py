"""Chat templates, rendered in a confined process: a base model's template is a program that somebody else wrote.

The sandbox of Jinja stops attributes and long ranges, but neither nested loops nor a string of a gigabyte. The process
is started once and serves all templates. It gives them what transformers does, whose import would take seconds.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_engine.confined import Confined, Exceeded
from lora_engine.errors import DataError

MEMORY_BYTES = 512 << 20
SECONDS = 10.0
_EVERYTHING = (
    r"{{ '\u00e9\n' | tojson }}{{ [1] | pprint }}{{ ns is defined }}"
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
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    """Without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
    raise TemplateError(message)
