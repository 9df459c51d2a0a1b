import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconH1Config,
    FalconH1ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
)

from lora_engine import base_model
from lora_engine.base_model import describe, load
from lora_engine.errors import BaseModelError
from lora_engine.quantized import LAYERS, QuantizedLinear
from lora_engine.target_modules import Module
from tests.tiny_model import make_llama_config, make_tiny_gpt2, make_tiny_model, make_tokenizer
from tests.zoo import FAMILIES

EXPERTS = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
IDS = torch.arange(3, 43).view(2, 20)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "base")


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_model_is_the_one_transformers_loads(family: str, dtype: str, tmp_path: Path) -> None:
    base = load(FAMILIES[family](tmp_path), compute_dtype=dtype)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=base.compute_dtype).eval()
    assert torch.equal(base.model(input_ids=IDS).logits, reference(input_ids=IDS).logits)
    ours, theirs = base.model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    for (name, buffer), (_, expected) in zip(base.model.named_buffers(), reference.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), name
    tied = reference.get_output_embeddings().weight is reference.get_input_embeddings().weight
    assert (base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight) == tied
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_a_sharded_model_loads_like_a_single_file(folder: Path, tmp_path: Path) -> None:
    whole = load(folder)
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(sharded, max_shard_size="40KB")
    AutoTokenizer.from_pretrained(folder).save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(load(sharded).model(input_ids=IDS).logits, whole.model(input_ids=IDS).logits)
    next(iter(sorted(sharded.glob("*.safetensors")))).unlink()
    with pytest.raises(BaseModelError, match="cannot be read"):
        load(sharded)


def test_a_checkpoint_of_the_bare_trunk_loads(tmp_path: Path) -> None:
    folder = make_tiny_gpt2(tmp_path)
    expected = load(folder).model(input_ids=IDS).logits
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): value for name, value in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    assert torch.equal(load(folder).model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "NF4Linear"), ("int8", "Int8Linear")])
def test_every_linear_layer_but_the_head_is_quantised(folder: Path, quantization: str, kind: str) -> None:
    base = load(folder, quantization=quantization)
    kinds = {module.name: type(base.model.get_submodule(module.name)).__name__ for module in describe(folder).modules}
    assert kinds.pop("lm_head") == "Linear"
    assert set(kinds.values()) == {kind}
    assert len(kinds) == 14
    assert base_model.linear_modules(base.model) == describe(folder).modules


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_weight_is_that_of_the_file(family: str, quantization: str, tmp_path: Path) -> None:
    plain = load(FAMILIES[family](tmp_path)).model
    for name, layer in load(tmp_path, quantization=quantization).model.named_modules():
        if isinstance(layer, QuantizedLinear):
            weight = plain.get_submodule(name).weight
            oriented = weight.t().contiguous() if family == "gpt2" else weight
            expected = LAYERS[quantization](oriented, None, weight.dtype)
            assert torch.equal(layer.dequantized(), expected.dequantized())


def test_experts_that_lie_together_keep_the_compute_dtype(tmp_path: Path) -> None:
    model = load(FAMILIES["mixtral"](tmp_path), quantization="nf4", compute_dtype="bf16").model
    assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
    assert isinstance(model.model.layers[0].self_attn.q_proj, QuantizedLinear)


def test_description_of_a_config(tmp_path: Path) -> None:
    description = describe(make_llama_config(tmp_path, hidden_size=64, num_hidden_layers=3, vocab_size=100))
    assert description.architecture == "LlamaForCausalLM"
    assert description.context_length == 2048
    assert len(description.modules) == 22
    assert description.modules[0] == Module("model.layers.0.self_attn.q_proj", 64, 64, head=False)
    assert [module for module in description.modules if module.head] == [Module("lm_head", 64, 100, head=True)]


def test_a_tied_head_is_counted_once(folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder)
    assert describe(folder).parameters == sum(parameter.numel() for parameter in reference.parameters())


def test_gpt2s_conv1d_is_a_linear_layer(tmp_path: Path) -> None:
    modules = {module.name: module for module in describe(make_tiny_gpt2(tmp_path)).modules}
    assert (modules["transformer.h.0.attn.c_attn"].inputs, modules["transformer.h.0.attn.c_attn"].outputs) == (32, 96)


def test_missing_and_unknown_tensors_are_named(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.over_proj.weight"] = tensors.pop(name)

    change_tensors(folder, rename)
    with pytest.raises(BaseModelError, match=rf"missing: {name}; not in the architecture: .*over_proj"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(BaseModelError, match=r"model.norm.weight has shape \[31\] instead of \[32\]"):
        load(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_no_number_is_refused(
    folder: Path, value: float, quantization: str, dtype: torch.dtype
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][5, 7] = value

    change_tensors(folder, spoil)
    with pytest.raises(BaseModelError, match=rf"tensor {name} holds values that are not finite"):
        load(folder, quantization=quantization)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(EXPERTS.format(2, "w1")), "w1.weight.* do not make .*experts.gate_up_proj"),
        (lambda tensors: tensors.pop(EXPERTS.format(2, "w2")), r"experts.down_proj has shape \[3, 32, 64\]"),
        (
            lambda tensors: [tensors.pop(EXPERTS.format(number, "w2")) for number in range(4)],
            "missing: model.layers.0.mlp.experts.down_proj",
        ),
        (
            lambda tensors: tensors.update({EXPERTS.format(1, "w2"): torch.ones(31, 64)}),
            "w2.weight.* do not make .*experts.down_proj",
        ),
        (
            lambda tensors: tensors.update({EXPERTS.format(1, "w2"): torch.full((32, 64), torch.nan)}),
            "experts.1.w2.weight holds values that are not finite",
        ),
    ],
)
def test_experts_that_do_not_fit_together_are_refused(
    change: Callable[[dict[str, torch.Tensor]], object], message: str, tmp_path: Path
) -> None:
    change_tensors(FAMILIES["mixtral"](tmp_path), change)
    with pytest.raises(BaseModelError, match=message):
        load(tmp_path)


def resize_embeddings(folder: Path, rows: int) -> None:
    change_config(folder, vocab_size=rows)
    name = "model.embed_tokens.weight"
    change_tensors(folder, lambda tensors: tensors.update({name: tensors[name][:rows].clone()}))


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    resize_embeddings(folder, 319)
    with pytest.raises(BaseModelError, match="ids up to 319, but the model only 319 embeddings: use the model's own"):
        load(folder)


def test_special_tokens_that_no_text_needs_may_have_no_embedding(folder: Path) -> None:
    """As in Gemma 3's text models, whose tokenizer has one for images."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert len(load(folder).tokenizer) == 321
    tokenizer.eos_token = "<|image|>"
    tokenizer.save_pretrained(folder)
    with pytest.raises(BaseModelError, match="ids up to 320"):
        load(folder)


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_tensors(folder, lambda tensors: tensors.update(extra))
    load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: change_config(folder, auto_map={"AutoModelForCausalLM": "code.Model"}), "code of its own"),
        (lambda folder: change_config(folder, quantization_config={"quant_method": "gptq"}), "quantised already"),
        (lambda folder: change_config(folder, model_type="unheard-of"), "not a causal language model"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), "config.json cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" * 40), "model.safetensors cannot be read"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B"]}}'),
            "tokenizer needs code of its own",
        ),
        (
            lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
            "outside its folder",
        ),
    ],
)
def test_unusable_files_are_refused(folder: Path, change: Callable[[Path], object], message: str) -> None:
    change(folder)
    with pytest.raises(BaseModelError, match=message):
        load(folder)


def test_an_impossible_device_is_refused(folder: Path) -> None:
    with pytest.raises(BaseModelError, match="warp:3"):
        load(folder, device="warp:3")


def test_tensors_that_transformers_renames_find_their_place(tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert any(name.startswith("embed_out") for name in load_file(tmp_path / "model.safetensors"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(load(tmp_path).model(input_ids=IDS).logits, reference(input_ids=IDS).logits)


def test_a_buffer_that_its_parent_fills_is_filled(tmp_path: Path) -> None:
    config = FalconH1Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1,
    )  # fmt: skip
    torch.manual_seed(0)
    FalconH1ForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    reference = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_buffers())
    buffers = dict(load(tmp_path).model.named_buffers())
    assert any("mup_vector" in name for name in buffers)
    assert all(torch.equal(buffers[name], reference[name]) for name in reference)


def test_a_folder_whose_files_do_not_fit_its_config_is_not_described(folder: Path) -> None:
    describe(folder)
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BaseModelError, match=r"layers\.1\.mlp\.up_proj"):
        describe(folder)


def test_an_attention_kernel_from_elsewhere_is_refused(folder: Path) -> None:
    change_config(folder, attn_implementation="somebody/kernel")
    with pytest.raises(BaseModelError, match="never loaded"):
        load(folder)
