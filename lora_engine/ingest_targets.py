"""Which modules a PEFT config targets, by PEFT's own rules (`check_target_module_exists` of PEFT 0.21). No torch."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_engine.errors import AdapterError
from lora_engine.name_patterns import NAME, NamePattern, ends


class Targets:
    """target_modules, exclude_modules, modules_to_save, layers_to_transform and layers_pattern of a decoded config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises AdapterError where one of them is not what PEFT writes, or cannot be matched in bounded time."""
        self._targets = _entry(config, "target_modules")
        self._excluded = _entry(config, "exclude_modules")
        self._saved = _entry(config, "modules_to_save")
        layers = config.get("layers_to_transform")
        layers = [layers] if type(layers) is int else layers or []
        if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
            raise AdapterError("adapter_config.json: layers_to_transform must be numbers of layers")
        self._layers = frozenset(layers)
        patterns = config.get("layers_pattern") or []
        self._stacks = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(self._stacks, list) or not all(
            isinstance(x, str) and NAME.fullmatch(x) for x in self._stacks
        ):
            raise AdapterError("adapter_config.json: layers_pattern must be names of modules")

    def include(self, module: str) -> bool:
        """Whether PEFT puts an adapter on the linear layer of this name."""
        if self._excluded is not None and _matches(self._excluded, module):
            return False
        if isinstance(self._saved, frozenset) and any(
            not self._saved.isdisjoint(ends(parent)) for parent in _parents(module)
        ):
            return False
        if self._targets is None or self._targets == "all-linear":
            return self._targets is not None
        if not _matches(self._targets, module):
            return False
        # Layers are selected among what a last name stands for, neither of an expression nor of a name in full.
        if not self._layers or isinstance(self._targets, NamePattern) or module in self._targets:
            return True
        return self._layer(module.split(".")) in self._layers

    def _layer(self, parts: Sequence[str]) -> int | None:
        """The first number below a list of layers; without layers_pattern, the first with two names before it."""
        if not self._stacks:
            places = [place for place, part in enumerate(parts[:-1]) if place >= 2 and part.isdigit()]
            return int(parts[places[0]]) if places else None
        for stack in self._stacks:
            names = stack.split(".")
            for place in range(len(names), len(parts) - 1):
                if list(parts[place - len(names) : place]) == names and parts[place].isdigit():
                    return int(parts[place])
        return None


def _entry(config: Mapping[str, Any], name: str) -> "NamePattern | frozenset[str] | str | None":
    """A pattern, or names; None where there are none."""
    value = config.get(name)
    if isinstance(value, str) and value:
        return value if value == "all-linear" else NamePattern(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return frozenset(value) or None
    if value in (None, ""):
        return None
    raise AdapterError(f"adapter_config.json: {name} must be names or a regular expression")


def _matches(entry: "NamePattern | frozenset[str] | str", module: str) -> bool:
    if isinstance(entry, NamePattern):
        return entry.matches(module)
    names = {entry} if isinstance(entry, str) else entry
    return not names.isdisjoint(ends(module))


def _parents(module: str) -> Iterator[str]:
    """A module, and all that it lies in."""
    parts = module.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts) + 1))
