"""TRL's `SFTTrainer` as a contender. Runs in an environment with TRL; Luthier is not needed there."""

from typing import Any

import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (a part of the floor)
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks._train_gate import Gate
from benchmarks._train_initial import copy_initial


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    torch.set_num_threads(config["threads"])
    variant = config["variant"]
    model = AutoModelForCausalLM.from_pretrained(
        config["model"],
        dtype=torch.float32 if variant["weights"] == "fp32" else torch.bfloat16,
        attn_implementation=variant["attention"],
    )
    adapter = LoraConfig(
        task_type="CAUSAL_LM",
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    trainer = sft_trainer(config, gate, model, peft_config=adapter)
    copy_initial(trainer.model, config["initial"])
    gate.loaded()
    trainer.train()


def sft_trainer(config: dict[str, Any], gate: Gate, model: Any, **more: Any) -> Any:
    """Over the batches in their order, tokenised already; a step is reported when the trainer logs it."""
    rows = [
        {
            "input_ids": document["ids"],
            "labels": [token if trained else -100 for token, trained in zip(*document.values(), strict=True)],
        }
        for batch in config["batches"]
        for document in batch
    ]
    arguments = SFTConfig(
        output_dir=config["output"],
        per_device_train_batch_size=config["examples"],
        train_sampling_strategy="sequential",
        max_length=config["sequence_length"],
        gradient_checkpointing=config["variant"]["checkpointing"],
        learning_rate=config["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=config["max_grad_norm"],
        num_train_epochs=1,
        bf16=True,
        use_cpu=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(config["model"]),
        callbacks=[_Steps(gate)],
        **more,
    )


class _Steps(TrainerCallback):
    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
        if "loss" in logs:
            self._gate.step(float(logs["loss"]))
