from pathlib import Path

import pytest
import torch

from lora_engine import base_model, plan
from lora_engine.base_model import BaseModel
from lora_engine.config import TrainingConfig
from lora_engine.data import Dataset, Document
from lora_engine.errors import WouldNotFit
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    folder = make_tiny_model(tmp_path_factory.mktemp("base"))
    return {quantization: base_model.load(folder, quantization=quantization) for quantization in ("none", "nf4")}


def make(base: BaseModel, monkeypatch: pytest.MonkeyPatch, available: int, trainable: int = 1000) -> plan.Plan:
    monkeypatch.setattr(plan, "available_bytes", lambda _: available)
    lengths = (10, 40, 20)
    documents = [
        Document(number, torch.zeros(length, dtype=torch.int32), torch.arange(length) >= length // 2)
        for number, length in enumerate(lengths)
    ]
    dataset = Dataset(tuple(documents), "digest", truncated=1, dropped=2)
    config = TrainingConfig(global_batch=2, epochs=3)
    modules = base_model.linear_modules(base.model)
    return plan.make(config, base, modules, trainable, dataset, documents[:2], documents[2:])


def test_the_figures_of_a_job(bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch) -> None:
    found = make(bases["none"], monkeypatch, 10**10)
    assert (found.examples, found.validation_examples, found.truncated, found.dropped) == (2, 1, 1, 2)
    assert (found.tokens, found.trained_tokens, found.longest) == (50, 25, 40)
    assert (found.steps, found.steps_per_epoch) == (3, 1)
    assert (found.micro_batch_tokens, found.dequantize_once) == (1024, False)
    assert plan.base_bytes(bases["none"]) < found.predicted_peak_bytes < found.available_bytes


def test_less_memory_means_smaller_micro_batches_then_no_dequantised_weights_then_refusal(
    bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    refusal: WouldNotFit | None = None
    available = 20_000_000
    while refusal is None:
        try:
            found.append(make(bases["nf4"], monkeypatch, available))
        except WouldNotFit as error:
            refusal = error
        available = int(available * 0.9)
    choices = list(dict.fromkeys((item.dequantize_once, item.micro_batch_tokens) for item in found))
    assert choices[0] == (True, 1024)
    assert choices[-1] == (False, 40)
    assert choices == sorted(choices, reverse=True)
    assert all(item.predicted_peak_bytes < item.available_bytes for item in found)
    assert refusal.facts["needed_bytes"] > refusal.facts["available_bytes"] * 0.9
    assert "lower sequence_length" in refusal.message


def test_a_rank_that_is_too_large_is_refused(bases: dict[str, BaseModel], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WouldNotFit):
        make(bases["none"], monkeypatch, 10**9, trainable=10**8)


def test_tied_and_quantised_weights_are_counted_as_they_lie(bases: dict[str, BaseModel]) -> None:
    model = bases["none"].model
    assert plan.base_bytes(bases["none"]) == sum(
        tensor.nbytes for tensor in (*model.parameters(), *model.buffers())
    )  # fmt: skip
    assert plan.base_bytes(bases["nf4"]) < 0.7 * plan.base_bytes(bases["none"])


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_CGROUP", tmp_path)
    for name, content in (
        ("memory.max", "5000\n"),
        ("memory.current", "3000\n"),
        ("memory.stat", "inactive_file 700\n"),
    ):
        (tmp_path / name).write_text(content)
    assert plan.available_bytes(torch.device("cpu")) == 2700
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.available_bytes(torch.device("cpu")) > 10**7
    monkeypatch.setattr(plan, "_MEMINFO", tmp_path / "nothing")
    assert plan.available_bytes(torch.device("cpu")) > 10**7


def test_the_machine_says_how_much_memory_is_available() -> None:
    assert 10**7 < plan.available_bytes(torch.device("cpu")) < 10**15


def test_more_tokens_more_bytes(bases: dict[str, BaseModel], tmp_path: Path) -> None:
    base = bases["nf4"]
    modules = base_model.linear_modules(base.model)
    small, large = (plan.predicted_bytes(base, modules, 10, tokens, 0.5, False) for tokens in (100, 200))
    assert small < large < 2 * small
    weights = sum(module.inputs * module.outputs for module in modules if not module.head)
    assert plan.predicted_bytes(base, modules, 10, 100, 0.5, True) - small == 4 * weights
