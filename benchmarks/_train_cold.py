"""Cold start: from the start of a process to the end of its first optimizer step, imports and loading included.

The peer is a script as people write it with PEFT and `transformers.Trainer`. Run as a program, this module is one
contender; it prints `MARK` and the monotonic clock at the end of the first step.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks._train_processes import ROOT, environment

MARK = "first-step"
KINDS = {"bf16": "none", "nf4": "nf4"}


def measure(
    config: dict[str, Any], folder: Path, cpus: Sequence[int], rounds: int
) -> dict[str, dict[str, list[float]]]:
    """Seconds by kind and contender, in turns; the first round warms the file cache and is dropped."""
    seconds: dict[str, dict[str, list[float]]] = {kind: {"ours": [], "peer": []} for kind in KINDS}
    for number in range(rounds + 1):
        for kind, quantization in KINDS.items():
            path = folder / f"cold-{kind}.json"
            settings = config | {"quantization": quantization, "compute_dtype": "bf16", "batches": []}
            path.write_text(json.dumps(settings), encoding="utf-8")
            for name in ("ours", "peer"):
                started = time.monotonic()
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks._train_cold", name, str(path)],
                    cwd=ROOT,
                    env=environment(len(cpus), keep_memory=False),
                    preexec_fn=lambda: os.sched_setaffinity(0, cpus),
                    capture_output=True,
                    text=True,
                )
                if done.returncode:
                    raise SystemExit(f"cold {name} failed:\n{done.stderr[-3000:]}")
                if number:
                    seconds[kind][name].append(_end(done.stdout) - started)
    return seconds


def _end(output: str) -> float:
    """The clock that the contender printed, between what its libraries print."""
    return next(float(line.split()[1]) for line in output.splitlines() if line.startswith(MARK))


def ours(config: dict[str, Any]) -> None:
    """The engine as its documentation uses it."""
    from benchmarks._train_ours import in_file_order, train_spec
    from lora_engine import base_model, data
    from lora_engine.train import Training

    data.epoch_order = in_file_order  # so that both begin with the same rows
    spec = train_spec(config)
    training = spec.training
    base = base_model.load(
        Path(spec.base_model), quantization=training.quantization, compute_dtype=training.compute_dtype, device="cpu"
    )
    with Training(spec, base) as running:
        next(running.steps())
        print(MARK, time.monotonic(), flush=True)


def peer(config: dict[str, Any]) -> None:
    """PEFT + transformers.Trainer, after their own examples."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class Stop(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            print(MARK, time.monotonic(), flush=True)

    tokenizer: Any = AutoTokenizer.from_pretrained(config["model"])

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        turns.append({"role": "assistant", "content": row["output"]})
        ids = tokenizer.apply_chat_template(turns, return_dict=False)
        labels = [-100] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    lines = Path(config["dataset"]).read_text(encoding="utf-8").splitlines()
    dataset = [tokenize(json.loads(line)) for line in lines]
    quantization = None
    if config["quantization"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        config["model"],
        dtype=torch.bfloat16 if quantization else torch.float32,
        quantization_config=quantization,
        device_map="cpu" if quantization else None,
    )
    if quantization:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=config["rank"], lora_alpha=config["alpha"], target_modules="all-linear"
    )
    arguments = TrainingArguments(
        output_dir=config["output"],
        per_device_train_batch_size=config["examples"],
        learning_rate=config["learning_rate"],
        lr_scheduler_type="constant",
        max_steps=1,
        train_sampling_strategy="sequential",
        bf16=True,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(
        model=get_peft_model(model, adapter),
        args=arguments,
        train_dataset=dataset,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[Stop()],
    ).train()


if __name__ == "__main__":
    {"ours": ours, "peer": peer}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
