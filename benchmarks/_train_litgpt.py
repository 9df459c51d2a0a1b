"""LitGPT as a contender: its model, its chunked head and loss, in the loop of `litgpt finetune_lora`, bf16-true."""

from typing import Any

import lightning
import torch
from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import chunked_cross_entropy
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

from benchmarks._train_gate import Gate

IGNORED = -100


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    torch.set_num_threads(config["threads"])
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    model = fabric.setup_module(_model(config, fabric))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(trainable, lr=config["learning_rate"], weight_decay=0.0, fused=True)
    )
    model.train()
    gate.loaded()
    for batch in config["batches"]:
        ids = [torch.tensor(document["ids"]) for document in batch]
        marks = [torch.tensor(document["trained"], dtype=torch.bool) for document in batch]
        labels = [torch.where(mark, row, IGNORED) for row, mark in zip(ids, marks, strict=True)]
        inputs = pad_sequence(ids, batch_first=True, padding_value=0)
        targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
        logits = model(inputs, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, targets[..., 1:])
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=config["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.item())


def _model(config: dict[str, Any], fabric: Any) -> Any:
    shape = Config.from_name(
        "SmolLM2-135M",
        lora_r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        lora_head=False,
    )
    with fabric.init_module(empty_init=False):
        model = GPT(shape)
    mark_only_lora_as_trainable(model)
    weights: dict[str, Any] = {}
    copy_weights_hf_llama(shape, {}, weights, load_file(f"{config['model']}/model.safetensors"))
    model.load_state_dict(weights, strict=False)
    _copy_initial(model, load_file(config["initial"]))
    return model


@torch.no_grad()
def _copy_initial(model: Any, factors: dict[str, torch.Tensor]) -> None:
    for number, block in enumerate(model.transformer.h):
        prefix = f"model.layers.{number}"
        parts = [factors[f"{prefix}.self_attn.{part}_proj"] for part in "qkv"]
        block.attn.qkv.lora_A.copy_(torch.cat(parts))
        block.attn.proj.lora_A.copy_(factors[f"{prefix}.self_attn.o_proj"])
        for own, name in (("fc_1", "gate_proj"), ("fc_2", "up_proj"), ("proj", "down_proj")):
            getattr(block.mlp, own).lora_A.copy_(factors[f"{prefix}.mlp.{name}"])
