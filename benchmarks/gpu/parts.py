"""The parts of the benchmark but for the peers: which cells there are, and in which order they are measured."""

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.contest import lora_peers, qlora_peers
from benchmarks.gpu.run import Row, Run
from benchmarks.gpu.shapes import ALPACA

# What holds the base model: (title, quantization, whether its dequantised weights are kept).
KINDS = (("LoRA bf16", "none", None), ("QLoRA NF4", "nf4", False), ("QLoRA dequantised once", "nf4", True))


def correct(run: Run) -> None:
    """Ours against PEFT, fp32 and itself on a small model."""
    run.stream("correct.all_of_it", {"model": str(run.model("small")), "title": "correctness"})


def rates(run: Run) -> None:
    """The device's matmul rates."""
    run.stream("cells.rate", {"title": "matmul rate"})


def speed(run: Run) -> None:
    """Both models, three kinds of base, lengths and ranks; those that matter most come first."""
    scale = run.scale
    lengths: tuple[Any, ...] = (ALPACA, *scale.lengths)
    order = [(scale.ranks[0], ALPACA), (scale.ranks[0], scale.lengths[-1])]
    order += [(rank, length) for rank in scale.ranks for length in lengths if (rank, length) not in order]
    for model in dict.fromkeys((scale.eight, scale.seven)):
        for quantization in ("none", "nf4"):
            cells = [
                {
                    "name": f"{model}, {title}, r {rank}, {length}",
                    "length": length,
                    "lora": {"rank": rank},
                    "once": once,
                }
                for rank, length in order
                for title, kind, once in KINDS
                if kind == quantization
            ]
            _grid(run, model, quantization, cells)


def memory(run: Run) -> None:
    """As little memory as the planner can do with: the article's rows of memory, told how much there is."""
    scale = run.scale
    toy = run.device == "cpu"
    asked = [
        ("QLoRA r 8", "nf4", scale.ranks[1], scale.memory, 5.5),
        ("QLoRA r 256", "nf4", scale.ranks[-1], scale.lengths[-1], 16.0),
        ("LoRA bf16 r 8", "none", scale.ranks[1], scale.memory, 16.0),
    ]
    for title, quantization, rank, length, limit in asked:
        # The planner keeps a tenth in reserve of what it is told.
        cell = {"length": length, "lora": {"rank": rank}, "tokens": length, "memory": limit / 0.9}
        if quantization == "nf4" and not toy:
            cell["once"] = False
        _grid(run, scale.seven, quantization, [{"name": f"{scale.seven}, {title}, {length}, ≤ {limit} GB", **cell}])


def planner(run: Run) -> None:
    """Predicted against measured, over a grid: memory within 5 %, time within 15 %."""
    scale = run.scale
    low, middle, high = sorted(scale.ranks)[0], scale.ranks[0], max(scale.ranks)
    long, short = scale.lengths[-1], scale.lengths[0]
    cells: dict[str, tuple[str, Row]] = {
        "bf16": ("none", {}),
        "bf16, r high": ("none", {"lora": {"rank": high}}),
        "bf16, r low, query and value": ("none", {"lora": {"rank": low, "target_modules": ["query", "value"]}}),
        "bf16, long": ("none", {"length": long}),
        "bf16, one document a step": ("none", {"length": long, "tokens": long}),
        "bf16, many tokens a step": ("none", {"tokens": 4 * scale.tokens}),
        "bf16, Alpaca": ("none", {"length": ALPACA}),
        "bf16, dropout": ("none", {"lora": {"rank": middle, "dropout": 0.1}}),
        "bf16, SGD": ("none", {"training": {"optimizer": "sgd"}}),
        "bf16, 40 GB": ("none", {"length": long, "memory": 40.0}),
        "bf16, 24 GB": ("none", {"length": long, "memory": 24.0}),
        "NF4": ("nf4", {"once": False}),
        "NF4, dequantised once": ("nf4", {"once": True}),
        "NF4, r high": ("nf4", {"once": False, "lora": {"rank": high}}),
        "NF4, Alpaca": ("nf4", {"once": False, "length": ALPACA}),
        "NF4, 16 GB": ("nf4", {"length": long, "memory": 16.0}),
        "NF4, 12 GB": ("nf4", {"length": long, "memory": 12.0}),
        "NF4, paged 8-bit AdamW": ("nf4", {"once": False, "training": {"optimizer": "paged_adamw_8bit"}}),
    }
    for quantization in ("none", "nf4"):
        chosen = [
            {"name": name, "length": short, "lora": {"rank": middle}} | more
            for name, (kind, more) in cells.items()
            if kind == quantization
        ]
        _grid(run, scale.eight, quantization, chosen)
    _errors(run.rows.get(run.part, []))


def article(run: Run) -> None:
    """7B QLoRA, the highest rank, Alpaca's lengths, an epoch extrapolated from at least a tenth of it."""
    scale = run.scale
    run.stream(
        "cells.article",
        {
            "title": f"{scale.seven}, QLoRA r {max(scale.ranks)}, alpha {2 * max(scale.ranks)}, an epoch of Alpaca",
            "model": str(run.model(scale.seven)),
            "quantization": "nf4",
            "rank": max(scale.ranks),
            "epoch": scale.epoch,
            "share": scale.share,
            "batch": scale.article_batch,
            "memory": 16.0 / 0.9,
            "seconds": run.left - 30,
        },
    )


def start(run: Run) -> None:
    """Load, first step cold, next job warm."""
    name = run.scale.seven
    config = written(run, name)
    for title, quantization, _ in KINDS[:2]:
        more = {"title": f"{name}, {title}", "quantization": quantization, "rank": run.scale.ranks[0]}
        run.stream("start.measure", config | more)
    if run.text_model is not None and any(run.text_model.glob("*.safetensors")):
        more = {"title": "SmolLM2-135M, LoRA bf16", "quantization": "none", "rank": run.scale.ranks[0]}
        run.stream("start.measure", config | more | {"model": str(run.text_model)})


def written(run: Run, name: str) -> Row:
    """The paths of a folder with weights and of a dataset, which are written where they are not there yet."""
    folder = run.model(name)
    config = {"model": str(folder), "dataset": str(run.folder / "rows.jsonl")}
    if not (folder / "model.safetensors.index.json").exists():
        with run.child("start.write", config) as child:
            for _ in child.rows(run.deadline):
                pass
    return config


def text(run: Run) -> None:
    """SmolLM2-135M on real text, where a folder is given: whether losses fall as they should, with the figures."""
    if run.text_model is None:
        run.add({"name": "SmolLM2-135M", "status": "not run", "why": "no --model"})
        return
    if run.data is None:
        run.add({"name": "SmolLM2-135M", "status": "not run", "why": "no --data"})
        return
    rank, output = run.scale.ranks[1], run.folder / "output"
    config = {"model": str(run.text_model), "data": str(run.data), "rank": rank, "output": str(output)}
    run.stream("text.measure", config | {"title": "SmolLM2-135M, Alpaca"})


def _grid(run: Run, model: str, quantization: str, cells: list[dict[str, Any]]) -> None:
    names = [cell["name"] for cell in cells]
    run.stream("cells.grid", {"model": str(run.model(model)), "quantization": quantization, "cells": cells}, names)


def _errors(rows: list[Row]) -> None:
    for row in rows:
        if row["status"] == "ok" and row.get("predicted ms"):
            row["memory error"] = f"{row['predicted GB'] / row['peak GB'] - 1:+.1%}"
            row["time error"] = f"{row['predicted ms'] / row['step ms p50'] - 1:+.1%}"


# name: (what it does, seconds it may take).
PARTS: dict[str, tuple[Callable[[Run], None], int]] = {
    "rates": (rates, 60),
    "correct": (correct, 180),
    "peers": (lora_peers, 540),
    "peers-nf4": (qlora_peers, 540),
    "article": (article, 240),
    "memory": (memory, 120),
    "speed": (speed, 540),
    "planner": (planner, 400),
    "start": (start, 240),
    "text": (text, 120),
}
