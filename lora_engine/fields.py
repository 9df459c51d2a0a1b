"""Specs as plain JSON and back, and the checks that their fields have in common. No torch.

A wrong value raises `SpecError` with the field's name, dotted from the spec's root.
"""

import dataclasses
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from lora_engine.errors import SpecError

T = TypeVar("T")

MAX_NAMES = 1024
# Names joined by dots, with the wildcards of file names; no regular expression, whose matching can take for ever.
_MODULE_PATTERN = re.compile(r"[A-Za-z0-9_*?\[\]!-]+(\.[A-Za-z0-9_*?\[\]!-]+)*")


def from_mapping(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build a spec (and the specs inside it) from decoded JSON.

    Raises:
        SpecError: an unknown, missing or impossible field, named from the spec's root.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"{prefix or 'spec'}: expected an object", field=prefix.rstrip("."))
    hints = typing.get_type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            raise SpecError(f"{prefix}{name}: unknown field; known are {', '.join(fields)}", field=f"{prefix}{name}")
    for name, item in fields.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise SpecError(f"{prefix}{name}: is missing", field=f"{prefix}{name}")
    arguments = {name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()}
    try:
        return cls(**arguments)
    except SpecError as error:
        if prefix:
            raise SpecError(f"{prefix}{error.message}", field=f"{prefix}{error.field}") from None
        raise


def to_mapping(spec: Any) -> dict[str, Any]:
    """The inverse of `from_mapping`: plain JSON values."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return to_mapping(value)
        if isinstance(value, Mapping):
            return dict(value)
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {item.name: plain(getattr(spec, item.name)) for item in dataclasses.fields(spec)}


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_mapping(hint, value, f"{path}.")
    (*_, inner) = typing.get_args(hint) or (None,)
    if typing.get_origin(hint) is Sequence and dataclasses.is_dataclass(inner) and isinstance(value, list):
        return [_convert(inner, item, f"{path}[{index}]") for index, item in enumerate(value)]
    if not _matches(hint, value):
        choices = _choices(hint)
        fault = f"must be one of {', '.join(choices)}" if choices and isinstance(value, str) else "is of the wrong type"
        raise SpecError(f"{path}: {_short(value)} {fault}", field=path)
    return value


def _choices(hint: Any) -> list[str]:
    """The words that a field takes, where it takes words alone."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [word for option in typing.get_args(hint) for word in _choices(option)]
    return [str(word) for word in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []


def _matches(hint: Any, value: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(option, value) for option in typing.get_args(hint))
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is Sequence:
        (inner,) = typing.get_args(hint)
        return isinstance(value, list) and all(_matches(inner, item) for item in value)
    if origin is Mapping:
        (_, inner) = typing.get_args(hint)
        return isinstance(value, dict) and all(_matches(inner, item) for item in value.values())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def bounded(spec: Any, name: str, low: float, high: float, *, exclusive_low: bool = False) -> None:
    _check_bounds(name, getattr(spec, name), low, high, exclusive_low)


def _check_bounds(name: str, value: Any, low: float, high: float, exclusive_low: bool, where: str = "") -> None:
    # `not (…)` rather than `value < low`: NaN compares false with everything.
    if not (low < value if exclusive_low else low <= value) or not value <= high:
        bound = "greater than" if exclusive_low else "at least"
        raise SpecError(f"{name}: {_short(value)}{where} must be {bound} {low} and at most {high}", field=name)


def bounded_values(spec: Any, name: str, low: float, high: float, *, exclusive_low: bool = False) -> None:
    """Of a pattern: its names and its values; the spec gets a copy that nobody else can change."""
    values = dict(getattr(spec, name))
    if len(values) > MAX_NAMES:
        raise SpecError(f"{name}: expected at most {MAX_NAMES} entries", field=name)
    for module, value in values.items():
        check_module_name(name, module)
        _check_bounds(name, value, low, high, exclusive_low, f" for {module!r}")
    object.__setattr__(spec, name, values)


def check_module_name(field_name: str, name: Any) -> None:
    if not isinstance(name, str) or len(name) > 200 or not _MODULE_PATTERN.fullmatch(name):
        raise SpecError(f"{field_name}: {str(name)[:40]!r} is not a module name", field=field_name)


def one_of(spec: Any, name: str, allowed: tuple[str, ...]) -> None:
    value = getattr(spec, name)
    if value not in allowed:
        raise SpecError(f"{name}: {_short(value)} must be one of {', '.join(allowed)}", field=name)


def _short(value: Any) -> str:
    return repr(value)[:40]
