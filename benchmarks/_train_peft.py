"""PEFT + transformers as a contender, in a plain loop that does what `transformers.Trainer` does and no more.

`config["variant"]` chooses among the ways its users run it:

    weights      "fp32", "bf16" or "nf4" (bitsandbytes, double quantisation, bf16 compute)
    autocast     bf16 autocast, as `TrainingArguments(bf16=True)`
    attention    "sdpa", transformers' default, or "eager"
    mask         pass the attention mask as the data collators do; under causal attention right padding needs none
    kbit         `prepare_model_for_kbit_training`, as PEFT's documentation has it
    checkpointing  recompute every layer in backward
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import bitsandbytes  # noqa: F401 (a part of the floor for QLoRA)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401 (a part of the floor)
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks._train_gate import Gate
from benchmarks._train_initial import copy_initial

IGNORED = -100
RECOMPUTE = {"use_reentrant": False}


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    torch.set_num_threads(config["threads"])
    model = adapted(config)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config["learning_rate"], weight_decay=0.0, fused=True)
    # bitsandbytes repacks 4-bit weights at an evaluation forward on some CPUs, and cuts the gradients of what follows.
    model.train()
    gate.loaded()
    for number, inputs in enumerate(padded(config)):
        with autocast(config["variant"]["autocast"]):
            loss = model(**inputs, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, config["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        if number == 0:
            refuse_repacked(model)
        gate.step(loss.item(), grad_norm=float(norm))


def adapted(config: dict[str, Any]) -> Any:
    """The model with adapters whose A is ours."""
    variant = config["variant"]
    quantization = None
    if variant["weights"] == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        config["model"],
        dtype=torch.float32 if variant["weights"] == "fp32" else torch.bfloat16,
        attn_implementation=variant["attention"],
        quantization_config=quantization,
        device_map="cpu" if quantization else None,
    )
    checkpointing = variant.get("checkpointing", False)
    if variant.get("kbit"):
        model = prepare_model_for_kbit_training(  # type: ignore[no-untyped-call]
            model, use_gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs=RECOMPUTE
        )
    elif checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTE)
    model = get_peft_model(model, lora_config(config))
    copy_initial(model, config["initial"])
    return model


def lora_config(config: dict[str, Any]) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
    )


def padded(config: dict[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Each step's rows, padded on the right to the longest."""
    for batch in config["batches"]:
        length = max(len(document["ids"]) for document in batch)
        shape = (len(batch), length)
        inputs = {
            "input_ids": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, document in enumerate(batch):
            size = len(document["ids"])
            ids, trained = torch.tensor(document["ids"]), torch.tensor(document["trained"], dtype=torch.bool)
            inputs["input_ids"][row, :size] = ids
            inputs["labels"][row, :size] = torch.where(trained, ids, IGNORED)
            inputs["attention_mask"][row, :size] = 1
        if not config["variant"]["mask"]:
            del inputs["attention_mask"]
        yield inputs


def autocast(enabled: bool) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16) if enabled else nullcontext()


def refuse_repacked(model: Any) -> None:
    """Stop where bitsandbytes has repacked weights whose gradients are needed: it would be fast and wrong."""
    for parameter in model.parameters():
        if getattr(getattr(parameter, "quant_state", None), "packing_format_for_cpu", False):
            raise SystemExit("bitsandbytes has repacked its weights for inference; gradients would be wrong")
