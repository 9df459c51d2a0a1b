"""The exact stack from folder to folder: against PEFT's `cat`, and as the number of adapters grows."""

import argparse
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import _merge_adapters as random_adapters
from benchmarks._merge_report import Section, clock, ratio, take_turns
from lora_engine.merging.config import MergeSpec, WeightedAdapter
from lora_engine.merging.merge import merge

WEIGHTS = (0.7, -0.4, 1.2)
COUNTS = (1, 2, 4, 8, 16)
CASES: dict[str, list[dict[str, Any]]] = {
    "three of rank 16": [{"r": 16, "lora_alpha": 32}] * 3,
    "ranks 8, 16, 32": [{"r": rank, "lora_alpha": 32} for rank in (8, 16, 32)],
    "one of them rsLoRA": [{"r": 16, "lora_alpha": 32, "use_rslora": index == 0} for index in range(3)],
}


def stack(folder: Path, options: argparse.Namespace) -> Section:
    """Three adapters on all linear layers of a Llama of two layers, hidden 576."""
    section = Section(
        "Stack",
        f"Three adapters with weights {', '.join(f'{weight:g}' for weight in WEIGHTS)} on all linear layers of a Llama "
        'of 2 layers, hidden 576, against `add_weighted_adapter(combination_type="cat")`, from folders to a folder; '
        "PEFT is given its base model loaded. Ours writes a certificate too. Error: the largest relative Frobenius "
        "distance of a module's delta from the sum in float64.",
        ["case", "Luthier", "PEFT", "PEFT by Luthier", "error, Luthier", "error, PEFT"],
    )
    base = random_adapters.llama(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    )  # fmt: skip
    for number, (name, settings) in enumerate(CASES.items()):
        own = folder / str(number)
        sources = [
            random_adapters.save_peft(
                own / f"source-{seed}", seed, base, target_modules=random_adapters.ALL_LINEAR, **item
            )
            for seed, item in enumerate(settings)
        ]
        seconds = take_turns(
            options.rounds, ours=partial(_ours, sources, own / "ours"), peft=partial(_peft, base, sources, own / "peft")
        )
        wanted = random_adapters.dense(sources, WEIGHTS)
        errors = [random_adapters.error(own / path, wanted) for path in ("ours", "peft/merged")]
        by = ratio(seconds["peft"], seconds["ours"])
        section.rows.append(
            [name, clock(seconds["ours"]), clock(seconds["peft"]), f"{by:.1f}", *(f"{item:.1e}" for item in errors)]
        )
        section.figures[name] = {"seconds": seconds, "ratio": by, "errors": errors}
    return section


def adapters(folder: Path, options: argparse.Namespace) -> Section:
    """k adapters of rank 16 on one layer of a 7B model."""
    shapes = random_adapters.seven_billion(1, options.size)
    section = Section(
        "Cost by the number of adapters",
        f"Rank 16, {len(shapes)} modules of one layer of Llama 7B, from folders to a folder, certificate included. No "
        "base model is opened: the cost is that of the factors alone.",
        ["adapters", "stack", "per adapter", "linear (compressed to 16)", "per adapter"],
    )
    sources = [random_adapters.save_ours(folder / f"source-{seed}", seed, shapes, 16) for seed in range(COUNTS[-1])]
    for count in COUNTS:
        settings: dict[str, dict[str, Any]] = {"stack": {}, "linear": {"method": "linear", "rank": 16}}
        seconds = take_turns(
            options.rounds,
            **{
                method: partial(_merged, sources[:count], folder / method, **setting)
                for method, setting in settings.items()
            },
        )
        cells = [
            text
            for name in settings
            for text in (clock(seconds[name]), clock([item / count for item in seconds[name]]))
        ]
        section.rows.append([str(count), *cells])
        section.figures[str(count)] = seconds
    return section


def _ours(sources: list[Path], folder: Path) -> None:
    pairs = zip(sources, WEIGHTS, strict=True)
    merge(
        MergeSpec(
            adapters=[WeightedAdapter(path=str(path), weight=weight) for path, weight in pairs], output=str(folder)
        )
    )


def _merged(sources: list[Path], folder: Path, **settings: Any) -> None:
    merge(MergeSpec(adapters=[WeightedAdapter(path=str(path)) for path in sources], output=str(folder), **settings))


def _peft(base: Any, sources: list[Path], folder: Path) -> None:
    """As PEFT's documentation does it."""
    shutil.rmtree(folder, ignore_errors=True)
    model = random_adapters.loaded(base, sources)
    model.add_weighted_adapter([path.name for path in sources], list(WEIGHTS), "merged", combination_type="cat")
    model.save_pretrained(str(folder), selected_adapters=["merged"], save_embedding_layers=False)
    model.unload()
