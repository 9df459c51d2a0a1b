"""Which linear layers an adapter is put on, and of what shape it is there, told from their names alone. No torch.

The six roles are those of Raschka's "Practical Tips for Finetuning LLMs Using LoRA": query, key, value, projection
(attention's output), mlp and head. Where query, key and value are one fused layer, all three must be named.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

from lora_engine.config import ALL_LINEAR, LoraConfig
from lora_engine.errors import SpecError
from lora_engine.peft_config import scaling_of

ROLES = ("query", "key", "value", "projection", "mlp", "head")
_QKV = ROLES[:3]
# By the last name of a linear layer inside an attention module, over the families that transformers has.
_IN_ATTENTION = {
    **dict.fromkeys(("q_proj", "query", "wq"), ("query",)),
    **dict.fromkeys(("k_proj", "key", "wk"), ("key",)),
    **dict.fromkeys(("v_proj", "value", "wv"), ("value",)),
    **dict.fromkeys(("qkv_proj", "c_attn", "query_key_value", "Wqkv"), _QKV),
    **dict.fromkeys(("o_proj", "c_proj", "out_proj", "dense", "wo"), ("projection",)),
}
_ATTENTION = re.compile(r"(.*_)?(attn|attention)")
_MLP = re.compile(r"(.*_)?(mlp|ffn|feed_forward)|experts")
_GATE_UP = ("gate_proj", "up_proj")
_EMBEDDING = re.compile(r".*embed.*|wte|wpe")


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer that can be adapted: y (outputs) = W · x (inputs). `head` marks the output head."""

    name: str
    inputs: int
    outputs: int
    head: bool


V = TypeVar("V")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the adapter on one module.

    Attributes:
        scaling: what multiplies B·A.
        learning_rate: at its peak, where it is not that of the whole adapter.
    """

    rank: int
    alpha: float
    scaling: float
    learning_rate: float | None


def roles(module: Module) -> tuple[str, ...]:
    """Those of `ROLES` that a layer plays: all three of query, key and value where they are fused; none if unknown."""
    if module.head:
        return ("head",)
    *parents, last = module.name.split(".")
    if any(_ATTENTION.fullmatch(parent) for parent in parents):
        return _IN_ATTENTION.get(last, ())
    if any(_MLP.fullmatch(parent) for parent in parents) or last in ("fc1", "fc2"):  # OPT's lie in the layer itself
        return ("mlp",)
    return ()


def shared_input(module: Module) -> str:
    """A key that layers have in common when they read the same input: q, k and v of an attention, gate and up."""
    parent, _, last = module.name.rpartition(".")
    found = roles(module)
    if len(found) == 1 and found[0] in _QKV:
        return f"{parent}.qkv"
    return f"{parent}.gate_up" if found == ("mlp",) and last in _GATE_UP else module.name


def matches(entry: str, module: Module) -> bool:
    """Whether `entry` of a list of target modules or of a pattern names this module.

    query, key and value do not name a fused layer: that takes all three (see `targets`), or its own name.
    """
    if entry in ROLES:
        return roles(module) == (entry,)
    return fnmatchcase(module.name, entry) or fnmatchcase(module.name, f"*.{entry}")


def targets(modules: Sequence[Module], config: LoraConfig) -> tuple[Module, ...]:
    """The modules that `config.target_modules` names, in the model's order; "all-linear" leaves the head out.

    Raises:
        SpecError: a name fits no module, or a part of a fused layer; a pattern's entry fits none of the targets.
    """
    if config.target_modules == ALL_LINEAR:
        chosen = tuple(module for module in modules if not module.head)
    else:
        entries = config.target_modules
        fused = {module.name for module in modules if roles(module) == _QKV}
        named = {module.name for entry in entries for module in _named(modules, entry, entries, fused)}
        chosen = tuple(module for module in modules if module.name in named)
    for field in ("rank_pattern", "alpha_pattern", "learning_rate_pattern"):
        for entry in getattr(config, field):
            if not any(matches(entry, module) for module in chosen):
                raise _no_match(f"lora.{field}", "no adapted layer", entry, chosen)
    return chosen


def shape(config: LoraConfig, module: Module) -> Shape:
    """What `config` says of one of its `targets`."""
    rank = _last_match(config.rank_pattern, module, config.rank)
    alpha = _last_match(config.alpha_pattern, module, 2.0 * rank if config.alpha is None else config.alpha)
    rate = _last_match(config.learning_rate_pattern, module, None)
    return Shape(rank, float(alpha), scaling_of(rank, alpha, config.use_rslora), rate)


def last_names(modules: Sequence[Module], chosen: Sequence[Module]) -> tuple[str, ...]:
    """Last names ("q_proj") that stand for exactly the modules `chosen`; their full names where there are none such."""
    full = {module.name for module in chosen}
    names = {name.rpartition(".")[2] for name in full}
    matched = {module.name for module in modules if module.name.rpartition(".")[2] in names}
    return tuple(sorted(names if matched == full else full))


def _named(modules: Sequence[Module], entry: str, entries: Sequence[str], fused: set[str]) -> list[Module]:
    found = [module for module in modules if matches(entry, module)]
    if entry in _QKV and fused:
        if missing := [role for role in _QKV if role not in entries]:
            raise SpecError(
                f"lora.target_modules: query, key and value are one layer in this base model ({min(fused)}), which can "
                f"only be adapted whole; name {' and '.join(missing)} too",
                field="lora.target_modules",
            )
        found += [module for module in modules if module.name in fused]
    if not found:
        raise _no_match("lora.target_modules", "no linear layer", entry, modules)
    return found


def _last_match(pattern: Mapping[str, V], module: Module, default: V) -> V:
    values = [value for entry, value in pattern.items() if matches(entry, module)]
    return values[-1] if values else default


def _no_match(field: str, what: str, entry: str, modules: Sequence[Module]) -> SpecError:
    known = sorted({module.name.rpartition(".")[2] for module in modules})
    short, there_are = entry[:60], f"there are {', '.join(known[:20])}"
    if _EMBEDDING.fullmatch(entry.rpartition(".")[2]):
        return SpecError(
            f"{field}: {short!r} is an embedding, and only linear layers are adapted; {there_are}", field=field
        )
    if entry in ROLES:
        return SpecError(f"{field}: {what} has the role {entry} alone; {there_are}", field=field)
    return SpecError(f"{field}: {what} is called {short!r}; {there_are}", field=field)
