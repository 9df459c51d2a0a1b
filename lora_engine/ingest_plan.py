"""What is to be done with a foreign adapter, or why it is refused, as its config and its file's header say. No torch.

PEFT's own rules decide which tensors of a file count; a tensor that PEFT would pass over in silence is an error here.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_engine import peft_config
from lora_engine.errors import AdapterError
from lora_engine.ingest_config import IngestConfig
from lora_engine.ingest_targets import Targets
from lora_engine.name_patterns import NAME
from lora_engine.peft_config import Settings
from lora_engine.safetensors_file import FLOATS, Entry

_PREFIX = "base_model.model."
# <module>.lora_A.weight, as some trainers save it with the adapter's name in it: <module>.lora_A.default.weight
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([\w-]+))?\.(weight|bias)")
_MAGNITUDE = re.compile(r"(.+)\.lora_magnitude_vector(?:\.([\w-]+))??(?:\.weight)?")
_WHOLE = re.compile(r"(.+?)(?:\.base_layer|\.modules_to_save(?:\.[\w-]+)?)?\.(weight|bias)")
_EMBEDDINGS = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "embedding", "output")
_MAX_SAVED = 100
_MAX_WHOLE = 1000
_PLAIN_STARTS = (True, False, None, "true", "gaussian", "eva", "mica", "orthogonal")
_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga")
_TAKEN = ("init_lora_weights", "lora_bias", "modules_to_save", "use_dora")
_REASONS = {
    "alora_invocation_tokens": "it is only active after certain tokens, which no weights can say",
    "layer_replication": "it is of a base model with repeated layers",
    "target_parameters": "it is on parameters that are no linear layers (experts that lie in one tensor, say)",
    "trainable_token_indices": "it trains rows of the embedding, which B·A on linear layers cannot say",
}


@dataclass(slots=True)
class ModulePlan:
    """One adapted linear layer: the keys of its tensors in the file, its rank and what multiplies B·A."""

    keys: dict[str, str]  # "A", "B", and where the file has them "bias" and "magnitude"
    rank: int = 0
    inputs: int = 0
    outputs: int = 0
    alpha: float = 0.0
    scaling: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """A foreign adapter that can be taken in, as far as its header says.

    Attributes:
        modules: adapted linear layers by name.
        whole: whole parameters that the file holds, by name in the base model ("lm_head.weight") → key.
        moved_base: its initialisation changed the base model: what it was before training must be subtracted.
        notes: what was read in another way than it was written.
    """

    settings: Settings
    modules: Mapping[str, ModulePlan]
    whole: Mapping[str, str]
    moved_base: bool
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def needs_base(self) -> bool:
        return bool(self.whole) or any("magnitude" in item.keys for item in self.modules.values())


def plan(config: Any, tensors: Mapping[str, Entry], ingest: IngestConfig | None = None) -> Plan:
    """Check a decoded adapter_config.json against the header of the adapter's weights.

    Raises:
        AdapterError: what the adapter does cannot be kept, or needs a conversion that `ingest` does not ask for;
            tensors that are missing, that do not fit, or that PEFT would not load.
    """
    settings = _settings(config)
    notes: list[str] = []
    modules, whole = _sorted(_named(tensors, notes), config, notes)
    targets = Targets(config)
    for name, item in modules.items():
        if not targets.include(name):
            raise AdapterError(
                f"{name}: the file has weights of it, but the config does not target it: PEFT would not load them"
            )
        _measure(name, item, tensors, settings, dora=bool(config.get("use_dora")))
    if not modules and not whole:
        raise AdapterError("the file holds no LoRA weights")
    rank = ingest.rank if ingest is not None else None
    if config.get("use_dora") and rank is None:
        raise AdapterError(
            "use_dora is set: DoRA scales the base model's rows, which no B·A does; give a rank for its best low-rank "
            "form"
        )
    return Plan(settings, dict(sorted(modules.items())), whole, _moves_base(config), tuple(notes))


def _settings(config: Any) -> Settings:
    values = config if isinstance(config, dict) else {}
    for name, reason in _REASONS.items():
        if values.get(name):
            raise AdapterError(f"adapter_config.json: {name} is set, and such an adapter cannot be taken in: {reason}")
    for name in ("use_dora", "lora_bias"):
        if not isinstance(values.get(name), bool | None):
            raise AdapterError(f"adapter_config.json: {name} is {str(values[name])[:40]}, expected true or false")
    return peft_config.parse(config, taken=_TAKEN)


def _moves_base(config: Mapping[str, Any]) -> bool:
    """Whether what the adapter was before training was subtracted from the base model's weights."""
    start = config.get("init_lora_weights", True)
    if isinstance(start, str):
        start = start.lower()
        if start.startswith(_MOVES_BASE):
            return True
        if start == "loftq":
            raise AdapterError("init_lora_weights is 'loftq': the adapter belongs to a base model that LoftQ quantised")
    if not isinstance(start, str | bool | None) or start not in _PLAIN_STARTS:
        raise AdapterError(
            f"init_lora_weights is {str(start)[:40]!r}: it is not known whether that changes the base model"
        )
    return False


def _named(tensors: Mapping[str, Entry], notes: list[str]) -> dict[str, str]:
    """Key without PEFT's prefix → key."""
    for key, entry in tensors.items():
        if not NAME.fullmatch(key):
            raise AdapterError(f"{key[:80]!r}: not the name of a tensor of a model")
        if entry.dtype not in FLOATS:
            raise AdapterError(f"{key}: weights of type {entry.dtype} are not read")
    prefixed = [key.startswith(_PREFIX) for key in tensors]
    if any(prefixed) and not all(prefixed):
        raise AdapterError(
            f"{next(key for key in tensors if not key.startswith(_PREFIX))}: {_PREFIX} is missing before it"
        )
    if tensors and not any(prefixed):
        notes.append(f"the keys of the file had no {_PREFIX} before them")
    return {key.removeprefix(_PREFIX): key for key in tensors}


def _sorted(
    named: Mapping[str, str], config: Mapping[str, Any], notes: list[str]
) -> tuple[dict[str, ModulePlan], dict[str, str]]:
    """Every tensor to the module that it belongs to, or to the whole parameters."""
    modules: dict[str, ModulePlan] = defaultdict(lambda: ModulePlan({}))
    whole: dict[str, str] = {}
    adapters = set()
    for name, key in named.items():
        if ".lora_embedding_" in name:
            raise AdapterError(f"{key}: LoRA on an embedding; only linear layers are adapted. Train without it")
        if "trainable_tokens" in name:
            raise AdapterError(f"{key}: {_REASONS['trainable_token_indices']}")
        if factor := _FACTOR.fullmatch(name):
            module, letter, adapter, leaf = factor.groups()
            role = letter if leaf == "weight" else "bias"
            if role == "bias" and (letter == "A" or not config.get("lora_bias")):
                raise AdapterError(f"{key}: a bias, which the config (lora_bias) does not name")
        elif magnitude := _MAGNITUDE.fullmatch(name):
            module, adapter, role = magnitude[1], magnitude[2], "magnitude"
        else:
            whole[_whole(name, key, config)] = key
            if len(whole) > _MAX_WHOLE:
                raise AdapterError(f"more than {_MAX_WHOLE} parameters are in the file whole: that is no adapter")
            continue
        adapters.add(adapter)
        if role in modules[module].keys:
            raise AdapterError(f"{key}: {module} has two of it in the file")
        modules[module].keys[role] = key
    if len(adapters) > 1:
        raise AdapterError("the file holds several adapters; save each in a folder of its own")
    if adapters - {None}:
        notes.append(f"the keys of the file had the adapter's name, {adapters.pop()}, in them")
    return modules, whole


def _whole(name: str, key: str, config: Mapping[str, Any]) -> str:
    """The name in the base model of a parameter that the file holds whole."""
    found = _WHOLE.fullmatch(name)
    saved = config.get("modules_to_save") or []
    if not isinstance(saved, list) or len(saved) > _MAX_SAVED or not all(isinstance(item, str) for item in saved):
        raise AdapterError(f"adapter_config.json: modules_to_save must be a list of at most {_MAX_SAVED} names")
    if found is None or not _claimed(found[1], saved):
        raise AdapterError(f"{key}: not a LoRA weight of a linear layer, and not in modules_to_save")
    return f"{found[1]}.{found[2]}"


def _claimed(module: str, saved: Sequence[str]) -> bool:
    """PEFT saves every module whose name ends like an entry ("norm" names "input_layernorm" too) with all in it."""
    parts = module.split(".")
    parents = [".".join(parts[: length + 1]) for length in range(len(parts))]
    return parts[-1] in _EMBEDDINGS or any(parent.endswith(item) for parent in parents for item in saved if item)


def _measure(name: str, item: ModulePlan, tensors: Mapping[str, Entry], settings: Settings, *, dora: bool) -> None:
    """Fill in rank, shape and scaling; the tensors must fit them."""
    for letter in "AB":
        if letter not in item.keys:
            raise AdapterError(f"{name}: lora_{letter} is missing")
    A, B = (tensors[item.keys[letter]].shape for letter in "AB")
    rank = settings.rank_of(name)
    if len(A) != 2 or len(B) != 2 or A[0] != rank or B[1] != rank:
        raise AdapterError(f"{name}: A {A} and B {B} do not have the config's rank {rank}")
    if dora != ("magnitude" in item.keys):
        raise AdapterError(
            f"{name}: lora_magnitude_vector is {'missing' if dora else 'there, but use_dora is not set'}"
        )
    for role in {"bias", "magnitude"} & set(item.keys):
        if tensors[item.keys[role]].shape != (B[0],):
            raise AdapterError(f"{item.keys[role]}: expected one number for each of {B[0]} outputs")
    item.rank, item.inputs, item.outputs, item.alpha = rank, A[1], B[0], settings.alpha_of(name)
    item.scaling = peft_config.scaling_of(rank, item.alpha, settings.use_rslora)
