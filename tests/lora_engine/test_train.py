import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_engine import adapter, base_model, data, plan, quantized
from lora_engine.base_model import BaseModel
from lora_engine.config import LoraConfig, TrainingConfig, TrainSpec
from lora_engine.train import Training
from tests.lora_engine.jobs import Spec, adapter_bytes, conversation, train
from tests.lora_engine.peft_step import peft_step
from tests.tiny_model import make_tiny_gpt2


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


def test_the_same_rows_are_tokenised_once_for_a_base_model(
    spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    base.datasets.clear()
    with Training(spec(), base) as training:
        first = training._documents
    monkeypatch.setattr(data, "read", None)
    with Training(spec(), base) as training:
        assert all(one is other for one, other in zip(first, training._documents, strict=True))


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


def test_the_heap_is_tidied_after_each_step(spec: Spec, base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tidied: list[int] = []
    with Training(spec(max_steps=3), base) as training:
        monkeypatch.setattr(training._heap, "tidy", lambda: tidied.append(training.step))
        list(training.steps())
    assert tidied == [1, 2, 3]
