import dataclasses
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_engine import adapter, base_model, data, plan, quantized
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.errors import CheckpointError, DataError, Diverged, OutOfMemory, SpecError
from lora_engine.passes import Batch
from lora_engine.step import Step
from lora_engine.train import Training
from tests.lora_engine.peft_step import peft_step
from tests.tiny_model import make_tiny_gpt2, make_tiny_model

LORA = LoraConfig(rank=4, dropout=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return base_model.load(folder, digest="abc")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty conversations with answers of very different lengths."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [conversation(f"Question {index}?", f"Answer {index}." + " One more." * (index % 7)) for index in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def conversation(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


Spec = Callable[..., TrainSpec]


@pytest.fixture
def spec(folder: Path, dataset: Path, tmp_path: Path) -> Spec:
    def make(output: str = "out", lora: LoraConfig = LORA, **training: Any) -> TrainSpec:
        settings = {"global_batch": 4, "learning_rate": 1e-2, "epochs": 2, "checkpoint_every": 2, **training}
        return TrainSpec(
            base_model=str(folder),
            base_model_name="tiny",
            dataset=str(dataset),
            output=str(tmp_path / output),
            lora=lora,
            training=TrainingConfig(**settings),
        )

    return make


def train(spec: TrainSpec, base: BaseModel) -> tuple[list[Step], dict[str, Any]]:
    with Training(spec, base) as training:
        steps = list(training.steps())
        return steps, training.finish()


def adapter_bytes(spec: TrainSpec) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path(spec.output) / "adapter").iterdir())}


def test_training_lowers_both_losses_and_says_what_it_did(spec: Spec, base: BaseModel) -> None:
    steps, metrics = train(spec(epochs=4, eval_every=8), base)
    assert [step.step for step in steps] == list(range(1, 21))
    assert {step.total_steps for step in steps} == {20}
    assert steps[-1].epoch == 4.0
    assert steps[-1].loss < 0.6 * steps[0].loss
    assert [step.step for step in steps if step.validation_loss is not None] == [8, 16, 20]
    assert [step.step for step in steps if step.checkpoint_due] == list(range(2, 20, 2))
    assert metrics["validation_loss_after"] == steps[-1].validation_loss < metrics["validation_loss_before"]
    assert metrics["steps"] == 20
    assert metrics["trained_tokens"] == sum(step.trained_tokens for step in steps)
    assert metrics["tokens"] == sum(step.tokens for step in steps) > metrics["trained_tokens"]
    total = sum(step.loss * step.trained_tokens for step in steps)
    assert metrics["train_loss"] == pytest.approx(total / metrics["trained_tokens"])


def test_plan(spec: Spec, base: BaseModel) -> None:
    with Training(spec(sequence_length=30), base) as training:
        plan = training.plan
    assert (plan.examples, plan.validation_examples) == (19, 1)
    assert (plan.steps, plan.steps_per_epoch) == (10, 5)
    assert plan.longest == 30
    assert plan.truncated > 0
    per_layer = (32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3  # q and o, k and v, the MLP
    assert plan.trainable_parameters == 2 * 4 * per_layer
    assert not plan.dequantize_once


def test_max_steps_rules_over_epochs(spec: Spec, base: BaseModel) -> None:
    assert len(train(spec(epochs=1, max_steps=3), base)[0]) == 3
    assert train(spec(epochs=1, max_steps=7), base)[0][-1].epoch == pytest.approx(7 / 5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_first_steps_are_those_of_peft_and_plain_pytorch(spec: Spec, folder: Path, quantization: str) -> None:
    """Three steps on ragged examples, with decay, clipping and schedule, written out with PEFT and AdamW."""
    config = LoraConfig(rank=4)
    job = spec(lora=config, quantization=quantization, max_steps=3, weight_decay=0.1, max_grad_norm=0.3)
    base = base_model.load(folder, quantization=quantization)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    if quantization == "nf4":
        for module in base_model.linear_modules(base.model):
            if not module.head:
                model.get_submodule(module.name).weight.data.copy_(
                    base.model.get_submodule(module.name).dequantized()
                )  # fmt: skip
    with Training(job, base) as training:
        assert training.plan.dequantize_once == (quantization == "nf4")
        names = list(training._adapted.layers)
        twin = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)).eval()
        layers = {name: twin.base_model.model.get_submodule(name) for name in names}
        for name, weights in training._adapted.weights().items():
            layers[name].lora_A.default.weight.data.copy_(weights.A)
        parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
        for number, step in enumerate(training.steps()):
            documents = training._documents_of(number)
            total, norm = peft_step(twin, parameters, optimizer, documents, step.learning_rate, 0.3)
            assert step.loss == pytest.approx(total, rel=1e-5)
            assert step.grad_norm == pytest.approx(norm, rel=1e-4)
            assert step.trained_tokens == sum(document.trained_tokens for document in documents)
        for name, weights in training._adapted.weights().items():
            # AdamW divides by the gradient's own size: where that is next to nothing, rounding shows.
            torch.testing.assert_close(weights.A, layers[name].lora_A.default.weight.detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(weights.B, layers[name].lora_B.default.weight.detach(), rtol=1e-4, atol=1e-4)


def test_micro_batches_do_not_change_the_gradient(spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for tokens in (16, 90, 4096):
        monkeypatch.setitem(plan._PREFERRED_TOKENS, "cpu", tokens)
        with Training(spec(), base) as training:
            documents = training._documents_of(0)
            randomize(training)
            loss, _ = training._accumulate(sum(document.trained_tokens for document in documents))
            found.append((len(training._batches(0)), loss, training._adapted.gradients.clone()))
    assert len({count for count, _, _ in found}) >= 2
    for _, loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        assert (gradients - found[0][2]).abs().max() <= 1e-5 * found[0][2].abs().max()


def randomize(training: Training) -> None:
    with torch.no_grad():
        training._adapted.parameters.add_(0.01)
    training._adapted.refresh()


def test_the_loss_is_per_target_token_of_the_whole_step(spec: Spec, base: BaseModel, tmp_path: Path) -> None:
    """Answers of 10 and 190 tokens in micro-batches of their own, against one sum in float64."""
    rows = tmp_path / "ragged.jsonl"
    text = base.tokenizer.decode([40] * 9), base.tokenizer.decode([40] * 189)
    rows.write_text("".join(json.dumps({"prompt": "x", "completion": completion}) + "\n" for completion in text))
    job = TrainSpec(
        base_model="", dataset=str(rows), output=str(tmp_path),
        training=TrainingConfig(validation_fraction=0, global_batch=2),
    )  # fmt: skip
    with Training(job, base) as training:
        documents = training._documents_of(0)
        assert sorted(document.trained_tokens for document in documents) == [10, 190]
        object.__setattr__(training.plan, "micro_batch_tokens", 8)
        loss, _ = training._accumulate(200)
        total = 0.0
        for document in documents:
            logits = base.model(input_ids=document.ids[None].long()).logits[0, :-1].double()
            chosen = document.trained[1:]
            logs = logits.log_softmax(-1)[chosen]
            total -= float(logs.gather(1, document.ids[1:][chosen].long()[:, None]).sum().detach())
    assert loss == pytest.approx(total / 200, rel=1e-6)


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


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_second_job_on_a_warm_base_gives_the_bytes_of_a_fresh_one(
    spec: Spec, folder: Path, quantization: str
) -> None:
    warm = base_model.load(folder, quantization=quantization)
    train(spec("first", quantization=quantization, seed=3), warm)
    train(spec("warm", quantization=quantization, max_steps=4), warm)
    assert all(layer.dequantized() is not layer.dequantized() for layer in quantized.layers(warm.model))  # none is kept
    train(spec("fresh", quantization=quantization, max_steps=4), base_model.load(folder, quantization=quantization))
    assert adapter_bytes(spec("warm")) == adapter_bytes(spec("fresh"))
    assert adapter_bytes(spec("warm")) != adapter_bytes(spec("first"))


def test_adapter_files_name_what_they_were_made_from(spec: Spec, base: BaseModel, dataset: Path) -> None:
    job = spec(max_steps=1)
    train(job, base)
    folder = Path(job.output) / "adapter"
    lineage = json.loads((folder / "lineage.json").read_text())
    assert lineage["base_model"] == "tiny"
    assert lineage["base_digest"] == "abc"
    assert lineage["seed"] == 0
    assert lineage["dataset_sha256"] == data.sha256_file(dataset)
    assert lineage["lora"]["rank"] == 4
    assert lineage["training"]["max_steps"] == 1
    written = adapter.read(folder)
    assert (written.rank, written.alpha, written.base_model_name) == (4, 8, "tiny")
    assert json.loads((folder / "adapter_config.json").read_text())["target_modules"] == [
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"
    ]  # fmt: skip


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


def test_the_best_adapter_is_kept_and_training_ends_when_it_gets_no_better(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9])
    reference = spec("reference", max_steps=4, epochs=4, schedule="constant", warmup_ratio=0.0)
    train(reference, base)
    job = spec(epochs=4, eval_every=2, early_stopping_patience=3, schedule="constant", warmup_ratio=0.0)
    with Training(job, base) as training:
        monkeypatch.setattr(training._run, "loss", lambda batch: next(losses) * batch.trained_tokens)
        steps = list(training.steps())
        assert steps[-1].step == 10
        assert not steps[-1].checkpoint_due
        metrics = training.finish()
    assert (metrics["best_step"], metrics["best_validation_loss"]) == (4, 3.0)
    assert (metrics["stopped_early"], metrics["steps"]) == (True, 10)
    assert metrics["validation_loss_after"] == pytest.approx(3.7)
    weights = "adapter_model.safetensors"
    assert adapter_bytes(job)[weights] == adapter_bytes(reference)[weights]
    assert adapter_bytes(job)["curves.svg"].startswith(b"<svg")


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


def test_a_job_gives_its_threads_back(spec: Spec, base: BaseModel) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with Training(dataclasses.replace(spec(), threads=1), base):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_the_same_rows_are_tokenised_once_for_a_base_model(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.datasets.clear()
    with Training(spec(), base) as training:
        first = training._documents
    monkeypatch.setattr(data, "read", None)
    with Training(spec(), base) as training:
        assert all(one is other for one, other in zip(first, training._documents, strict=True))


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


def test_each_step_says_how_fast_it_was(spec: Spec, base: BaseModel) -> None:
    steps, _ = train(spec(max_steps=2), base)
    for step in steps:
        assert step.tokens_per_second == pytest.approx(step.tokens / step.seconds)
        assert step.limit_fraction is not None and 0 < step.limit_fraction < 1  # noqa: PT018 - for the type checker
        assert step.recompute_share == 0
        assert step.computed_tokens % 16 == 0
        assert step.trained_tokens < step.computed_tokens < step.tokens + 16
        assert step.peak_bytes > 10**7
        assert not step.skipped


def test_a_separate_validation_dataset_leaves_all_examples_for_training(
    spec: Spec, base: BaseModel, dataset: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps(conversation("What?", "That.")) + "\n")
    job = TrainSpec(base_model="", dataset=str(dataset), output=str(tmp_path / "o"), validation_dataset=str(held_out),
                    training=TrainingConfig(max_steps=1))  # fmt: skip
    with Training(job, base) as training:
        assert (training.plan.examples, training.plan.validation_examples) == (20, 1)
        (step,) = training.steps()
        assert step.validation_loss is not None


def test_without_validation_there_is_no_validation_loss(spec: Spec, base: BaseModel) -> None:
    steps, metrics = train(spec(validation_fraction=0, max_steps=1, eval_every=1), base)
    assert steps[0].validation_loss is None
    assert metrics["validation_loss_before"] is metrics["validation_loss_after"] is None


def test_a_spec_that_fails_leaves_the_base_plain(spec: Spec, base: BaseModel, tmp_path: Path) -> None:
    before = dict(base.model.named_modules())
    with pytest.raises(SpecError):
        Training(spec(lora=LoraConfig(target_modules=["nothing"])), base)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    with pytest.raises(DataError):
        Training(TrainSpec(base_model="", dataset=str(empty), output=""), base)
    assert dict(base.model.named_modules()) == before


def test_gpt2_trains_and_its_adapter_gives_the_logits_that_peft_computes(spec: Spec, tmp_path: Path) -> None:
    folder = make_tiny_gpt2(tmp_path / "gpt2")
    base = base_model.load(folder)
    job = spec(lora=LoraConfig(rank=4), max_steps=5)
    ids = torch.arange(3, 43).view(2, 20)
    with Training(job, base) as training:
        steps = list(training.steps())
        training.finish()
        ours = base.model(input_ids=ids).logits
    assert steps[-1].loss < steps[0].loss
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = plain(input_ids=ids).logits
    twin = peft.PeftModel.from_pretrained(plain, str(Path(job.output) / "adapter")).eval()
    torch.testing.assert_close(twin(input_ids=ids).logits, ours, rtol=1e-5, atol=1e-5)
    assert (before - ours).abs().max() > 1e-2


def test_documents_beyond_the_models_positions_are_cut(spec: Spec, base: BaseModel, tmp_path: Path) -> None:
    rows = tmp_path / "long.jsonl"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b c d " * 200}) + "\n")
    job = TrainSpec(base_model="", dataset=str(rows), output=str(tmp_path), training=TrainingConfig(max_steps=1))
    with Training(job, base) as training:
        assert (training.plan.longest, training.plan.truncated) == (256, 1)
        list(training.steps())


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
