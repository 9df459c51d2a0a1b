"""What a format has no place for, told from the base model's config and the names of modules. No torch.

A service asks before it queues an export; the export asks again, of configs with every default filled in. What a raw
config leaves open is not refused here.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_engine import strict_json
from lora_engine.adapter_header import LINEAGE, Header
from lora_engine.errors import AdapterError
from lora_engine.target_modules import Module

# Kinds of models (`model_type`) whose tensors and orders of rows are known as llama.cpp has them …
GGUF_ADAPTERS = ("gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
# … and those that it is known to compute alike from a whole model.
GGUF_MODELS = ("llama", "mistral", "smollm3", "qwen2", "qwen3")
_ROPES = ("default", "linear", "llama3")
_MISTRALS_WINDOW = 4096  # of transformers' MistralConfig, where a config names none


def check_modules(shapes: Mapping[str, tuple[int, int]], modules: Iterable[Module]) -> None:
    """Raises AdapterError for a module that is not among the linear layers of the base model, in this shape.

    `shapes` are those of the adapters' deltas (out, in) by module.
    """
    known = {module.name: (module.outputs, module.inputs) for module in modules}
    for name, shape in shapes.items():
        if name not in known:
            raise AdapterError(
                f"{name}: the base model has no linear layer of this name (experts that lie together in one tensor "
                "are none); use the base model that the adapter was trained on"
            )
        if known[name] != shape:
            raise AdapterError(
                f"{name}: {shape} in the adapter, {known[name]} in the base model (out × in); use the base model that "
                "the adapter was trained on"
            )


def check_digest(trained_on: str | None, digest: str, name: str) -> None:
    """Raises AdapterError where the adapters say that they belong to other files than those of the base model."""
    if trained_on not in (None, digest):
        raise AdapterError(
            f"the adapters were trained on another base model ({trained_on}) than {name} ({digest}); use that one"
        )


def check_gguf(config: Mapping[str, Any]) -> None:
    """Raises AdapterError for a model whose tensors llama.cpp's names are not known of."""
    if config.get("model_type") not in GGUF_ADAPTERS:
        raise _unfit(
            f"models of the kind {config.get('model_type')} are not written as GGUF; known are "
            f"{', '.join(GGUF_ADAPTERS)}. Export it merged, and convert the folder with llama.cpp's own script"
        )


def check_gguf_model(config: Mapping[str, Any]) -> None:
    """Raises AdapterError for a model that llama.cpp would not compute alike."""
    kind = config.get("model_type")
    if kind not in GGUF_MODELS:
        raise _unfit(
            f"whole models of the kind {kind} are not written as GGUF, only {', '.join(GGUF_MODELS)}; export it merged,"
            " and convert the folder with llama.cpp's own script"
        )
    windows = [layer for layer in (config.get("layer_types") or []) if layer != "full_attention"]
    if windows or (kind == "mistral" and config.get("sliding_window", _MISTRALS_WINDOW)):
        raise _unfit(
            "the model attends within a sliding window, which llama.cpp's loader ignores; export it merged, or the "
            "adapter alone (gguf)"
        )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPES or rope.get("partial_rotary_factor", 1) != 1:
        raise _unfit(f"rotary embeddings of the kind {rope_type} are not written as GGUF; export it merged")
    rotates = enumerate(config.get("no_rope_layers") or ())
    if kind == "smollm3" and any(bool((index + 1) % 4) != bool(on) for index, on in rotates):
        raise _unfit(
            "llama.cpp leaves rotary embeddings out of every fourth layer, this model of others; export it merged"
        )


def check_untied(tied_head: str | None, modules: Collection[str]) -> None:
    """Raises AdapterError for an adapter on an output head that has no weight of its own in llama.cpp."""
    if tied_head in modules:
        raise AdapterError(
            f"{tied_head}: it shares its weight with the input embeddings, and llama.cpp has no output head "
            "of its own to put an adapter on; export it as gguf-merged",
            field="format",
        )


def check_layers(modules: Iterable[str], layers: str) -> None:
    """Raises AdapterError for a module outside the list of layers that is called `layers` ("model.layers")."""
    outside = sorted(name for name in modules if not name.startswith(f"{layers}."))
    if outside:
        raise AdapterError(f"{outside[0]}: mlx-lm puts adapters on the layers alone; export it merged", field="format")


def quantizations(headers: Iterable[Header]) -> tuple[str, ...]:
    """Of the weights that the adapters were trained against, sorted: "none", "nf4", "int8"; or "unknown".

    As the lineage of a trained adapter has it, or of a merged one whose sources agree.
    """
    return tuple(sorted({_quantization(header) or "unknown" for header in headers}))


def check_quantizations(base: str, found: Collection[str]) -> None:
    """Raises AdapterError where nothing says which weights the export is on; `base` as `ExportConfig` has it."""
    if base == "auto" and len(found) > 1:
        raise AdapterError(
            f"base: the adapters were trained on different quantisations of the base model "
            f"({', '.join(found)}); say which one the export shall be on",
            field="base",
        )


def _quantization(header: Header) -> str | None:
    path = header.folder / LINEAGE
    lineage: Any = strict_json.loads(path.read_bytes()) if path.exists() else {}
    training = lineage.get("training") if isinstance(lineage, dict) else None
    found = training.get("quantization") if isinstance(training, dict) else None
    return found if found in ("none", "nf4", "int8") else None


def _unfit(message: str) -> AdapterError:
    return AdapterError(f"format: {message}", field="format")
