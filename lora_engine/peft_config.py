"""`adapter_config.json` as PEFT 0.21 writes it: what each setting does to a module's scaling, or why it is refused.

A setting this reader does not know must be off: a key that silently changes the delta would make every sum wrong.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

from lora_engine.errors import AdapterError
from lora_engine.name_patterns import NamePatterns

# They say how the adapter was made or is run, and change nothing in scaling · B · A.
_WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_HANDLED = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_to_transform", "lora_alpha", "peft_type",
    "r", "rank_pattern", "target_modules", "use_rslora",
}  # fmt: skip
_LARGEST_ALPHA = 1_000_000
# Initialisations that subtract the adapter's start from the base model's weights (PiSSA, arXiv 2404.02948, and kin).
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_config")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a config says about scaling and targets; patterns are regular expressions on a module name's end."""

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: NamePatterns[Any]
    alpha_pattern: NamePatterns[Any]
    base_model_name: str
    target_modules: tuple[str, ...]

    def rank_of(self, module: str) -> int:
        return _positive_int(self.rank_pattern.first(module, self.rank), f"the rank of {module}")

    def alpha_of(self, module: str) -> float:
        return _number(self.alpha_pattern.first(module, self.alpha), f"the alpha of {module}")


def scaling_of(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / rank (arXiv 2106.09685), or alpha / √rank (rsLoRA, arXiv 2312.03732)."""
    return alpha / (sqrt(rank) if use_rslora else rank)


def parse(config: Any, taken: Collection[str] = ()) -> Settings:
    """Settings of a decoded `adapter_config.json`; the caller takes care of the keys `taken`, whatever they say.

    `target_modules` of the result is empty where the config names its targets in a way that only the weights resolve
    (a regular expression, a selection of layers, exclusions).

    Raises:
        AdapterError: not a LoRA config, or a setting whose effect cannot be kept.
    """
    if not isinstance(config, dict):
        raise AdapterError("adapter_config.json: expected an object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"adapter_config.json: peft_type is {config.get('peft_type')!r}, only LORA adapters are read"
        )
    _refuse({name: value for name, value in config.items() if name not in taken})
    return Settings(
        rank=_positive_int(config.get("r"), "r"),
        alpha=_number(config.get("lora_alpha"), "lora_alpha"),
        use_rslora=_flag(config, "use_rslora"),
        rank_pattern=_patterns(config, "rank_pattern"),
        alpha_pattern=_patterns(config, "alpha_pattern"),
        base_model_name=str(config.get("base_model_name_or_path") or ""),
        target_modules=_targets(config),
    )


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name, False)
    if value not in (True, False, None) or not isinstance(value, bool | None):
        raise AdapterError(f"adapter_config.json: {name} is {value!r}, expected true or false")
    return bool(value)


def portable(rank: int, alpha: int, base_model_name: str, target_modules: list[str]) -> dict[str, Any]:
    """The config every loader (PEFT, vLLM, SGLang, TGI, llama.cpp) reads alike: one rank, one alpha, no patterns."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _refuse(config: Mapping[str, Any]) -> None:
    if config.get("bias", "none") != "none":
        raise AdapterError(f"adapter_config.json: bias is {config['bias']!r}; trained biases are not part of B·A")
    initialisation = config.get("init_lora_weights")
    if isinstance(initialisation, str) and initialisation.lower().startswith(_CHANGES_BASE):
        raise AdapterError(
            f"adapter_config.json: init_lora_weights is {initialisation!r}, which changed the base model too; "
            "convert it to a plain LoRA adapter first (PEFT: path_initial_model_for_weight_conversion)"
        )
    for name in sorted(set(config) - _WITHOUT_EFFECT - _HANDLED):
        if config[name]:
            raise AdapterError(f"adapter_config.json: {name} is set, and adapters with it are not supported")


def _targets(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("target_modules")
    if not isinstance(names, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return ()
    if not all(isinstance(name, str) for name in names):
        raise AdapterError("adapter_config.json: target_modules must be names")
    return tuple(sorted(set(names)))


def _patterns(config: Mapping[str, Any], name: str) -> NamePatterns[Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"adapter_config.json: {name} must be an object")
    try:
        return NamePatterns(value)
    except AdapterError as error:
        raise AdapterError(f"adapter_config.json: {name}: {error.message}") from None


def _positive_int(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"adapter_config.json: {name} is {str(value)[:40]}, expected a positive whole number")
    return value


def _number(value: Any, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= _LARGEST_ALPHA:  # NaN too
        raise AdapterError(
            f"adapter_config.json: {name} is {str(value)[:40]}, expected a number of at most {_LARGEST_ALPHA:,} in size"
        )
    return float(value)
