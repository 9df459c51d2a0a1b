"""Unsloth, torchtune and LitGPT on a GPU; each where its packages were found, loading from a folder with weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks._train_gate import Gate
from benchmarks._train_initial import copy_initial
from benchmarks.gpu.shapes import LITGPT

IGNORED = -100
_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def unsloth(config: dict[str, Any], gate: Gate) -> None:
    """Its model and its patched `SFTTrainer`, as its notebooks have it; it drops the padding itself."""
    import unsloth as package  # it patches what is imported after it
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from benchmarks.gpu.peers import contents, in_order

    gate.imported()
    model, tokenizer = package.FastLanguageModel.from_pretrained(
        model_name=config["model"],
        max_seq_length=config["sequence_length"],
        dtype=torch.bfloat16,
        load_in_4bit=config["quantization"] == "nf4",
    )
    model = package.FastLanguageModel.get_peft_model(
        model,
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0,
        target_modules=_MODULES,
        use_gradient_checkpointing=config["variant"]["checkpointing"],
    )
    copy_initial(model, config["initial"])
    rows = [
        {
            "input_ids": document["ids"],
            "labels": [token if trained else IGNORED for token, trained in zip(*document.values(), strict=True)],
        }
        for batch in contents(config)
        for document in batch
    ]
    arguments = SFTConfig(
        output_dir=config["output"],
        per_device_train_batch_size=config["examples"],
        max_length=config["sequence_length"],
        learning_rate=config["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=config["max_grad_norm"],
        num_train_epochs=1,
        bf16=True,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                gate.step(float(logs["loss"]))

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    in_order(trainer, trainer.train_dataset)
    gate.loaded()
    trainer.train()


def torchtune(config: dict[str, Any], gate: Gate) -> None:
    """Its model, collator and chunked loss, as on a CPU; what it makes, it makes on the device."""
    from benchmarks import _train_torchtune
    from benchmarks.gpu.peers import contents

    weights = _train_torchtune.load_file
    _train_torchtune.load_file = lambda path: (
        _whole(config["model"]) if path.endswith("/model.safetensors") else weights(path)
    )
    torch.set_default_device(config["device"])
    _train_torchtune.train(config | {"threads": torch.get_num_threads(), "batches": _on_cpu(contents, config)}, gate)


def litgpt(config: dict[str, Any], gate: Gate) -> None:
    """Its GPT with LoRA, bf16-true, its chunked head and loss, padded rows, the loop of `finetune_lora`."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
    from litgpt.utils import chunked_cross_entropy

    from benchmarks._train_litgpt import _copy_initial
    from benchmarks.gpu.peers import contents

    gate.imported()
    device = torch.device(config["device"])
    names = ("query", "key", "value", "projection", "mlp")
    shape = Config.from_name(
        LITGPT[config["shape"]],
        lora_r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0.0,
        lora_head=False,
        **{f"lora_{name}": True for name in names},
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = GPT(shape)
    mark_only_lora_as_trainable(model)
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(shape, {}, weights, _whole(config["model"]))
    model.load_state_dict(weights, strict=False)
    _copy_initial(model, load_file(config["initial"]))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config["learning_rate"], weight_decay=0.0, fused=True)
    model.train()
    gate.loaded()
    for batch in contents(config):
        ids = [torch.tensor(document["ids"]) for document in batch]
        marks = [torch.tensor(document["trained"], dtype=torch.bool) for document in batch]
        labels = [torch.where(mark, row, IGNORED) for row, mark in zip(ids, marks, strict=True)]
        inputs, targets = (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill).to(device)
            for rows, fill in ((ids, 0), (labels, IGNORED))
        )
        logits = model(inputs, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, targets[..., 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.item())


def _on_cpu(contents: Any, config: dict[str, Any]) -> Any:
    with torch.device("cpu"):
        return contents(config)


def _whole(folder: str) -> dict[str, torch.Tensor]:
    """All shards of a folder."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        found |= load_file(path)
    return found
