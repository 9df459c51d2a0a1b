"""Unsloth in its CPU mode as a contender: its model and its patched `SFTTrainer`, as its notebooks use them."""

from typing import Any

# isort: off
import unsloth  # it patches what is imported after it
import torch

# isort: on
from benchmarks._train_gate import Gate
from benchmarks._train_initial import copy_initial
from benchmarks._train_trl import sft_trainer

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    torch.set_num_threads(config["threads"])
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=config["model"],
        max_seq_length=config["sequence_length"],
        dtype=torch.bfloat16,
        load_in_4bit=False,
    )
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0,
        target_modules=MODULES,
        use_gradient_checkpointing=config["variant"]["checkpointing"],
    )
    copy_initial(model, config["initial"])
    trainer = sft_trainer(config, gate, model)
    gate.loaded()
    trainer.train()
