"""The training loop: a generator of steps, between which its caller logs, saves, or stops.

with Training(spec, base) as training:
    for step in training.steps():
        if step.checkpoint_due:
            training.checkpoint()
    metrics = training.finish()
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch

from lora_engine import adapter, checkpoint, data, lora, nf4, optim, plan
from lora_engine.base_model import BaseModel, context_length, linear_modules
from lora_engine.config import TrainSpec, to_mapping
from lora_engine.data import Document, MicroBatch
from lora_engine.dropout import row_keys
from lora_engine.errors import CheckpointError, Diverged, OutOfMemory
from lora_engine.loss import mean_loss, summed_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step that has been made.

    Attributes:
        step: 1 … total_steps.
        epoch: passes over the examples so far, with its fraction.
        loss: per target token, before the update.
        grad_norm: before clipping.
        tokens: of this step, without padding; `trained_tokens` of them carried loss.
        seconds: wall clock of this step, without evaluation.
        validation_loss: where it was evaluated, after this step's update.
        checkpoint_due: the caller should call `Training.checkpoint` now.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    trained_tokens: int
    tokens: int
    seconds: float
    validation_loss: float | None
    checkpoint_due: bool


@dataclass(slots=True)
class _Progress:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    loss_sum: float = 0.0
    trained_tokens: int = 0
    tokens: int = 0
    validation_loss_before: float | None = None
    validation_loss: float | None = None


class Training:
    """One job on a base model, which it gives back unchanged when closed."""

    def __init__(self, spec: TrainSpec, base: BaseModel) -> None:
        """Tokenise, split, plan and attach the adapter. No sequence is longer than the base model's positions reach.

        Raises:
            SpecError: target modules that the base model does not have.
            DataError: a row that cannot be used, or nothing to train.
            WouldNotFit: the longest example needs more memory than there is.
        """
        config = spec.training
        self.spec = spec
        self._base = base
        modules = linear_modules(base.model)
        chosen = lora.targets(modules, spec.lora)
        self._target_modules = lora.last_names(modules, chosen)
        trainable = lora.trainable_parameters(chosen, spec.lora.rank)
        sequence_length = min(config.sequence_length, context_length(base.model) or config.sequence_length)
        dataset = data.read(Path(spec.dataset), base.tokenizer, sequence_length)
        self._dataset_digest = dataset.digest
        if spec.validation_dataset is None:
            self._validation_digest = None
            self._documents, self._held_out = data.split(dataset, config.validation_fraction, config.seed)
        else:
            held_out = data.read(Path(spec.validation_dataset), base.tokenizer, sequence_length)
            self._validation_digest = held_out.digest
            self._documents, self._held_out = list(dataset.documents), list(held_out.documents)
        data.check_vocabulary((*self._documents, *self._held_out), len(base.model.get_input_embeddings().weight))
        self.plan = plan.make(config, base, modules, trainable, dataset, self._documents, self._held_out)
        self._progress = _Progress()
        self._order: tuple[int, list[int]] | None = None
        self._adapted = lora.attach(base, spec.lora, config.seed)
        try:
            nf4.dequantize_once(base.model, self.plan.dequantize_once)
            self._optimizer = optim.Optimizer(self._adapted.parameters, self._adapted.gradients, config.weight_decay)
        except BaseException:
            self.close()
            raise

    @property
    def validation_loss_before(self) -> float | None:
        """Of the plain base model; known once the first step was asked for."""
        return self._progress.validation_loss_before

    @property
    def step(self) -> int:
        """Steps made so far, those before a resume included."""
        return self._progress.step

    def steps(self) -> Iterator[Step]:
        """Make the remaining steps, one each time the next is asked for.

        Raises:
            Diverged: loss or gradients are not finite; the update was not made.
            OutOfMemory: a micro-batch does not fit in spite of the plan.
        """
        config, progress = self.spec.training, self._progress
        if progress.step == 0:
            progress.validation_loss_before = self._evaluate()
        while progress.step < self.plan.steps:
            started = time.perf_counter()
            documents = self._documents_of(progress.step)
            targets = sum(document.trained_tokens for document in documents)
            rate = optim.learning_rate(config, progress.step, self.plan.steps)
            loss = self._accumulate(documents, targets)
            norm = optim.clip(self._adapted.gradients, config.max_grad_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"loss {loss} and gradient norm {norm} at step {progress.step + 1}; lower the learning rate",
                    step=progress.step + 1,
                )
            self._optimizer.step(rate)
            self._adapted.refresh()
            progress.step += 1
            progress.loss_sum += loss * targets
            progress.trained_tokens += targets
            progress.tokens += sum(len(document) for document in documents)
            seconds = time.perf_counter() - started
            last = progress.step == self.plan.steps
            if last or (config.eval_every and progress.step % config.eval_every == 0):
                progress.validation_loss = validation_loss = self._evaluate()
            else:
                validation_loss = None
            yield Step(
                step=progress.step,
                total_steps=self.plan.steps,
                epoch=progress.step / self.plan.steps_per_epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                trained_tokens=targets,
                tokens=sum(len(document) for document in documents),
                seconds=seconds,
                validation_loss=validation_loss,
                checkpoint_due=not last and progress.step % config.checkpoint_every == 0,
            )

    def _accumulate(self, documents: list[Document], targets: int) -> float:
        """Gradients of the mean loss over all targets of the step, in however many micro-batches; that loss."""
        self._adapted.gradients.zero_()
        total = 0.0
        try:
            for batch in data.micro_batches(documents, self.plan.micro_batch_tokens, self._base.device):
                self._route(batch)
                loss = summed_loss(self._base.model, batch) / targets
                loss.backward()
                total += loss.item()
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"a micro-batch of {self.plan.micro_batch_tokens} tokens did not fit") from error
        return total

    def _route(self, batch: MicroBatch) -> None:
        """Tell the adapted layers which token each of their rows is, for dropout."""
        if not self.spec.lora.dropout:
            return
        rows, length = batch.ids.shape
        positions = torch.arange(length, device=batch.ids.device).repeat(rows)
        examples = batch.examples.repeat_interleave(length)
        keys = row_keys(self.spec.training.seed, self._progress.step, examples, positions)
        self._adapted.routing.keys = keys
        self._adapted.head_routing.keys = keys[batch.predicts.flatten()]

    def _evaluate(self) -> float | None:
        """Loss per target token over the held-out examples, without dropout."""
        self._adapted.routing.keys = self._adapted.head_routing.keys = None
        batches = data.micro_batches(self._held_out, self.plan.micro_batch_tokens, self._base.device)
        return mean_loss(self._base.model, batches) if self._held_out else None

    def _documents_of(self, step: int) -> list[Document]:
        epoch, index = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            numbers = data.epoch_order(self._dataset_digest, self.spec.training.seed, epoch, len(self._documents))
            self._order = (epoch, numbers)
        size = self.spec.training.global_batch
        return [self._documents[number] for number in self._order[1][index * size : (index + 1) * size]]

    def checkpoint(self) -> Path:
        """Write the state after the last step to `output`/checkpoints; the new folder. Call it between steps."""
        state = {
            "fingerprint": self._fingerprint(),
            "engine": version("luthier"),
            "micro_batch_tokens": self.plan.micro_batch_tokens,
            **dataclasses.asdict(self._progress),
        }
        return checkpoint.save(Path(self.spec.output) / "checkpoints", self._progress.step, self._tensors(), state)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint of the same job: what follows is what would have followed there, to the bit on CPU.

        Raises:
            CheckpointError: the checkpoint is torn or altered, or of another spec or dataset.
        """
        tensors, state = checkpoint.load(folder)
        if state.pop("fingerprint", None) != self._fingerprint():
            raise CheckpointError(f"{folder.name}: the checkpoint belongs to another spec or dataset")
        state.pop("engine", None)
        # The plan follows the memory that is free today; the order of the sums, and so the bits, must not.
        self.plan = dataclasses.replace(self.plan, micro_batch_tokens=state.pop("micro_batch_tokens"))
        checkpoint.restore(tensors, self._tensors())
        self._progress = _Progress(**state)
        self._adapted.refresh()

    def finish(self) -> dict[str, Any]:
        """Write the adapter to `output`/adapter; the metrics of the job.

        Raises:
            AdapterError: a weight is not finite.
        """
        progress, spec = self._progress, self.spec
        result = adapter.Adapter(
            weights=self._adapted.weights(),
            rank=spec.lora.rank,
            alpha=spec.lora.resolved_alpha,
            use_rslora=spec.lora.use_rslora,
            base_model_name=spec.base_model_name or spec.base_model,
            base_digest=self._base.digest,
            target_modules=self._target_modules,
        )
        adapter.write(result, Path(spec.output) / "adapter", lineage=self._lineage())
        return {
            "train_loss": progress.loss_sum / max(1, progress.trained_tokens),
            "validation_loss_before": progress.validation_loss_before,
            "validation_loss_after": progress.validation_loss,
            "steps": progress.step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
        }

    def close(self) -> None:
        """Take the adapter off the base model, which stays loaded and is as it was before. Safe to call twice."""
        self._adapted.detach()
        nf4.dequantize_once(self._base.model, False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"parameters": self._adapted.parameters, **self._optimizer.state()}

    def _lineage(self) -> dict[str, Any]:
        return {
            "dataset_sha256": self._dataset_digest,
            "validation_dataset_sha256": self._validation_digest,
            "lora": to_mapping(self.spec.lora),
            "training": to_mapping(self.spec.training),
            "seed": self.spec.training.seed,
            "engine": version("luthier"),
        }

    def _fingerprint(self) -> str:
        """Of everything that decides the result; paths do not, as a job may resume on another machine."""
        base = {"base_model": self.spec.base_model_name, "base_digest": self._base.digest}
        facts = {**base, "compute_dtype": str(self._base.compute_dtype), **self._lineage()}
        facts["modules"] = list(self._adapted.layers)
        del facts["engine"]  # a job that was running goes on after an upgrade
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
