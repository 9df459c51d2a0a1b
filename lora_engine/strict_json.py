"""JSON as RFC 8259 has it, for bytes that came from outside.

The standard library also takes NaN, Infinity, duplicate keys, lone surrogates and numbers that overflow;
each of them breaks something further down (a database, a loss, another parser), so here they are errors.
"""

import json
import math
from typing import Any, NoReturn

MAX_DEPTH = 32
_MAX_DIGITS = 300  # beyond that an integer is an attack on the parser, not a number


class StrictJSONError(ValueError):
    """The bytes are not strict JSON; the message says what and, where known, in which column."""


class UnusableValue(StrictJSONError):
    """The text can be read, but holds a value that nothing further down can take."""


def loads(data: bytes | str) -> Any:
    """Decode one JSON document.

    Raises:
        StrictJSONError: not UTF-8, not JSON, or one of the leniencies named above.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as error:
        raise StrictJSONError(f"not UTF-8 at byte {error.start + 1}") from None
    if text.startswith("\ufeff"):
        raise StrictJSONError("starts with a byte order mark; save the text as plain UTF-8")
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
            object_pairs_hook=_unique_keys,
        )
    except json.JSONDecodeError as error:
        raise StrictJSONError(f"{error.msg.lower()} at column {error.pos + 1}") from None
    except RecursionError:
        raise StrictJSONError(f"nested deeper than {MAX_DEPTH} levels") from None
    _check(value, 0)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise UnusableValue(f"{name} is not JSON")


def _finite_float(literal: str) -> float:
    value = float(literal)
    if not math.isfinite(value):
        raise UnusableValue(f"the number {literal[:20]} is too large")
    return value


def _bounded_int(literal: str) -> int:
    if len(literal) > _MAX_DIGITS:
        raise StrictJSONError(f"an integer of {len(literal)} digits is too large")
    return int(literal)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise StrictJSONError(f"the key {key[:40]!r} appears twice in one object")
            seen.add(key)
    return result


def _check(value: Any, depth: int) -> None:
    """Depth, and strings that no database or tokenizer takes: lone surrogates and NUL."""
    if depth > MAX_DEPTH:
        raise UnusableValue(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, str):
        if "\x00" in value:
            raise UnusableValue("a string contains the NUL character")
        if not value.isascii():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError:
                raise UnusableValue("a string contains half of a surrogate pair") from None
    elif isinstance(value, dict):
        for key, item in value.items():
            _check(key, depth + 1)
            _check(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check(item, depth + 1)
