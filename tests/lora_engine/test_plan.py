from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import base_model, lora, machine, passes, plan
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.data import Dataset
from lora_engine.errors import WouldNotFit
from lora_engine.lora import Adapted
from lora_engine.plan import Choice, Job, Plan
from tests.lora_engine.documents import templated
from tests.tiny_model import make_llama_config, make_tiny_gpt2, make_tiny_model

LENGTHS = (40, 300, 60, 20, 50, 120)
LLAMA_2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096}  # fmt: skip
LLAMA_3_8B = LLAMA_2_7B | {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8,
                           "max_position_embeddings": 8192}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseModel]:
    folder = tmp_path_factory.mktemp("base")
    llama = make_tiny_model(folder / "llama")
    loaded = {name: base_model.load(llama, quantization=name) for name in ("none", "nf4", "int8")}
    return {**loaded, "gpt2": base_model.load(make_tiny_gpt2(folder / "gpt2"))}


@pytest.fixture
def attached() -> Iterator[list[Adapted]]:
    made: list[Adapted] = []
    yield made
    for adapted in made:
        adapted.detach()


def job(base: BaseModel, attached: list[Adapted], rank: int = 4, **training: Any) -> Job:
    adapted = lora.attach(base, LoraConfig(rank=rank), seed=0)
    attached.append(adapted)
    documents = templated(lengths=LENGTHS)
    config = TrainingConfig(**{"global_batch": 2, "epochs": 3, **training})
    dataset = Dataset(tuple(documents), "digest", truncated=1, dropped=2)
    size = adapted.parameters.numel()
    return Job(config, base, passes.choose(adapted), size, dataset, documents[:5], documents[5:], threads=1)


def test_the_figures_of_a_job(bases: dict[str, BaseModel], attached: list[Adapted]) -> None:
    found = plan.make(job(bases["none"], attached))
    assert (found.examples, found.validation_examples, found.truncated, found.dropped) == (5, 1, 1, 2)
    assert (found.tokens, found.longest) == (470, 300)
    assert (found.steps, found.steps_per_epoch) == (9, 3)
    assert (found.micro_batch_tokens, found.recomputed_layers, found.recompute_share) == (1024, 0, 0)
    assert (found.packed, found.threads, found.offload, found.dequantize_once) == (True, 1, False, False)
    assert plan.base_bytes(bases["none"]) < found.predicted_peak_bytes < found.available_bytes
    assert found.predicted_step_seconds is not None and found.predicted_seconds is not None  # noqa: PT018
    assert found.predicted_seconds > 9 * found.predicted_step_seconds > 0
    assert found.matmul_rate is not None and found.matmul_rate > 1e8  # noqa: PT018


@pytest.mark.parametrize("name", ["none", "nf4", "int8", "gpt2"])
def test_less_memory_costs_more_time_until_the_job_is_refused(
    bases: dict[str, BaseModel], attached: list[Adapted], name: str
) -> None:
    work = job(bases[name], attached)
    found: list[Plan] = []
    refusal: WouldNotFit | None = None
    available = 40_000_000
    while refusal is None:
        try:
            found.append(plan.make(work, calibrate=False, available=available))
        except WouldNotFit as error:
            refusal = error
        available = int(available * 0.95)
    assert all(item.predicted_peak_bytes <= 0.9 * item.available_bytes for item in found)
    assert (found[0].micro_batch_tokens, found[0].recomputed_layers) == (1024, 0)
    assert found[0].dequantize_once == (name in ("nf4", "int8"))
    assert found[-1].micro_batch_tokens < 1024
    assert found[-1].recomputed_layers == (0 if name == "gpt2" else 2)
    assert refusal.facts["needed_bytes"] <= found[-1].predicted_peak_bytes < found[0].predicted_peak_bytes
    assert "300 tokens" in refusal.message
    assert "a shorter sequence_length" in refusal.message
    assert ("quantization nf4" in refusal.message) == (name in ("none", "gpt2"))


def test_the_adapters_own_state_is_counted_and_8_bit_advised(
    bases: dict[str, BaseModel], attached: list[Adapted]
) -> None:
    needed = {}
    for optimizer in ("adamw", "sgd", "adamw_8bit"):
        work = job(bases["none"], attached, rank=32, optimizer=optimizer)
        needed[optimizer] = plan.make(work, calibrate=False, available=10**9).predicted_peak_bytes
        size = work.trainable
        attached.pop().detach()
    assert needed["adamw"] - needed["sgd"] == 4 * size
    assert needed["adamw"] - needed["adamw_8bit"] == 6 * size
    with pytest.raises(WouldNotFit, match=r"optimizer adamw_8bit \(saves 0.00 GB\), or a lower rank"):
        plan.make(job(bases["none"], attached, rank=512), calibrate=False, available=10**6)


def test_a_calibrating_step_leaves_nothing_behind_and_counts_what_it_took(
    bases: dict[str, BaseModel], attached: list[Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(bases["none"], attached)
    reckoned = plan.make(work, calibrate=False, available=10**10).predicted_peak_bytes
    parameters = attached[0].parameters.clone()
    monkeypatch.setattr(machine, "resident_bytes", lambda _: 0)
    monkeypatch.setattr(machine, "peak_bytes", lambda _: 50_000_000)
    taken = plan.make(work, available=10**10).predicted_peak_bytes
    batch = work.heaviest(1024)
    assert taken == int(1.09 * (reckoned - work.run.needed_bytes(batch) + 50_000_000))
    assert torch.equal(attached[0].parameters, parameters)


def test_a_choice_that_does_not_fit_in_spite_of_the_sum_gives_way_to_the_next(
    bases: dict[str, BaseModel], attached: list[Adapted], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = job(bases["none"], attached)
    gradients = work.run.gradients

    def full(batch: Any, divisor: float, dropout: Any) -> float:
        if work.run.recomputed == 0:
            raise torch.OutOfMemoryError
        return gradients(batch, divisor, dropout)

    monkeypatch.setattr(work.run, "gradients", full)
    assert plan.make(work).recomputed_layers > 0


def test_the_heaviest_micro_batch_is_of_the_longest_documents(
    bases: dict[str, BaseModel], attached: list[Adapted]
) -> None:
    work = job(bases["none"], attached)
    assert work.heaviest(1024).tokens == 300 + 60
    assert work.heaviest(10).tokens == 300


def test_what_is_tried_after_running_out_of_memory(bases: dict[str, BaseModel], attached: list[Adapted]) -> None:
    run = job(bases["none"], attached).run
    choice: Choice | None = Choice(1000, 0, False, True)
    tried = []
    while choice is not None:
        tried.append((choice.recomputed_layers, choice.micro_batch_tokens, choice.dequantize_once))
        choice = plan.shrunk(run, choice, longest=300)
    assert tried == [(0, 1000, True), (2, 1000, False), (2, 300, False)]


def test_tied_and_quantised_weights_are_counted_as_they_lie(bases: dict[str, BaseModel]) -> None:
    model = bases["none"].model
    assert plan.base_bytes(bases["none"]) == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert plan.base_bytes(bases["nf4"]) < plan.base_bytes(bases["int8"]) < 0.8 * plan.base_bytes(bases["none"])


def spec(folder: Path, rank: int, length: int, **training: Any) -> TrainSpec:
    settings = {"quantization": "nf4", "global_batch": 1, "sequence_length": length, **training}
    return TrainSpec(
        base_model=str(folder),
        dataset="",
        output="",
        lora=LoraConfig(rank=rank),
        training=TrainingConfig(**settings),
    )


@pytest.mark.parametrize(
    ("sizes", "rank", "length", "training", "most"),
    [
        (LLAMA_2_7B, 8, 1304, {}, 6.0),
        (LLAMA_2_7B, 256, 2048, {"optimizer": "adamw_8bit"}, 16.0),
        (LLAMA_2_7B, 8, 1304, {"quantization": "none"}, 16.0),
        (LLAMA_3_8B, 16, 8192, {}, 14.0),
    ],
    ids=["7B QLoRA", "7B QLoRA r 256", "7B LoRA", "8B QLoRA long"],
)  # fmt: skip
def test_llamas_are_planned_from_their_configs_alone(
    sizes: dict[str, int], rank: int, length: int, training: dict[str, Any], most: float, tmp_path: Path
) -> None:
    folder = make_llama_config(tmp_path, **sizes)
    generous = plan.of_config(spec(folder, rank, length, **training), 80 * 10**9)
    assert (generous.longest, generous.examples, generous.predicted_seconds) == (length, 1, None)
    assert generous.recomputed_layers == 0
    narrow = plan.of_config(spec(folder, rank, length, **training), int(most * 1e9 / 0.9))
    assert narrow.predicted_peak_bytes <= most * 1e9
    assert narrow.recomputed_layers > 0
    with pytest.raises(WouldNotFit, match="the job needs"):
        plan.of_config(spec(folder, rank, length, **training), 3 * 10**9)
