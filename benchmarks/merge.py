"""Stacking adapters: Luthier against PEFT's ``add_weighted_adapter(combination_type="cat")``, on the same adapters.

    python -m benchmarks.merge

Both go from folders to a folder; PEFT is given its base model loaded. Rounds are interleaved. Errors are the largest
relative Frobenius distance of a module's delta from the fp64 sum of the sources' deltas. Prints a Markdown table.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_engine import adapter
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge

ROUNDS = 5
WEIGHTS = (0.7, -0.4, 1.2)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, list[dict[str, Any]]] = {
    "three of rank 16": [{"r": 16, "lora_alpha": 32}] * 3,
    "ranks 8, 16, 32": [{"r": rank, "lora_alpha": 32} for rank in (8, 16, 32)],
    "one of them rsLoRA": [{"r": 16, "lora_alpha": 32, "use_rslora": index == 0} for index in range(3)],
}


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{len(WEIGHTS)} adapters on all linear layers of a Llama of 2 layers, hidden 576; medians of {ROUNDS} rounds\n"
    )
    print("| case | Luthier, s | PEFT, s | Luthier, error | PEFT, error |")
    print("|---|---|---|---|---|")
    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {name} | {' | '.join(measure(Path(folder), settings))} |", flush=True)


def measure(folder: Path, settings: list[dict[str, Any]]) -> list[str]:
    """Seconds of both and errors of both, as text."""
    sources = [save_random(folder / f"source-{index}", index, item) for index, item in enumerate(settings)]
    base = base_model()
    methods: tuple[Callable[[], Path], ...] = (
        lambda: ours(sources, folder / "ours"),
        lambda: peft(base, sources, folder / "peft"),
    )
    seconds: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for index, method in enumerate(methods):
            started = time.perf_counter()
            method()
            seconds[index].append(time.perf_counter() - started)
    errors = [error(sources, method()) for method in methods]
    return [*(f"{statistics.median(item):.3f}" for item in seconds), *(f"{item:.1e}" for item in errors)]


def ours(sources: list[Path], folder: Path) -> Path:
    pairs = zip(sources, WEIGHTS, strict=True)
    merge(MergeSpec(adapters=[WeightedAdapter(path=str(path), weight=w) for path, w in pairs], output=str(folder)))
    return folder


def peft(base: Any, sources: list[Path], folder: Path) -> Path:
    """As PEFT's documentation does it."""
    shutil.rmtree(folder, ignore_errors=True)
    names = [path.name for path in sources]
    model = PeftModel.from_pretrained(base, str(sources[0]), adapter_name=names[0])
    for path in sources[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    model.add_weighted_adapter(names, list(WEIGHTS), "merged", combination_type="cat")
    model.save_pretrained(str(folder), selected_adapters=["merged"], save_embedding_layers=False)
    model.unload()
    return folder / "merged"


def error(sources: list[Path], result: Path) -> float:
    """The largest relative error of a module's delta."""
    total: dict[str, Tensor] = {}
    for path, weight in zip(sources, WEIGHTS, strict=True):
        source = adapter.read(path)
        for module in source.weights:
            total[module] = total.get(module, torch.tensor(0.0)) + weight * adapter.delta(source, module)
    found = adapter.read(result)
    return max(float((adapter.delta(found, name) - value).norm() / value.norm()) for name, value in total.items())


def base_model() -> Any:
    config = LlamaConfig(
        vocab_size=256, hidden_size=576, intermediate_size=1536, num_hidden_layers=2,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def save_random(folder: Path, seed: int, settings: dict[str, Any]) -> Path:
    model = get_peft_model(base_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=MODULES, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
    model.save_pretrained(str(folder), save_embedding_layers=False)
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "benchmark"}))
    return folder


if __name__ == "__main__":
    main()
