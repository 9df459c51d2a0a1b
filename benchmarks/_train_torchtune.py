"""torchtune as a contender: its model, collator and chunked loss, in the loop of its single-device recipe."""

from typing import Any

import torch
from safetensors.torch import load_file
from torchtune.data import padded_collate_sft
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params
from torchtune.training import set_default_dtype

from benchmarks._train_gate import Gate

IGNORED = -100
_NAMES = {"self_attn.o_proj": "attn.output_proj", "self_attn.": "attn.", "mlp.gate_proj": "mlp.w1",
          "mlp.down_proj": "mlp.w2", "mlp.up_proj": "mlp.w3"}  # fmt: skip


def train(config: dict[str, Any], gate: Gate) -> None:
    gate.imported()
    torch.set_num_threads(config["threads"])
    model = _model(config)
    parameters = get_adapter_params(model)
    set_trainable_params(model, parameters)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config["learning_rate"], weight_decay=0.0, fused=True)
    loss_function = CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss_function.num_output_chunks)
    model.train()
    gate.loaded()
    for batch in config["batches"]:
        rows = [
            {
                "tokens": document["ids"],
                "labels": [token if trained else IGNORED for token, trained in zip(*document.values(), strict=True)],
            }
            for document in batch
        ]
        inputs = padded_collate_sft(rows, padding_idx=0, ignore_idx=IGNORED)
        labels = inputs.pop("labels")
        labels = torch.hstack((labels[:, 1:], torch.full((len(rows), 1), IGNORED)))
        count = (labels != IGNORED).sum()
        loss = loss_function(model(**inputs), labels) * count
        loss.backward()
        for parameter in parameters.values():
            parameter.grad /= count
        torch.nn.utils.clip_grad_norm_(parameters.values(), config["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gate.step(loss.item() / count.item())


def _model(config: dict[str, Any]) -> Any:
    """SmolLM2 as its Llama, all of it bf16, as `dtype: bf16` has it; the head is a copy of the embeddings."""
    facts = config["facts"]
    with set_default_dtype(torch.bfloat16):
        model = lora_llama3(
            lora_attn_modules=["q_proj", "k_proj", "v_proj", "output_proj"],
            apply_lora_to_mlp=True,
            vocab_size=facts["vocab_size"],
            num_layers=facts["num_hidden_layers"],
            num_heads=facts["num_attention_heads"],
            num_kv_heads=facts["num_key_value_heads"],
            embed_dim=facts["hidden_size"],
            intermediate_dim=facts["intermediate_size"],
            max_seq_len=config["sequence_length"],
            norm_eps=facts["rms_norm_eps"],
            rope_base=int(facts["rope_parameters"]["rope_theta"]),
            lora_rank=config["rank"],
            lora_alpha=config["alpha"],
        )
    weights = load_file(f"{config['model']}/model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    converted = hf_to_tune(weights, facts["num_attention_heads"], facts["num_key_value_heads"], facts["hidden_size"])
    for name, factor in load_file(config["initial"]).items():
        own = name.removeprefix("model.")
        for old, new in _NAMES.items():
            own = own.replace(old, new)
        converted[f"{own}.lora_a.weight"] = factor
    missing, unexpected = model.load_state_dict(converted, strict=False)
    if unexpected or not all(name.endswith("lora_b.weight") for name in missing):
        raise SystemExit(f"missing {missing[:5]}, unexpected {unexpected[:5]}")
    return model
