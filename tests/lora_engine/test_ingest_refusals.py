"""What no adapter of ours can hold is refused with the reason, and nothing of it is left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine.errors import AdapterError, SpecError
from lora_engine.ingest import ingest
from lora_engine.ingest_config import IngestConfig, IngestSpec
from tests.lora_engine.foreign_adapters import WEIGHTS, edit_config, edit_tensors, foreign, logits, taken
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

PREFIX = "base_model.model."
ATTENTION = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), tied=False)


def test_norms_and_embeddings_trained_whole_are_refused(base: Path, tmp_path: Path) -> None:
    def train(model: Any) -> None:
        model.base_model.model.model.norm.modules_to_save["default"].weight += 0.1

    source = foreign(base, tmp_path / "peft", train, target_modules=ATTENTION, modules_to_save=["norm"])
    with pytest.raises(AdapterError, match=r"model\.norm\.weight: trained whole .* no linear layer"):
        taken(base, source, ingest=IngestConfig(rank=4))


def test_added_tokens_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    grown = torch.zeros(400, 32)
    edit_tensors(source, lambda tensors: tensors | {f"{PREFIX}model.embed_tokens.weight": grown})
    with pytest.raises(AdapterError, match=r"embed_tokens\.weight: \[400, 32\] in the adapter.*tokens were added"):
        taken(base, source)
    head = foreign(base, tmp_path / "head", target_modules=["lm_head"])
    edit_tensors(head, lambda tensors: {n: torch.cat([t, t])[:400] if "B" in n else t for n, t in tensors.items()})
    with pytest.raises(AdapterError, match=r"lm_head \(400 × 32\) is .* tokens were added"):
        taken(base, head)


def test_a_bias_of_b_is_dropped_where_it_is_zero_and_refused_otherwise(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION, lora_bias=True)
    edit_tensors(
        source, lambda tensors: {n: torch.zeros_like(t) if n.endswith("bias") else t for n, t in tensors.items()}
    )
    output, _ = taken(base, source)
    torch.testing.assert_close(logits(base, output), logits(base, source), rtol=1e-5, atol=1e-5)
    edit_tensors(source, lambda tensors: {n: t + 1 if n.endswith("bias") else t for n, t in tensors.items()})
    with pytest.raises(AdapterError, match=r"lora_B\.bias: a trained bias"):
        taken(base, source)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "IA3": ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    "DoRA without a rank": ({"use_dora": True}, "lora_magnitude_vector is missing|give a rank"),
    "biases": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "LoftQ": ({"init_lora_weights": "loftq"}, "a base model that LoftQ quantised"),
    "a start of the future": ({"init_lora_weights": "quantum"}, "not known whether that changes the base"),
    "token rows": ({"trainable_token_indices": [1]}, "rows of the embedding"),
    "fused experts": ({"target_parameters": ["experts.up"]}, "no linear layers"),
    "repeated layers": ({"layer_replication": [[0, 2]]}, "repeated layers"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "only active after certain tokens"),
    "a setting of the future": ({"use_quantum": 1}, "use_quantum is set"),
    "not targeted": ({"target_modules": ["q_proj"]}, "v_proj: the file has weights of it, but"),
    "not targeted by an expression": ({"target_modules": r".*\.q_proj"}, "PEFT would not load them"),
    "excluded": ({"exclude_modules": ["v_proj"]}, "PEFT would not load them"),
    "another layer": ({"layers_to_transform": [1]}, "PEFT would not load them"),
    "slow expression": ({"target_modules": "((a+)+)+(?=b)"}, "looks around"),
    "alpha": ({"lora_alpha": 10**299}, "at most 1,000,000 in size"),
    "alpha of a module": ({"alpha_pattern": {"q_proj": -1e7}}, "alpha of .*q_proj is -10000000.0"),
    "rank": ({"r": 8}, "do not have the config's rank 8"),
    "flag": ({"use_dora": "yes"}, "use_dora is 'yes'|use_dora is yes"),
    "layers": ({"layers_to_transform": ["1"]}, "must be numbers of layers"),
    "targets": ({"target_modules": {"q_proj": 1}}, "must be names or a regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_cannot_be_kept_are_refused_with_the_reason(case: str, base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    changes, reason = REFUSED[case]
    edit_config(source, **changes)
    with pytest.raises(AdapterError, match=reason):
        taken(base, source)
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


Q = f"{PREFIX}model.layers.0.self_attn.q_proj"
TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "embedding": ({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}, "LoRA on an embedding"),
    "token rows": ({f"{PREFIX}x.token_adapter.trainable_tokens_delta": torch.ones(4, 9)}, "rows of the embedding"),
    "magnitude": ({f"{Q}.lora_magnitude_vector": torch.ones(32)}, "use_dora is not set"),
    "bias": ({f"{Q}.lora_B.bias": torch.ones(32)}, "which the config .* does not name"),
    "half a module": ({f"{PREFIX}model.layers.0.mlp.v_proj.lora_A.weight": torch.ones(4, 9)}, "lora_B is missing"),
    "stranger": ({f"{PREFIX}model.layers.0.mlp.up_proj.weight": torch.ones(4)}, "not in modules_to_save"),
    "prefix": ({"x.lora_A.weight": torch.ones(4, 9)}, "base_model.model. is missing before it"),
    "name": ({f"{PREFIX}a b": torch.ones(1)}, "not the name of a tensor"),
    "type": ({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)}, "type I32 are not read"),
    "two adapters": (
        {f"{PREFIX}model.layers.0.mlp.up_proj.lora_{x}.b.weight": torch.ones(4, 4) for x in "AB"},
        "holds several adapters",
    ),
    "twice": ({f"{Q}.lora_A.other.weight": torch.ones(4, 32)}, "q_proj has two of it"),
    "shape": ({f"{Q}.lora_A.weight": torch.ones(4, 33)}, r"q_proj \(32 × 33\) is 32 × 32 there"),
    "NaN": ({f"{Q}.lora_A.weight": torch.full((4, 32), float("nan"))}, r"q_proj\.lora_A\.weight: values that are not"),
    "a delta beyond all measure": (
        {f"{Q}.lora_A.weight": torch.full((4, 32), 1e9), f"{Q}.lora_B.weight": torch.full((32, 4), 1e9)},
        r"lora_B\.weight: values up to 8e\+18 in size",
    ),
    "a factor beyond all measure": ({f"{Q}.lora_A.weight": torch.full((4, 32), 1e25)}, r"lora_A\.weight: values up to"),
    "infinite": ({f"{Q}.lora_B.weight": torch.full((32, 4), float("inf"))}, r"lora_B\.weight: values that are not"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be_kept_are_refused_by_name(case: str, base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    changes, reason = TENSORS[case]
    edit_tensors(source, lambda tensors: tensors | changes)
    with pytest.raises(AdapterError, match=reason):
        taken(base, source)
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_another_base_model_and_other_files_are_refused(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    with pytest.raises(AdapterError, match="not among its linear layers: the adapter is of another base model"):
        taken(make_tiny_gpt2(tmp_path / "gpt2"), source)
    (source / WEIGHTS).rename(source / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"\.bin and \.pt files run code"):
        taken(base, source)
    with pytest.raises(SpecError, match="name base_model"):
        IngestSpec(folder="a", output="b", ingest=IngestConfig(rank=4))


def test_a_tell_that_raises_leaves_nothing(base: Path, tmp_path: Path) -> None:
    source = foreign(base, tmp_path / "peft", target_modules=ATTENTION)
    told = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(IngestSpec(folder=str(source), output=str(tmp_path / "out"), base_model=str(base)), tell)
    assert told == [(0, 4), (1, 4), (2, 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]
