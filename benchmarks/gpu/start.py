"""How long it takes until a job trains: loading from files, the first step cold, and the next job on a warm base.

From the start of a process, or from the order of a job, to the end of its first step; the HTTP service in front of it,
some milliseconds, is measured elsewhere (`benchmarks/load.py`), as it needs none of the device.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import bases
from benchmarks.gpu.jobs import GB
from lora_engine import base_model, machine
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.train import Training

STREAMS = True
_WARM_JOBS = 3
_WORDS = ("order", "pizza", "capital", "answer", "question", "two", "seven", "fox")


def write(config: dict[str, Any], tell: Callable[..., None]) -> None:
    """The folder with weights, for this part and for peers that load from files."""
    from tests.tiny_model import make_tokenizer

    bases.write_folder(Path(config["model"]), torch.device(config["device"]), make_tokenizer())
    rows = Path(config["dataset"])
    texts = (" ".join(_WORDS[(number + index * index) % 8] for index in range(40)) for number in range(64))
    lines = (json.dumps({"prompt": f"Row {number}: ", "completion": text}) for number, text in enumerate(texts))
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    tell(size=sum(path.stat().st_size for path in Path(config["model"]).iterdir()))


def measure(config: dict[str, Any], tell: Callable[..., None]) -> None:
    """Cold and warm, of one kind of base; the file is in the page cache."""
    device = torch.device(config["device"])
    before = time.monotonic()
    base = base_model.load(
        Path(config["model"]), quantization=config["quantization"], compute_dtype="bf16", device=str(device)
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    loading = time.monotonic() - before
    load_peak = machine.peak_bytes(device) / GB
    spec = TrainSpec(
        base_model=config["model"],
        dataset=config["dataset"],
        output=config["output"],
        device=str(device),
        lora=LoraConfig(rank=config["rank"]),
        training=TrainingConfig(
            quantization=config["quantization"], compute_dtype="bf16", max_steps=2, validation_fraction=0.0
        ),
    )
    seconds = []
    dataset = Path(config["dataset"])
    for number in range(_WARM_JOBS + 1):
        # Another dataset each time: one that was tokenised before would be taken from memory.
        lines = dataset.read_text(encoding="utf-8").splitlines()
        dataset.write_text("\n".join([*lines[1:], lines[0]]) + "\n", encoding="utf-8")
        ordered = time.monotonic()
        with Training(spec, base) as job:
            ready = time.monotonic()
            next(job.steps())
        ended = time.monotonic()
        seconds.append((ready - ordered, ended - ordered))
        if number == 0:
            tell(
                row={
                    "name": config["title"],
                    "load s": round(loading, 2),
                    "load peak GB": round(load_peak, 2),
                    "process to first step s": round(time.time() - config["spawned"], 2),
                    "first job: ready s": round(seconds[0][0], 2),
                    "first job: first step s": round(seconds[0][1], 2),
                }
            )
    ready_s, warm = (sorted(pair[index] for pair in seconds[1:])[_WARM_JOBS // 2] for index in (0, 1))
    tell(
        row={
            "name": f"{config['title']}, the next job on the warm base",
            "ready s": round(ready_s, 3),
            "first step s": round(warm, 3),
        }
    )
