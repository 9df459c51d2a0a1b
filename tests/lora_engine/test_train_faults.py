import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import checkpoint
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainSpec
from lora_engine.errors import DataError, Diverged, OutOfMemory, SpecError
from lora_engine.passes import Batch
from lora_engine.train import Training
from tests.lora_engine.jobs import Spec, adapter_bytes, train


def not_finite(training: Training, monkeypatch: pytest.MonkeyPatch, at: tuple[int, ...]) -> None:
    """Have the gradients of some steps (counted from 1) end in NaN."""
    accumulate = training._accumulate

    def broken(targets: int) -> tuple[float, list[Batch]]:
        result = accumulate(targets)
        if training.step + 1 in at:
            training._adapted.gradients[3] = math.nan
        return result

    monkeypatch.setattr(training, "_accumulate", broken)


def test_a_step_that_is_not_finite_is_left_out_and_said(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Training(spec(), base) as training:
        not_finite(training, monkeypatch, at=(2, 3, 5))
        parameters = []
        steps = []
        for step in training.steps():
            steps.append(step)
            parameters.append(training._adapted.parameters.clone())
        metrics = training.finish()
    assert [step.step for step in steps if step.skipped] == [2, 3, 5]
    assert [torch.equal(one, other) for one, other in pairwise(parameters)][:4] == [True, True, False, True]
    assert metrics["skipped_steps"] == 3
    assert metrics["trained_tokens"] == sum(step.trained_tokens for step in steps if not step.skipped)
    assert math.isfinite(metrics["train_loss"])


def test_steps_in_a_row_that_are_not_finite_end_the_job_with_the_last_good_adapter(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Good is what gave a finite loss: the parameters before the last update."""
    good, job = spec("good", max_steps=1, schedule="constant"), spec(schedule="constant", max_nonfinite_steps=2)
    train(good, base)
    with Training(job, base) as training:
        not_finite(training, monkeypatch, at=(3, 4))
        with pytest.raises(Diverged, match="2 steps in a row; lower the learning rate") as caught:
            list(training.steps())
        training.finish()
    assert caught.value.facts == {"step": 4}
    weights = "adapter_model.safetensors"
    assert adapter_bytes(job)[weights] == adapter_bytes(good)[weights]


def test_a_step_without_enough_memory_is_made_again_in_smaller_pieces(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = train(spec("straight", max_steps=3), base)
    tried: list[tuple[int, int]] = []
    with Training(spec(max_steps=3), base) as training:
        run = training._run
        gradients = run.gradients

        def full(batch: Any, divisor: float, dropout: Any) -> float:
            loss = gradients(batch, divisor, dropout)
            tried.append((run.recomputed, batch.rows))
            if batch.rows > 128:
                raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")
            return loss

        monkeypatch.setattr(run, "gradients", full)
        steps = list(training.steps())
        assert training.plan.recomputed_layers == run.layers == 2
        assert training.plan.micro_batch_tokens <= 128
    assert [recomputed for recomputed, _ in tried[:2]] == [0, 2]
    for found, right in zip(steps, expected, strict=True):
        assert found.loss == pytest.approx(right.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(right.grad_norm, rel=1e-4)


def test_running_out_of_memory_for_one_document_is_an_engine_error(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    with Training(spec(validation_fraction=0), base) as training:
        monkeypatch.setattr(training._run, "gradients", full)
        with pytest.raises(OutOfMemory, match="did not fit"):
            next(training.steps())


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("shapes do not fit")

    with Training(spec(validation_fraction=0), base) as training:
        monkeypatch.setattr(training._run, "gradients", broken)
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            next(training.steps())


def test_a_job_gives_its_threads_back(spec: Spec, base: BaseModel) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with Training(dataclasses.replace(spec(), threads=1), base):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_divergence_before_the_first_evaluation_leaves_what_was_good(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"schedule": "constant", "warmup_ratio": 0.0}
    good, job = spec("good", max_steps=1, **options), spec(max_nonfinite_steps=1, eval_every=9, **options)
    train(good, base)
    with Training(job, base) as training:
        not_finite(training, monkeypatch, at=(3,))
        with pytest.raises(Diverged):
            list(training.steps())
        assert training.finish()["skipped_steps"] == 1
    weights = "adapter_model.safetensors"
    assert adapter_bytes(job)[weights] == adapter_bytes(good)[weights]


def test_weights_that_are_not_finite_are_neither_stored_nor_the_result(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finite gradient can do that too, with a rate beyond all measure."""
    options = {"schedule": "constant", "warmup_ratio": 0.0}
    good, job = spec("good", max_steps=2, **options), spec(max_steps=4, **options)
    train(good, base)
    with Training(job, base) as training:
        update = training._optimizer.step

        def too_far(rate: float) -> None:
            update(rate)
            if training.step == 2:
                training._adapted.parameters[0] = math.inf

        monkeypatch.setattr(training._optimizer, "step", too_far)
        for step in training.steps():
            if step.step < 3:
                training.checkpoint()
            else:
                break
        with pytest.raises(Diverged, match="not finite after step 3"):
            training.checkpoint()
        kept = checkpoint.existing(Path(job.output) / "checkpoints")
        training.finish()
    assert [path.name for path in kept] == ["step-00000001", "step-00000002"]
    weights = "adapter_model.safetensors"
    assert adapter_bytes(job)[weights] == adapter_bytes(good)[weights]


def test_a_sign_of_life_before_every_micro_batch(spec: Spec, base: BaseModel) -> None:
    beats: list[int] = []
    with Training(spec(max_steps=2), base, pulse=lambda: beats.append(training.step)) as training:
        list(training.steps())
    assert {0, 1, 2} <= set(beats)  # the evaluation before, those of the steps, the one at the end


def test_memory_is_sought_twice_and_then_advice_given(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def full(batch: Any, *_: object) -> None:
        tried.append(batch.rows)
        raise torch.OutOfMemoryError

    with Training(spec(validation_fraction=0, quantization="nf4"), base) as training:
        monkeypatch.setattr(training._run, "gradients", full)
        with pytest.raises(OutOfMemory, match="lower sequence_length or the rank, or use nf4"):
            next(training.steps())
        assert training.plan.micro_batch_tokens == training.plan.longest
    assert len(tried) == 3


def test_an_evaluation_that_runs_out_of_memory_is_made_again(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Training(spec(max_steps=1), base) as training:
        loss, tried = training._run.loss, []

        def full(batch: Any) -> float:
            tried.append(batch.rows)
            if len(tried) == 1:
                raise torch.OutOfMemoryError
            return loss(batch)

        monkeypatch.setattr(training._run, "loss", full)
        list(training.steps())
        assert training.plan.recomputed_layers == 2


def test_a_spec_that_fails_leaves_the_base_plain(spec: Spec, base: BaseModel, tmp_path: Path) -> None:
    before = dict(base.model.named_modules())
    with pytest.raises(SpecError):
        Training(spec(lora=LoraConfig(target_modules=["nothing"])), base)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError):
        Training(TrainSpec(base_model="", dataset=str(empty), output=""), base)
    assert dict(base.model.named_modules()) == before
