"""SmolLM2-135M on real text: its own tokenizer and template, Alpaca's rows, a held-out share."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Peak, percentile
from lora_engine import base_model
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.train import Training

STREAMS = True
_ROWS = 16


def measure(config: dict[str, Any], tell: Callable[..., None]) -> None:
    """Validation loss before and after as many steps as the scale has, by kind of base."""
    content = Path(config["data"]).read_bytes()
    rows = json.loads(gzip.decompress(content) if config["data"].endswith(".gz") else content)
    rows = [row for row in rows if row["output"].strip()]
    random.Random(0).shuffle(rows)  # noqa: S311 (nothing secret)
    path = Path(config["output"]) / "alpaca.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps = 4 * config["steps"]
    keys = ("instruction", "input", "output")
    lines = [json.dumps({key: row[key] for key in keys}) for row in rows[: _ROWS * (steps + 2)]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for quantization in ("none", "nf4"):
        base = base_model.load(
            Path(config["model"]), quantization=quantization, compute_dtype="bf16", device=config["device"]
        )
        spec = TrainSpec(
            base_model=config["model"],
            dataset=str(path),
            output=str(path.parent / "text"),
            device=config["device"],
            lora=LoraConfig(rank=config["rank"]),
            training=TrainingConfig(
                quantization=quantization, compute_dtype="bf16", max_steps=steps, global_batch=_ROWS
            ),
        )
        with Training(spec, base) as job:
            memory = Peak(base.device)
            made = list(job.steps())
            metrics = job.finish()
        seconds = [step.seconds for step in made[2:]]
        tell(
            row={
                "name": f"SmolLM2-135M, {quantization}, Alpaca",
                "tokens/s": round(sum(step.tokens for step in made[2:]) / sum(seconds)),
                "step ms p50": round(1000 * percentile(seconds, 0.5), 2),
                "validation loss before": metrics["validation_loss_before"],
                "after": metrics["validation_loss_after"],
                **memory.figures(),
            }
        )
