"""Everything a merge can be refused for, found from configs and headers before a tensor is read. No torch.

`plan` says which source adds to which module with which weight. The same adapter named twice counts once, with the sum
of its weights.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from lora_engine.adapter_header import FACTORS, PREFIX, Header, digest, inspect, targets
from lora_engine.config import MAX_STACK_RANK
from lora_engine.errors import AdapterError, SpecError
from lora_engine.merging.config import GEOMETRIC, VLLM_RANKS, MergeConfig, MergeSpec, check_count
from lora_engine.merging.recipe import recipe, total
from lora_engine.target_modules import Module, matches

_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
_ENTRY_BYTES = 120  # of one tensor in a safetensors header, beside its name


@dataclass(frozen=True, slots=True)
class Source:
    """One adapter as it was named: its header, its digest, and its weights as `WeightedAdapter` has them."""

    header: Header
    digest: str
    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.header.folder.name


@dataclass(frozen=True, slots=True)
class Part:
    """What one adapter adds to a module: weight · scaling · B·A, of this rank. `weight` is not 0."""

    header: Header
    digest: str
    weight: float
    scaling: float
    rank: int


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """A module of the result (W is outputs × inputs) and its parts, in the order of their digests."""

    inputs: int
    outputs: int
    parts: tuple[Part, ...]

    @property
    def rank(self) -> int:
        return sum(part.rank for part in self.parts)


@dataclass(frozen=True, slots=True)
class Plan:
    """A merge that can be done.

    Attributes:
        sources: as they were named.
        modules: by name, sorted; one without parts is written as zeros, as loaders want all layers of a kind.
        target_modules: for the result's config.
    """

    config: MergeConfig
    sources: tuple[Source, ...]
    modules: Mapping[str, ModulePlan]
    target_modules: tuple[str, ...]
    base_model_name: str
    base_digest: str | None

    @property
    def recipe(self) -> dict[str, object]:
        named = [(source.digest, source.weight, source.weights) for source in self.sources]
        return recipe(self.config, named, self.base_digest)


def read(spec: MergeSpec) -> list[Source]:
    """The adapters of a spec, by their configs and headers."""
    return [
        Source(inspect(Path(item.path)), digest(Path(item.path)), item.weight, item.weights) for item in spec.adapters
    ]


def plan(config: MergeConfig, sources: Sequence[Source]) -> Plan:
    """What is to be computed.

    Raises:
        SpecError: no weight other than 0, a pattern that names nothing, more ranks or adapters than the method takes.
        AdapterError: the adapters are not of one base model, or their shapes differ.
    """
    check_count(config.method, len({source.digest for source in sources}))
    _check_bases(sources)
    _check_shapes(sources)
    weights = [_weights(index, source) for index, source in enumerate(sources)]
    _check_weights(config, sources, weights)
    modules = _modules(sources, weights, ordered=config.method == "project_out")
    _check_left(config, sources, modules)
    _check_ranks(config, modules)
    return Plan(
        config=config,
        sources=tuple(sources),
        modules=modules,
        target_modules=_target_modules(sources, modules),
        base_model_name=min({source.header.settings.base_model_name for source in sources} - {""}, default=""),
        base_digest=next((source.header.base_digest for source in sources if source.header.base_digest), None),
    )


def _check_bases(sources: Sequence[Source]) -> None:
    """One base model for all: by digest where every digest is known, else by its name and its modules' names too."""
    digests = {source.header.base_digest for source in sources}
    names = {source.header.settings.base_model_name for source in sources} - {""}
    if len(digests - {None}) > 1 or (None in digests and len(names) > 1):
        listed = ", ".join(
            f"{source.name} of {source.header.settings.base_model_name or 'an unnamed one'}"
            f" ({(source.header.base_digest or 'digest unknown')[:16]})"
            for source in sources
        )
        raise AdapterError(f"the adapters are of different base models: {listed}; merge those of one base model")
    if None in digests:
        _check_layer_names(sources)


def _check_layer_names(sources: Sequence[Source]) -> None:
    """Layers are called alike ("model.layers." against "transformer.h.") in models of one kind."""
    roots = [{root for module in source.header.modules if (root := _root(module))} for source in sources]
    for (first, left), (second, right) in pairwise(zip(sources, roots, strict=True)):
        if left and right and not left & right:
            raise AdapterError(
                f"{second.name}: its layers are called {min(right)}…, those of {first.name} {min(left)}…; "
                "they are not of one base model"
            )


def _root(module: str) -> str | None:
    found = re.match(r"(.*?\.)\d+\.", module)
    return found and found[1]


def _check_shapes(sources: Sequence[Source]) -> None:
    seen: dict[str, tuple[tuple[int, int], str]] = {}
    for source in sources:
        for module, item in source.header.modules.items():
            shape, name = seen.setdefault(module, ((item.outputs, item.inputs), source.name))
            if shape != (item.outputs, item.inputs):
                raise AdapterError(
                    f"{source.name}: {module} is {item.outputs} × {item.inputs}, but {shape[0]} × {shape[1]} in "
                    f"{name}; they are of different base models, or of one with more tokens: leave one of the two out"
                )


def _weights(index: int, source: Source) -> dict[str, float]:
    """Of every module of one adapter, as its patterns have it."""
    modules = {name: _named(name, source.header) for name in source.header.modules}
    for pattern in source.weights:
        if not any(matches(pattern, module) for module in modules.values()):
            field_name = f"adapters[{index}].weights"
            known = sorted({name.rpartition(".")[2] for name in modules})
            raise SpecError(
                f"{field_name}: {source.name} has no module called {pattern[:60]!r}; there are {', '.join(known[:20])}",
                field=field_name,
            )
    result = dict.fromkeys(modules, float(source.weight))
    for pattern, weight in source.weights.items():
        result |= {name: float(weight) for name, module in modules.items() if matches(pattern, module)}
    return result


def _named(name: str, header: Header) -> Module:
    item = header.modules[name]
    return Module(name, item.inputs, item.outputs, head=name.rpartition(".")[2] in ("lm_head", "embed_out"))


def _check_weights(config: MergeConfig, sources: Sequence[Source], weights: Sequence[Mapping[str, float]]) -> None:
    if config.method == "project_out":
        for index, source in enumerate(sources[1:], 1):
            if source.digest == sources[0].digest:
                raise SpecError(
                    f"adapters[{index}]: {source.name} is the first adapter again, which would leave nothing of it",
                    field=f"adapters[{index}]",
                )
            if source.weights or source.weight != 1:
                field_name = f"adapters[{index}].weight"
                raise SpecError(
                    f"{field_name}: only the first adapter of project_out has a weight; what the others span does not "
                    "depend on theirs",
                    field=field_name,
                )
    if config.method in GEOMETRIC and config.scope == "adapter" and any(source.weights for source in sources):
        raise SpecError(
            f"scope: {config.method} over the whole adapter has one weight for it; leave weights by module out",
            field="scope",
        )
    if config.method == "karcher" and any(weight < 0 for item in weights for weight in item.values()):
        raise SpecError("adapters: karcher is a mean and takes no negative weight; use linear", field="adapters")


def _modules(
    sources: Sequence[Source], weights: Sequence[Mapping[str, float]], *, ordered: bool
) -> dict[str, ModulePlan]:
    headers = {source.digest: source.header for source in reversed(sources)}
    order = list(dict.fromkeys(source.digest for source in sources))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for source, item in zip(sources, weights, strict=True):
        for module, weight in item.items():
            found[module][source.digest].append(weight)
    plans = {}
    for module in sorted(found):
        digests = [digest for digest in (order if ordered else sorted(order)) if digest in found[module]]
        shape = headers[digests[0]].modules[module]
        parts = (_part(headers[digest], digest, module, total(found[module][digest])) for digest in digests)
        plans[module] = ModulePlan(shape.inputs, shape.outputs, tuple(part for part in parts if part.weight))
    if ordered:  # what the first adapter does not have cannot be projected
        plans = {name: item for name, item in plans.items() if item.parts and item.parts[0].digest == order[0]}
    # Of a kind of module that has weight 0 everywhere nothing is left.
    kinds = {name.rpartition(".")[2] for name, item in plans.items() if item.parts}
    return {name: item for name, item in plans.items() if name.rpartition(".")[2] in kinds}


def _check_left(config: MergeConfig, sources: Sequence[Source], modules: Mapping[str, ModulePlan]) -> None:
    """Something is left to compute."""
    digests = {part.digest for item in modules.values() for part in item.parts}
    if config.method == "project_out" and sources[0].digest not in digests:
        raise SpecError("adapters[0].weight: nothing is left of the adapter to project", field="adapters[0].weight")
    if not digests:
        raise SpecError("adapters: every weight is 0, or weights of the same adapter cancel out", field="adapters")
    if config.method == "slerp":
        weights = {f"at {name}": [part.weight for part in item.parts] for name, item in modules.items() if item.parts}
        if config.scope == "adapter":
            weights["of the adapters"] = [source.weight for source in sources]
        for place, given in weights.items():
            if not total(given):
                raise SpecError(
                    "adapters: the weights of slerp say how far to go from one adapter to the other, and those "
                    f"{place} add up to 0",
                    field="adapters",
                )


def _part(header: Header, digest: str, module: str, weight: float) -> Part:
    item = header.modules[module]
    return Part(header, digest, weight, item.scaling, item.rank)


def rank_bytes(config: MergeConfig, item: ModulePlan) -> int:
    """What one rank of a module takes in the weights file."""
    return _BYTES[config.options["dtype"]] * (item.inputs + item.outputs)


def header_bytes(module: str) -> int:
    """What a module's two tensors take at most in the file's header."""
    return sum(len(PREFIX) + len(module) + len(factor) + _ENTRY_BYTES for factor in FACTORS)


def _check_ranks(config: MergeConfig, modules: Mapping[str, ModulePlan]) -> None:
    name, largest = max(modules.items(), key=lambda item: item[1].rank)
    if largest.rank > MAX_STACK_RANK:
        raise SpecError(
            f"adapters: the ranks add up to {largest.rank} at {name}; at most {MAX_STACK_RANK} can be merged: compress "
            "some of the adapters first",
            field="adapters",
        )
    needed = largest.rank if config.method != "peft_linear" else max(part.rank for part in largest.parts)
    if config.fit and not config.compresses and needed > VLLM_RANKS[-1]:
        raise SpecError(
            f"fit: the result has rank {needed} at {name}, and vLLM takes at most {VLLM_RANKS[-1]}; use the method "
            "linear with a rank",
            field="fit",
        )
    if config.max_bytes is not None:
        least = min(header_bytes(name) + rank_bytes(config, item) for name, item in modules.items() if item.parts)
        if config.max_bytes < least:
            raise SpecError(
                f"max_bytes: not one rank of one module fits into so few bytes; it takes {least}", field="max_bytes"
            )
    if config.method == "peft_linear":
        for module, item in modules.items():
            if len({part.rank for part in item.parts}) > 1:
                raise SpecError(
                    f"method: peft_linear adds up factors, which must have one rank; at {module} they have "
                    f"{', '.join(str(part.rank) for part in item.parts)}: use linear",
                    field="method",
                )


def _target_modules(sources: Sequence[Source], modules: Mapping[str, ModulePlan]) -> tuple[str, ...]:
    """Last names where the sources have them, without full names that a last name covers, and that name something."""
    names = {name for source in sources for name in source.header.target_modules}
    used = {name for name in names if any(targets(name, module) for module in modules)}
    return tuple(sorted(name for name in used if not any(other != name and targets(other, name) for other in used)))
