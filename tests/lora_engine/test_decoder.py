"""The fast path against transformers' own forward under autograd, which test_families checks against PEFT."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lora_engine import base_model, lora, passes
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig
from lora_engine.data import Document
from lora_engine.decoder import Decoder
from lora_engine.lora import Adapted
from lora_engine.passes import PackedPass, PaddedPass, Pass
from lora_engine.product import Projection, Routing
from tests.lora_engine.documents import templated
from tests.zoo import FAMILIES

FAST = [name for name in FAMILIES if name not in ("gpt2", "mixtral", "qwen3_moe")]
DROPOUT = (5, 3)


class Bases(dict[str, BaseModel]):
    """Made and loaded when first asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __missing__(self, name: str) -> BaseModel:
        self[name] = base_model.load(FAMILIES[name](self._folder / name))
        return self[name]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return Bases(tmp_path_factory.mktemp("bases"))


@pytest.fixture
def llama(bases: Bases) -> Iterator[Adapted]:
    adapted = attached(bases["llama"], LoraConfig(rank=4))
    yield adapted
    adapted.detach()


def attached(base: BaseModel, config: LoraConfig) -> Adapted:
    adapted = lora.attach(base, config, seed=1)
    with torch.no_grad():
        adapted.parameters += 0.02 * torch.randn(
            adapted.parameters.shape, generator=torch.Generator().manual_seed(2)
        )  # fmt: skip
    adapted.refresh()
    return adapted


def gradients(
    adapted: Adapted, run: Pass, documents: list[Document], max_tokens: int = 4096, dropout: bool = False
) -> tuple[float, Tensor]:
    """Loss per target and gradients of one step."""
    adapted.gradients.zero_()
    targets = sum(document.trained_tokens for document in documents)
    batches = list(run.batches(documents, max_tokens))
    loss = sum(run.gradients(batch, targets, DROPOUT if dropout else None) for batch in batches)
    return loss, adapted.gradients.clone()


def assert_same_step(found: tuple[float, Tensor], expected: tuple[float, Tensor]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert float((found[1] - expected[1]).norm()) <= 1e-5 * float(expected[1].norm())
    assert float((found[1] - expected[1]).abs().max()) <= 1e-5 * float(expected[1].abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAST)
def test_packed_is_padded_is_one_by_one(bases: Bases, family: str, dropout: float) -> None:
    adapted = attached(bases[family], LoraConfig(rank=4, dropout=dropout))
    documents, drops = templated(), dropout > 0
    run = passes.choose(adapted)
    assert isinstance(run, PackedPass)
    padded = gradients(adapted, PaddedPass(adapted), documents, dropout=drops)
    assert padded[1].abs().max() > 0
    assert_same_step(gradients(adapted, run, documents, dropout=drops), padded)
    assert_same_step(gradients(adapted, run, documents, 60, dropout=drops), padded)
    assert_same_step(gradients(adapted, run, documents, 1, dropout=drops), padded)
    adapted.detach()


@pytest.mark.parametrize("family", FAST)
def test_the_loss_alone_is_that_of_the_step(bases: Bases, family: str) -> None:
    adapted = attached(bases[family], LoraConfig(rank=4))
    documents, run, padded = templated(), PackedPass(adapted), PaddedPass(adapted)
    (batch,) = run.batches(documents, 4096)
    expected = sum(padded.loss(batch) for batch in padded.batches(documents, 4096))
    assert run.loss(batch) == pytest.approx(expected, rel=1e-5)
    adapted.detach()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "smollm3"])
def test_recomputed_layers_give_the_same_bits_and_so_does_offloading(bases: Bases, family: str) -> None:
    adapted = attached(bases[family], LoraConfig(rank=4, dropout=0.2))
    run = PackedPass(adapted)
    expected = gradients(adapted, run, templated(), dropout=True)
    for recomputed, offload in ((1, False), (run.layers, False), (run.layers, True)):
        run.recomputed, run.offload = recomputed, offload
        found = gradients(adapted, run, templated(), dropout=True)
        assert found[0] == expected[0]
        assert torch.equal(found[1], expected[1])
    adapted.detach()


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_evaluating_between_two_steps_leaves_gradients_unchanged(quantization: str, tmp_path: Path) -> None:
    base = base_model.load(FAMILIES["llama"](tmp_path), quantization=quantization, compute_dtype="bf16")
    adapted = attached(base, LoraConfig(rank=4))
    run = PackedPass(adapted)
    before = gradients(adapted, run, templated())
    for keep in (False, True):
        run.keep_dequantized(keep)
        for batch in run.batches(templated(), 4096):
            run.loss(batch)
        after = gradients(adapted, run, templated())
        assert after[0] == before[0]
        assert torch.equal(after[1], before[1])


@pytest.mark.parametrize(
    "targets",
    [
        ["model.layers.1.self_attn.v_proj"],
        ["model.layers.1.mlp.down_proj"],
        ["model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"],
        ["model.layers.0.self_attn.o_proj"],
        ["model.layers.0.self_attn.k_proj", "lm_head"],
        ["lm_head"],
    ],
    ids=lambda names: names[0].removeprefix("model.layers."),
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_any_modules_may_be_adapted(bases: Bases, targets: list[str], dropout: float) -> None:
    adapted = attached(bases["llama"], LoraConfig(rank=4, target_modules=targets, dropout=dropout))
    drops = dropout > 0
    padded = gradients(adapted, PaddedPass(adapted), templated(), dropout=drops)
    assert_same_step(gradients(adapted, PackedPass(adapted), templated(), dropout=drops), padded)
    adapted.detach()


def test_nothing_is_kept_and_no_gradient_computed_below_the_lowest_adapter(
    bases: Bases, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = attached(bases["gemma2"], LoraConfig(rank=4, target_modules=["layers.2.self_attn.o_proj"]))
    run = PackedPass(adapted)
    assert (run.decoder.lowest, run.layers) == (2, 1)
    needed: list[bool] = []
    backward = type(run.decoder.layers[2]).backward
    monkeypatch.setattr(
        type(run.decoder.layers[2]),
        "backward",
        lambda self, *parts, **options: (needed.append(options["needed"]), backward(self, *parts, **options))[1],
    )
    (batch,) = run.batches(templated(), 4096)
    low = run.decoder.needed_bytes(batch)
    run.gradients(batch, 1.0, None)
    assert needed == [False]
    adapted.detach()
    everything = attached(bases["gemma2"], LoraConfig(rank=4))
    assert low < 0.7 * PackedPass(everything).decoder.needed_bytes(batch)
    everything.detach()


def test_the_last_layer_computes_queries_and_mlp_for_predicting_rows_alone(
    llama: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = PackedPass(llama)
    (batch,) = run.batches(templated(), 4096)
    last = run.decoder.layers[-1]
    counted: list[int] = []
    forward = Projection.forward

    def counting(self: Projection, x: Tensor, routing: Routing) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self in last.projections:
            counted.append(len(x))
        return forward(self, x, routing)

    monkeypatch.setattr(Projection, "forward", counting)
    run.loss(batch)
    targets = len(batch.predicts)
    assert counted == [targets, batch.rows, targets, targets, targets]  # q, then k and v, output, gate and up, down
    assert targets < batch.rows


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("length", [90, 400])
def test_the_memory_model_counts_what_layers_keep(bases: Bases, family: str, length: int) -> None:
    adapted = attached(bases[family], LoraConfig(rank=4))
    run = PackedPass(adapted)
    (pack,) = run.batches(templated(lengths=(20, 33, length, 17)), 4096)
    decoder = run.decoder
    rows = decoder._rows(pack, None)
    x = decoder._trunk.embed_tokens(pack.ids[None])[0].float()
    for layer in decoder.layers:
        x, kept = layer.forward(x, rows, torch.float32)
        storages: dict[int, int] = {}
        for tensor in tensors(kept):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        assert layer.kept_bytes(pack, 4) == sum(storages.values())
    adapted.detach()


def tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__slots__"):
        for name in value.__slots__:
            yield from tensors(getattr(value, name))


def test_models_that_are_not_dense_decoders_are_left_to_the_other_path(bases: Bases) -> None:
    assert {name for name in FAMILIES if Decoder.supports(bases[name].model)} == set(FAST)
    model = base_model.outline(bases["llama"].folder, quantization="none", compute_dtype="fp32").model
    assert Decoder.supports(model)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": "dynamic"}
    assert not Decoder.supports(model)


def test_operations_are_those_of_the_shapes(llama: Adapted) -> None:
    """Counted by hand for the tiny Llama: hidden 32, MLP 64, heads 4 of 8, key heads 2, vocabulary from the model."""
    run = PackedPass(llama)
    (pack,) = run.batches(templated(), 4096)
    rows, predicting, vocabulary = pack.rows, len(pack.predicts), llama.base.model.config.vocab_size
    config = llama.base.model.config
    hidden, inner = config.hidden_size, config.intermediate_size
    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    r = 4
    first = 2 * rows * (
        hidden * (width + 2 * narrow) + 2 * width * hidden + 2 * 3 * hidden * inner  # no gradient for the first input
        + 3 * r * (3 * hidden + width + 2 * narrow + width + hidden + 2 * (hidden + inner) + inner + hidden)
    )  # fmt: skip
    depth = config.num_hidden_layers
    assert depth == 2
    last = 2 * predicting * (2 * (hidden * width + width * hidden + 3 * hidden * inner) + 3 * r * (
        hidden + width + width + hidden + 2 * (hidden + inner) + inner + hidden
    )) + 2 * rows * (2 * hidden * 2 * narrow + 3 * r * 2 * (hidden + narrow))  # fmt: skip
    head = 2 * predicting * 2 * hidden * vocabulary
    attention = 12 * width * (pack.scores + pack.target_scores)
    assert run.operations(pack) == first + last + head + attention
