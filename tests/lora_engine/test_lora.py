import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_engine import base_model, lora, optim, quantized
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig
from lora_engine.dropout import keep_mask
from lora_engine.errors import SpecError
from lora_engine.lora import Adapted, attach
from lora_engine.product import LoraLinear, Routing, Segment, Slot
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

QKV = ("q_proj", "k_proj", "v_proj")
CONFIG = LoraConfig(rank=4, alpha=12.0, target_modules=["q_proj", "v_proj", "down_proj"])
IDS = torch.arange(3, 63).view(3, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"), tied=False)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> BaseModel:
    return base_model.load(folder)


@pytest.fixture
def adapted(loaded: BaseModel) -> Iterator[Adapted]:
    result = attach(loaded, CONFIG, seed=1)
    yield result
    result.detach()


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def randomize(adapted: Adapted) -> None:
    """So that the adapter does something."""
    generator = torch.Generator().manual_seed(5)
    for layer in adapted.layers.values():
        layer.slots[0].B.data.copy_(torch.randn(layer.slots[0].B.shape, generator=generator) * 0.1)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-5 of the largest value."""
    assert float((ours - theirs).detach().abs().max()) <= 1e-5 * float(theirs.detach().abs().max())


def peft_twin(adapted: Adapted, model: Any, config: LoraConfig) -> tuple[Any, dict[str, Any]]:
    """PEFT's model around `model` with the same factors; its LoRA layers by module name."""
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.resolved_alpha,
        rank_pattern={name: shape.rank for name, shape in adapted.shapes.items()},
        alpha_pattern={name: shape.alpha for name, shape in adapted.shapes.items()},
        target_modules=list(adapted.layers),
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
    )
    twin = peft.get_peft_model(model, settings).eval()
    layers = {name: twin.base_model.model.get_submodule(name) for name in adapted.layers}
    for name, layer in layers.items():
        layer.lora_A.default.weight.data.copy_(adapted.layers[name].slots[0].A)
        layer.lora_B.default.weight.data.copy_(adapted.layers[name].slots[0].B)
    return twin, layers


def dequantized_twin(base: BaseModel) -> Any:
    """A plain model whose linear weights are the dequantised ones."""
    model = AutoModelForCausalLM.from_pretrained(base.folder)
    for name, module in base.model.named_modules():
        if isinstance(module, quantized.QuantizedLinear):
            weight = model.get_submodule(name).weight
            weight.data.copy_(
                module.dequantized() if isinstance(model.get_submodule(name), nn.Linear) else module.dequantized().t()
            )
    return model


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("make", "config"),
    [
        (make_tiny_model, CONFIG),
        (make_tiny_model, LoraConfig(rank=4, use_rslora=True)),
        (
            make_tiny_model,
            LoraConfig(
                rank=4,
                use_rslora=True,
                rank_pattern={"mlp": 2, "layers.1.*.up_proj": 6},
                alpha_pattern={"q_proj": 3},
                learning_rate_pattern={"layers.0.*": 1e-3},
                lora_plus_ratio=4,
            ),
        ),
        (make_tiny_gpt2, LoraConfig(rank=3, target_modules=["c_attn", "c_proj"])),
    ],
    ids=["llama", "rslora", "patterns", "gpt2"],
)
def test_a_step_is_the_one_peft_makes(
    make: Callable[[Path], Path], config: LoraConfig, quantization: str, tmp_path: Path
) -> None:
    base = base_model.load(make(tmp_path), quantization=quantization)
    plain = dequantized_twin(base)
    adapted = attach(base, config, seed=1)
    randomize(adapted)
    twin, layers = peft_twin(adapted, plain, config)
    targets = IDS[:, 1:].reshape(-1)

    results = []
    for model in (base.model, twin):
        predicted = logits(model)
        loss = nn.functional.cross_entropy(predicted[:, :-1].reshape(len(targets), -1), targets)
        loss.backward()
        results.append(predicted.detach())
    assert_close(*results)
    for name, theirs in layers.items():
        slot = adapted.layers[name].slots[0]
        assert_close(slot.A.grad, theirs.lora_A.default.weight.grad)
        assert_close(slot.B.grad, theirs.lora_B.default.weight.grad)
        # Adam divides each gradient by its own size, which would magnify the rounding of those near zero.
        slot.A.grad.copy_(theirs.lora_A.default.weight.grad)
        slot.B.grad.copy_(theirs.lora_B.default.weight.grad)

    trainable = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    their_norm = nn.utils.clip_grad_norm_(trainable, 0.5)
    assert optim.clip(adapted.gradients, 0.5) == pytest.approx(float(their_norm), rel=1e-5)
    torch.optim.AdamW(_groups(layers, config), weight_decay=0.1).step()
    settings = TrainingConfig(learning_rate=2e-2, weight_decay=0.1)  # half of it, as a schedule has it
    optim.Optimizer(adapted.parameters, adapted.gradients, settings, adapted.rates).step(1e-2)
    for name, theirs in layers.items():
        weights = adapted.weights()[name]
        assert_close(weights.A, theirs.lora_A.default.weight)
        assert_close(weights.B, theirs.lora_B.default.weight)


def _groups(layers: dict[str, Any], config: LoraConfig) -> list[dict[str, Any]]:
    """One parameter group a factor, with half its peak rate, of a peak of 2e-2."""
    slow = 0.5e-3 if config.learning_rate_pattern else 1e-2
    return [
        {"params": [factor.default.weight], "lr": (slow if ".layers.0." in f".{name}" else 1e-2) * ratio}
        for name, layer in layers.items()
        for factor, ratio in ((layer.lora_A, 1), (layer.lora_B, config.lora_plus_ratio or 1))
    ]


def test_at_first_the_logits_are_the_bases(loaded: BaseModel) -> None:
    plain = logits(loaded.model)
    adapted = attach(loaded, LoraConfig(), seed=1)
    assert torch.equal(logits(loaded.model), plain)
    randomize(adapted)
    assert not torch.equal(logits(loaded.model), plain)
    adapted.detach()


def test_detaching_gives_back_the_very_same_base(loaded: BaseModel) -> None:
    before = dict(loaded.model.named_modules())
    bytes_before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    adapted = attach(loaded, LoraConfig(dropout=0.1), seed=1)
    randomize(adapted)
    logits(loaded.model).sum().backward()
    adapted.detach()
    assert dict(loaded.model.named_modules()) == before
    after = loaded.model.state_dict()
    assert after.keys() == bytes_before.keys()
    assert all(torch.equal(tensor, bytes_before[name]) for name, tensor in after.items())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_evaluating_between_two_passes_leaves_gradients_unchanged(folder: Path) -> None:
    for quantization in ("none", "nf4"):
        base = base_model.load(folder, quantization=quantization)
        adapted = attach(base, CONFIG, seed=1)
        randomize(adapted)
        logits(base.model).logsumexp(-1).sum().backward()
        before = adapted.gradients.clone()
        with torch.no_grad():
            logits(base.model)
        adapted.gradients.zero_()
        logits(base.model).logsumexp(-1).sum().backward()
        assert torch.equal(adapted.gradients, before)
        assert before.abs().max() > 0


def test_each_adapter_of_a_shared_pass_gets_what_it_gets_alone(adapted: Adapted, loaded: BaseModel) -> None:
    """Two slots, one segment each, and rows of nobody: outputs and gradients as in passes of their own."""
    randomize(adapted)
    generator = torch.Generator().manual_seed(9)
    for layer in adapted.layers.values():
        first = layer.slots[0]
        A, B = (torch.randn(factor.shape, generator=generator) * 0.1 for factor in (first.A, first.B))
        layer.slots[1] = Slot(A.requires_grad_(), B.requires_grad_(), 0.7, 0.0, A, B)

    def gradients(segments: tuple[Segment, ...], rows: slice) -> tuple[Tensor, list[Tensor]]:
        adapted.routing.segments = segments
        predicted = logits(loaded.model, IDS[rows])
        slots = [layer.slots[segment.slot] for layer in adapted.layers.values() for segment in segments]
        factors = [factor for slot in slots for factor in (slot.A, slot.B)]
        found = torch.autograd.grad(predicted.logsumexp(-1).sum(), factors)
        return predicted.detach(), list(found)

    shared, together = gradients((Segment(0, 0, 20), Segment(1, 20, 40)), slice(0, 3))
    for slot, rows in ((0, slice(0, 1)), (1, slice(1, 2))):
        alone, own = gradients((Segment(slot),), rows)
        assert_close(shared[rows], alone)
        mine = [gradient for index, gradient in enumerate(together) if index % 4 in (2 * slot, 2 * slot + 1)]
        for ours, theirs in zip(mine, own, strict=True):
            assert_close(ours, theirs)
    adapted.routing.segments = ()
    assert_close(shared[2:], logits(loaded.model, IDS[2:]))


def test_dropout_reaches_the_factors_and_not_the_frozen_product(loaded: BaseModel) -> None:
    """Checked against the formula written with plain autograd and the same mask, in float64."""
    adapted = attach(loaded, LoraConfig(rank=4, dropout=0.5, target_modules=["down_proj"]), seed=1)
    randomize(adapted)
    layer = adapted.layers["model.layers.1.mlp.down_proj"]
    x = torch.randn(10, 64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    adapted.routing.keys = torch.arange(10) * 7919
    layer(x).sin().sum().backward()

    mask = keep_mask(adapted.routing.keys, layer.index, 64, 0.5, torch.float64)
    assert 0.3 < float((mask == 0).double().mean()) < 0.7
    slot = layer.slots[0]
    A, B, twin = (tensor.detach().double().requires_grad_() for tensor in (slot.A, slot.B, x))
    weight = layer.base.weight.double()  # type: ignore[operator,union-attr]
    (twin @ weight.t() + slot.scaling * (twin * mask) @ A.t() @ B.t()).sin().sum().backward()
    assert_close(x.grad, twin.grad)  # type: ignore[arg-type]
    assert_close(slot.A.grad, A.grad)  # type: ignore[arg-type]
    assert_close(slot.B.grad, B.grad)  # type: ignore[arg-type]
    adapted.detach()


def test_nothing_below_the_lowest_adapter_needs_a_gradient(loaded: BaseModel) -> None:
    adapted = attach(loaded, LoraConfig(target_modules=["model.layers.1.self_attn.q_proj"]), seed=1)
    seen: list[bool] = []
    hook = loaded.model.model.layers[0].register_forward_hook(lambda *call: seen.append(call[2].requires_grad))
    logits(loaded.model)
    hook.remove()
    adapted.detach()
    assert seen == [False]


def test_bf16_computes_with_copies_of_fp32_masters(folder: Path) -> None:
    base = base_model.load(folder, compute_dtype="bf16")
    adapted = attach(base, CONFIG, seed=1)
    logits(base.model).logsumexp(-1).sum().backward()
    optimizer = optim.Optimizer(adapted.parameters, adapted.gradients, TrainingConfig(), adapted.rates)
    before = adapted.parameters.clone()
    optimizer.step(1e-6)
    adapted.refresh()
    slot = next(iter(adapted.layers.values())).slots[0]
    assert adapted.gradients.dtype == adapted.parameters.dtype == slot.A.dtype == torch.float32
    assert slot.a.dtype == torch.bfloat16
    assert torch.equal(slot.a, slot.A.to(torch.bfloat16))
    assert torch.equal(slot.b, slot.B.to(torch.bfloat16))
    # A step far below bf16's resolution is not lost.
    moved = (adapted.parameters - before).abs()
    assert 0 < float(moved.max()) <= 1.01e-6


def test_factors_of_one_rate_lie_together_and_those_of_one_input_are_one_matrix(loaded: BaseModel) -> None:
    """A before B within a rate; and every parameter has one rate."""
    config = LoraConfig(
        rank=4,
        rank_pattern={"k_proj": 2},
        learning_rate_pattern={"layers.1.self_attn.*": 1e-3},
        lora_plus_ratio=16,
        target_modules="all-linear",
    )
    adapted = attach(loaded, config, seed=1)
    found: dict[tuple[float | None, float], set[str]] = {}
    for rate in adapted.rates:
        marked = torch.zeros_like(adapted.parameters)
        marked[rate.where] = 1
        before = adapted.parameters.clone()
        adapted.parameters.add_(marked)
        found[rate.peak, rate.ratio] = {
            f"{name} {factor}"
            for name, layer in adapted.layers.items()
            for factor in "AB"
            if not torch.equal(getattr(layer.slots[0], factor), _view_of(before, adapted, name, factor))
        }
        adapted.parameters.copy_(before)
    adapted.detach()
    attention = {name for name in adapted.layers if name.startswith("model.layers.1.self_attn")}
    others = set(adapted.layers) - attention
    assert found == {
        (peak, ratio): {f"{name} {factor}" for name in names}
        for peak, names in ((None, others), (1e-3, attention))
        for ratio, factor in ((1.0, "A"), (16.0, "B"))
    }
    assert [rate.where.start for rate in adapted.rates] == [0, *(rate.where.stop for rate in adapted.rates[:-1])]
    assert adapted.rates[-1].where.stop == len(adapted.parameters)
    for layer in (0, 1):
        As = _factors(adapted, layer)
        assert [len(A) for A in As] == [4, 2, 4]
        assert _one_matrix(As)


def _factors(adapted: Adapted, layer: int) -> list[Tensor]:
    names = [f"model.layers.{layer}.self_attn.{name}" for name in QKV]
    return [adapted.layers[name].slots[0].A for name in names if name in adapted.layers]


def _one_matrix(factors: list[Tensor]) -> bool:
    return all(first.data_ptr() + first.nbytes == second.data_ptr() for first, second in itertools.pairwise(factors))


def _view_of(parameters: Tensor, adapted: Adapted, name: str, factor: str) -> Tensor:
    tensor: Tensor = getattr(adapted.layers[name].slots[0], factor)
    return parameters[tensor.storage_offset() :][: tensor.numel()].view(tensor.shape)


def test_without_patterns_there_is_one_rate(adapted: Adapted) -> None:
    assert adapted.rates == (optim.Rate(slice(0, len(adapted.parameters))),)
    assert all(len(_factors(adapted, layer)) == 2 and _one_matrix(_factors(adapted, layer)) for layer in (0, 1))


def test_dropout_masks_go_with_the_input_and_not_with_the_choice_of_modules(loaded: BaseModel) -> None:
    def indices(entries: Any) -> dict[str, int]:
        adapted = attach(loaded, LoraConfig(target_modules=entries), seed=1)
        found = {name: layer.index for name, layer in adapted.layers.items()}
        adapted.detach()
        return found

    every = indices("all-linear")
    inputs = {name: name.rpartition(".")[2] for name in every}
    first = {name: every[name] for name in inputs if ".0." in name}
    assert len({first[name] for name in first if inputs[name] in QKV}) == 1
    assert len({first[name] for name in first if inputs[name] in ("gate_proj", "up_proj")}) == 1
    assert len(set(every.values())) == 2 * 4  # q/k/v, o, gate/up, down
    alone = indices(["layers.1.*.v_proj", "lm_head"])
    assert alone["model.layers.1.self_attn.v_proj"] == every["model.layers.1.self_attn.v_proj"]
    assert alone["lm_head"] not in every.values()


def test_the_initial_factor_is_pefts_distribution_and_a_function_of_seed_and_name() -> None:
    drawn = lora.initial_factor(3, "model.layers.0.mlp.up_proj", 64, 256)
    assert torch.equal(drawn, lora.initial_factor(3, "model.layers.0.mlp.up_proj", 64, 256))
    assert not torch.equal(drawn, lora.initial_factor(4, "model.layers.0.mlp.up_proj", 64, 256))
    assert not torch.equal(drawn, lora.initial_factor(3, "model.layers.1.mlp.up_proj", 64, 256))
    assert float(drawn.abs().max()) <= 256**-0.5
    assert float(drawn.std()) == pytest.approx(256**-0.5 / 3**0.5, rel=0.02)


def test_an_output_head_is_adapted_unless_it_is_tied(loaded: BaseModel, tmp_path: Path) -> None:
    adapted = attach(loaded, LoraConfig(target_modules=["lm_head"]), seed=0)
    logits(loaded.model).logsumexp(-1).sum().backward()
    assert adapted.gradients.abs().max() > 0
    adapted.detach()
    tied = base_model.load(make_tiny_model(tmp_path))
    with pytest.raises(SpecError, match="shares its weight"):
        attach(tied, LoraConfig(target_modules=["q_proj", "lm_head"]), seed=0)
    assert isinstance(tied.model.model.layers[0].self_attn.q_proj, nn.Linear)


@pytest.mark.parametrize("segments", [(Segment(),), (Segment(0, 0, 2), Segment(0, 3, 5))], ids=["one", "two"])
def test_the_autograd_function_passes_gradcheck(segments: tuple[Segment, ...]) -> None:
    """Finite differences in float64, by x and by both factors; rows of nobody among them."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    base = nn.Linear(4, 3).double().requires_grad_(False)
    A, B = normal(2, 4).requires_grad_(), normal(3, 2).requires_grad_()

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        layer = LoraLinear(base, Routing(segments), 0)
        layer.slots[0] = Slot(A, B, 1.5, 0.0, A.detach(), B.detach())
        result: Tensor = layer(x)
        return result

    assert torch.autograd.gradcheck(product, (normal(6, 4).requires_grad_(), A, B))
