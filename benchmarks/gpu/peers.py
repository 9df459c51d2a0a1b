"""PEFT + transformers on a GPU: with `Trainer`, as people write it, and tuned as far as its users can."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks._train_gate import Gate
from benchmarks._train_initial import copy_initial
from benchmarks._train_peft import IGNORED, RECOMPUTE, lora_config
from benchmarks.gpu import bases
from benchmarks.gpu.documents import batches, documents

_ATTENTION = "packed"
_LOSS_ROWS = 1024


def stock(config: dict[str, Any], gate: Gate) -> None:
    """`Trainer` with padded rows, bf16 and, for NF4, `prepare_model_for_kbit_training` with its recomputation."""
    gate.imported()
    model = _adapted(config, "sdpa")
    rows = [
        {
            "input_ids": document["ids"],
            "attention_mask": [1] * len(document["ids"]),
            "labels": [token if trained else IGNORED for token, trained in zip(*document.values(), strict=True)],
        }
        for batch in contents(config)
        for document in batch
    ]
    arguments = transformers.TrainingArguments(
        output_dir=config["output"],
        per_device_train_batch_size=config["examples"],
        learning_rate=config["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=config["max_grad_norm"],
        num_train_epochs=1,
        bf16=True,
        use_cpu=config["device"] == "cpu",
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )

    class Steps(transformers.TrainerCallback):
        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            if "loss" in logs:
                gate.step(float(logs["loss"]))

    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=_padded, callbacks=[Steps()]
    )
    in_order(trainer, rows)
    gate.loaded()
    trainer.train()


def tuned(config: dict[str, Any], gate: Gate) -> None:
    """No padding, varlen attention, logits at the targets in chunks, fused AdamW; Liger's kernels where asked for."""
    gate.imported()
    device = torch.device(config["device"])
    attend = _register(device)
    model = _adapted(config, _ATTENTION)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=config["learning_rate"], weight_decay=0.0, fused=True)
    loss_of = _liger_loss if config["variant"].get("liger") else _chunked_loss
    model.train()
    gate.loaded()
    for batch in contents(config):
        ids, positions, predicts, targets, lengths = _packed(batch, device)
        attend(lengths)
        inner = model.get_base_model()
        with _autocast(device):
            hidden = inner.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).last_hidden_state
            loss = loss_of(inner.lm_head, hidden[0][predicts], targets) / len(targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, config["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        gate.step(loss.item())


def in_order(trainer: Any, rows: Any) -> None:
    """Have a `Trainer` of any version take the rows as they come."""
    trainer._get_train_sampler = lambda *_, **__: torch.utils.data.SequentialSampler(rows)


def contents(config: dict[str, Any]) -> list[list[dict[str, list[int]]]]:
    """The batches that all contenders train on."""
    lengths = [tuple(pair) for pair in config["lengths"]]
    count = config["examples"] * config["steps"]
    return batches(
        documents(config["length"], count, config["facts"]["vocab_size"], lengths),  # type: ignore[arg-type]
        config["examples"],
    )


def _adapted(config: dict[str, Any], attention: str) -> Any:
    variant, device = config["variant"], torch.device(config["device"])
    model = bases.theirs(Path(config["model"]), config["quantization"], device, attention)
    recompute = variant.get("checkpointing", False)
    if variant.get("liger"):
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
    if variant.get("kbit"):
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=recompute, gradient_checkpointing_kwargs=RECOMPUTE
        )
    elif recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTE)
        model.enable_input_require_grads()
    model = peft.get_peft_model(model, lora_config(config))
    copy_initial(model, config["initial"])
    return model


def _padded(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    length = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}
    return {
        name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows])
        for name, fill in fills.items()
    }


def _packed(batch: Sequence[dict[str, list[int]]], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, Any]:
    """ids, positions, rows that predict, their targets, and the documents' lengths."""
    lengths = [len(document["ids"]) for document in batch]
    ids = torch.tensor([token for document in batch for token in document["ids"]])
    positions = torch.cat([torch.arange(length) for length in lengths])
    trained = torch.tensor([mark for document in batch for mark in [0, *document["trained"][1:]]], dtype=torch.bool)
    targets = trained.nonzero()[:, 0]
    found = (ids, positions, targets - 1, ids[targets])
    moved = [part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part for part in found]
    return moved[0], moved[1], moved[2], moved[3], lengths


def _chunked_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    def part(rows: Tensor, wanted: Tensor) -> Tensor:
        return functional.cross_entropy(head(rows).float(), wanted, reduction="sum")

    chunks = zip(hidden.split(_LOSS_ROWS), targets.split(_LOSS_ROWS), strict=True)
    parts = [checkpoint(part, rows, wanted, use_reentrant=False) for rows, wanted in chunks]
    return torch.stack(parts).sum()


def _liger_loss(head: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss(reduction="sum")(head.weight, hidden.to(head.weight.dtype), targets)
    return loss


def _register(device: torch.device) -> Callable[[Sequence[int]], None]:
    """Make `_ATTENTION` known to transformers; what is returned tells it the lengths of the next batch's documents."""
    state: dict[str, Any] = {}

    def told(lengths: Sequence[int]) -> None:
        state["lengths"], state["longest"] = list(lengths), max(lengths)
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        state["bounds"] = bounds.to(device)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, scaling: float | None = None, **__: Any
    ) -> tuple[Tensor, None]:
        kernel = _varlen if device.type == "cuda" else _by_document
        return kernel(query, key, value, state, scaling or module.head_dim**-0.5), None

    def no_mask(*_: Any, **__: Any) -> None:
        return None

    transformers.AttentionInterface.register(_ATTENTION, attend)
    transformers.AttentionMaskInterface.register(_ATTENTION, no_mask)
    return told


def _varlen(query: Tensor, key: Tensor, value: Tensor, state: dict[str, Any], scaling: float) -> Tensor:
    """`torch.nn.attention.varlen`, whose causal setting and grouped heads are spelt by its version."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    settings: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if "scale" in known:
        settings["scale"] = scaling
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in known:
            settings["enable_gqa"] = True
        else:
            key, value = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    rows = [part[0].transpose(0, 1).contiguous().to(torch.bfloat16) for part in (query, key, value)]
    attended: Tensor = varlen_attn(
        *rows, state["bounds"], state["bounds"], state["longest"], state["longest"], **settings
    )  # type: ignore[assignment]
    return attended[None]


def _by_document(query: Tensor, key: Tensor, value: Tensor, state: dict[str, Any], scaling: float) -> Tensor:
    def parts() -> Iterator[Tensor]:
        for q, k, v in zip(*(part.split(state["lengths"], 2) for part in (query, key, value)), strict=True):
            yield functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)

    return torch.cat(list(parts()), 2).transpose(1, 2).contiguous()


def _autocast(device: torch.device) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, torch.bfloat16) if device.type in ("cuda", "cpu") else nullcontext()
