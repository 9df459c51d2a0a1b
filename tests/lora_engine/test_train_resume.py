from pathlib import Path

import pytest

from lora_engine import base_model, plan
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig
from lora_engine.errors import CheckpointError
from lora_engine.train import Training
from tests.lora_engine.jobs import Spec, adapter_bytes, train


@pytest.mark.parametrize("stop_after", [1, 2, 4, 5, 7, 9])
def test_a_resumed_job_ends_in_the_same_bytes(spec: Spec, base: BaseModel, stop_after: int) -> None:
    straight, broken = spec("straight", eval_every=3), spec("broken", eval_every=3)
    with Training(straight, base) as training:
        steps = list(training.steps())
        whole = training.checkpoint()
        metrics = training.finish()
    with Training(broken, base) as training:
        for step in training.steps():
            if step.step == stop_after:
                checkpoint = training.checkpoint()
                break
    assert checkpoint == Path(broken.output) / "checkpoints" / f"step-{stop_after:08d}"
    with Training(broken, base) as training:
        training.resume(checkpoint)
        rest = list(training.steps())
        again = training.checkpoint()
        assert training.finish() == metrics
    for name in ("state.safetensors", "state.json", "MANIFEST.json"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()
    assert [step.step for step in rest] == list(range(stop_after + 1, 11))
    assert [(step.loss, step.grad_norm) for step in rest] == [
        (step.loss, step.grad_norm) for step in steps[stop_after:]
    ]
    assert adapter_bytes(broken) == adapter_bytes(straight)


def test_a_resume_keeps_its_micro_batches_however_much_memory_is_free(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = spec("straight"), spec("broken")
    train(straight, base)
    with Training(broken, base) as training:
        next(training.steps())
        checkpoint = training.checkpoint()
        planned = training.plan.micro_batch_tokens
    monkeypatch.setitem(plan._PREFERRED_TOKENS, "cpu", 32)
    with Training(broken, base) as training:
        assert training.plan.micro_batch_tokens < planned
        training.resume(checkpoint)
        list(training.steps())
        training.finish()
    assert adapter_bytes(broken) == adapter_bytes(straight)


def test_a_checkpoint_of_another_job_is_refused(spec: Spec, base: BaseModel) -> None:
    with Training(spec(), base) as training:
        next(training.steps())
        checkpoint = training.checkpoint()
    for other in (spec(seed=1), spec(lora=LoraConfig(rank=4)), spec(learning_rate=2e-2)):
        with Training(other, base) as training, pytest.raises(CheckpointError, match="another spec or dataset"):
            training.resume(checkpoint)
    moved = spec("elsewhere")
    with Training(moved, base) as training:
        training.resume(checkpoint)


def test_the_newest_checkpoints_are_kept(spec: Spec, base: BaseModel) -> None:
    job = spec()
    with Training(job, base) as training:
        for step in training.steps():
            if step.checkpoint_due:
                training.checkpoint()
    assert [path.name for path in sorted((Path(job.output) / "checkpoints").iterdir())] == [
        "step-00000006",
        "step-00000008",
    ]


def test_a_job_that_stopped_early_stays_stopped_after_a_resume(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = spec(epochs=4, eval_every=1, early_stopping_patience=1, learning_rate=1.0, checkpoint_every=1)
    with Training(job, base) as training:
        losses = iter([5.0, 4.0, 4.5])
        monkeypatch.setattr(training._run, "loss", lambda batch: next(losses) * batch.trained_tokens)
        assert len(list(training.steps())) == 2
        checkpoint = training.checkpoint()
        metrics = training.finish()
    with Training(job, base) as training:
        training.resume(checkpoint)
        assert list(training.steps()) == []
        assert training.finish() == metrics


def test_a_job_goes_on_after_an_upgrade(spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with Training(spec(), base) as training:
        next(training.steps())
        checkpoint = training.checkpoint()
    monkeypatch.setattr("lora_engine.lineage.version", lambda _: "99.0")
    with Training(spec(), base) as training:
        training.resume(checkpoint)
        assert training.step == 1


def test_a_checkpoint_of_another_compute_dtype_is_refused(spec: Spec, base: BaseModel, folder: Path) -> None:
    with Training(spec(), base) as training:
        next(training.steps())
        checkpoint = training.checkpoint()
    other = base_model.load(folder, digest="abc", compute_dtype="bf16")
    with Training(spec(), other) as training, pytest.raises(CheckpointError, match="another spec"):
        training.resume(checkpoint)
