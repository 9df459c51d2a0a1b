"""The training loop: a generator of steps, between which its caller logs, saves, or stops.

with Training(spec, base) as training:
    for step in training.steps():
        if step.checkpoint_due:
            training.checkpoint()
    metrics = training.finish()
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self, TypeVar

import torch

from lora_engine import adapter, checkpoint, curves, data, lineage, lora, machine, optim, passes, plan, target_modules
from lora_engine.base_model import BaseModel, context_length, linear_modules
from lora_engine.config import TrainSpec
from lora_engine.data import Document
from lora_engine.errors import CheckpointError, Diverged
from lora_engine.history import History
from lora_engine.step import Step

T = TypeVar("T")


@dataclass(slots=True)
class _Progress:
    """What a checkpoint keeps beside tensors and the history."""

    step: int = 0
    loss_sum: float = 0.0
    trained_tokens: int = 0
    tokens: int = 0
    nonfinite_in_a_row: int = 0
    stopped_early: bool = False


class Training:
    """One job on a base model, which it gives back unchanged when closed."""

    def __init__(self, spec: TrainSpec, base: BaseModel, pulse: Callable[[], None] | None = None) -> None:
        """Tokenise, split, attach the adapter and plan. No sequence is longer than the base model's positions reach.

        `pulse` is called before every micro-batch, as a sign that the job goes on.

        Raises:
            SpecError: target modules that the base model does not have.
            DataError: a row that cannot be used, or nothing to train.
            WouldNotFit: the longest example needs more memory than there is.
        """
        config = spec.training
        self.spec = spec
        self._base, self._pulse = base, pulse
        if base.device.type == "cpu":
            machine.keep_freed_memory()
        modules = linear_modules(base.model)
        self._target_modules = target_modules.last_names(modules, target_modules.targets(modules, spec.lora))
        sequence_length = min(config.sequence_length, context_length(base.model) or config.sequence_length)
        dataset = data.read_once(Path(spec.dataset), base.tokenizer, sequence_length, base.datasets)
        self._dataset_digest = dataset.digest
        if spec.validation_dataset is None:
            self._validation_digest = None
            self._documents, self._held_out = data.split(dataset, config.validation_fraction, config.seed)
        else:
            path = Path(spec.validation_dataset)
            held_out = data.read_once(path, base.tokenizer, sequence_length, base.datasets)
            self._validation_digest = held_out.digest
            self._documents, self._held_out = list(dataset.documents), list(held_out.documents)
        data.check_vocabulary((*self._documents, *self._held_out), len(base.model.get_input_embeddings().weight))
        self._progress = _Progress()
        self._order: tuple[int, list[int]] | None = None
        self._ahead: tuple[int, int, Future[list[passes.Batch]]] | None = None
        self._threads_before = torch.get_num_threads()
        self._packer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="packing")
        self._adapted = lora.attach(base, spec.lora, config.seed)
        try:
            self._run = passes.choose(self._adapted)
        except BaseException:
            self._adapted.detach()
            raise
        try:
            if base.device.type == "cpu":
                machine.give_back_freed_memory()
            trainable = self._adapted.parameters.numel()
            job = plan.Job(config, base, self._run, trainable, dataset, self._documents, self._held_out, spec.threads)
            # What `finish` writes instead of the last parameters: the best ones, where evaluations tell; else, after a
            # divergence, those of before the last update, which led to it.
            self._chooses_best = bool(self._held_out and config.eval_every)
            self._kept = self._adapted.parameters.clone() if job.keeps_best else None
            self.plan = plan.make(job)
            self._adapted.gradients.zero_()
            self._optimizer = optim.Optimizer(
                self._adapted.parameters, self._adapted.gradients, config, self._adapted.rates
            )
        except BaseException:
            self.close()
            raise
        self._history = History(self.plan.steps_per_epoch)
        self._heap = machine.Heap(base.device)

    @property
    def validation_loss_before(self) -> float | None:
        """Of the plain base model; known once the first step was asked for."""
        evaluations = self._history.evaluations
        return evaluations[0].loss if evaluations else None

    @property
    def step(self) -> int:
        """Steps made so far, those before a resume included."""
        return self._progress.step

    @property
    def history(self) -> History:
        """Losses so far."""
        return self._history

    @property
    def _knows_best(self) -> bool:
        """Evaluations have told which step was best, and its parameters are kept."""
        return self._chooses_best and self._history.best_step is not None

    @property
    def _is_finite(self) -> bool:
        return bool(torch.isfinite(self._adapted.parameters).all())

    def steps(self) -> Iterator[Step]:
        """Make the remaining steps, one each time the next is asked for.

        Raises:
            Diverged: loss or gradients were not finite `max_nonfinite_steps` times in a row; none of these updates was
                made, and `finish` still writes the last good adapter, if there was a step before.
            OutOfMemory: a micro-batch of a single document does not fit, with all layers recomputed.
        """
        config, progress = self.spec.training, self._progress
        if progress.step == 0 and not self._history.evaluations:
            self._evaluate()
        while progress.step < self.plan.steps and not progress.stopped_early:
            started = time.perf_counter()
            documents = self._documents_of(progress.step)
            targets = sum(document.trained_tokens for document in documents)
            rate = optim.learning_rate(config, progress.step, self.plan.steps)
            loss, batches = self._accumulate(targets)
            norm = optim.clip(self._adapted.gradients, config.max_grad_norm)
            skipped = not (math.isfinite(loss) and math.isfinite(norm))
            if skipped:
                self._skip(loss, norm, rate)
            else:
                if self._kept is not None and not self._knows_best:
                    self._kept.copy_(self._adapted.parameters)
                self._optimizer.step(rate)
                self._adapted.refresh()
                progress.nonfinite_in_a_row = 0
                progress.loss_sum += loss * targets
                progress.trained_tokens += targets
                self._history.add_step(progress.step + 1, loss, rate)
            progress.step += 1
            tokens = sum(len(document) for document in documents)
            progress.tokens += tokens
            seconds = time.perf_counter() - started
            validation_loss = self._evaluate_if_due()
            self._heap.tidy()
            last = progress.step == self.plan.steps or progress.stopped_early
            limit = self.plan.matmul_rate
            operations = sum(self._run.operations(batch) for batch in batches)
            yield Step(
                step=progress.step,
                total_steps=self.plan.steps,
                epoch=progress.step / self.plan.steps_per_epoch,
                loss=loss,
                learning_rate=rate,
                grad_norm=norm,
                trained_tokens=targets,
                tokens=tokens,
                computed_tokens=sum(batch.rows for batch in batches),
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                limit_fraction=operations / seconds / limit if limit else None,
                recompute_share=self._run.recompute_share,
                peak_bytes=machine.peak_bytes(self._base.device),
                skipped=skipped,
                validation_loss=validation_loss,
                checkpoint_due=not last and progress.step % config.checkpoint_every == 0,
            )

    def _skip(self, loss: float, norm: float, rate: float) -> None:
        progress = self._progress
        progress.nonfinite_in_a_row += 1
        self._history.add_step(progress.step + 1, loss, rate, skipped=True)
        if progress.nonfinite_in_a_row >= self.spec.training.max_nonfinite_steps:
            raise Diverged(
                f"loss {loss} and gradient norm {norm} at step {progress.step + 1}, not finite for "
                f"{progress.nonfinite_in_a_row} steps in a row; lower the learning rate",
                step=progress.step + 1,
            )

    def _accumulate(self, targets: int) -> tuple[float, list[passes.Batch]]:
        """Gradients of the mean loss over all targets of the step, in however many micro-batches.

        Returns that loss and the micro-batches. A step that runs out of memory is made again from its
        beginning, in smaller pieces: the sums are the same.
        """
        config, step = self.spec.training, self._progress.step
        dropout = (config.seed, step) if self._run.drops else None

        def made() -> tuple[float, list[passes.Batch]]:
            self._adapted.gradients.zero_()
            batches = self._batches(step)
            return sum(self._run.gradients(batch, targets, dropout) for batch in self._each(batches)), batches

        return machine.within_memory(made, self._shrink)

    def _each(self, batches: Iterable[passes.Batch]) -> Iterator[passes.Batch]:
        for batch in batches:
            if self._pulse is not None:
                self._pulse()
            yield batch

    def _shrink(self) -> None:
        smaller = plan.shrink(self._run, self.plan.choice, self.plan.longest, self._base.device)
        self.plan = dataclasses.replace(self.plan, **dataclasses.asdict(smaller))

    def _batches(self, step: int) -> list[passes.Batch]:
        """Micro-batches of a step, made ready while the one before was computed, and those of the next under way."""
        tokens = self.plan.micro_batch_tokens
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (step, tokens):
            batches = ahead[2].result()
        else:
            batches = self._prepared(self._documents_of(step), tokens)
        if step + 1 < self.plan.steps:
            future = self._packer.submit(self._prepared, self._documents_of(step + 1), tokens)
            self._ahead = (step + 1, tokens, future)
        return batches

    def _prepared(self, documents: list[Document], tokens: int) -> list[passes.Batch]:
        return list(self._run.batches(documents, tokens))

    def _evaluate_if_due(self) -> float | None:
        """Validation loss after the step just made, where one is due; early stopping and the best adapter follow."""
        config, progress = self.spec.training, self._progress
        due = config.eval_every and progress.step % config.eval_every == 0
        if not self._held_out or not (due or progress.step == self.plan.steps):
            return None
        loss = self._evaluate()
        if self._kept is not None and self._chooses_best and self._history.best_step == progress.step:
            self._kept.copy_(self._adapted.parameters)
        progress.stopped_early = (
            self._history.should_stop(config.early_stopping_patience) and progress.step < self.plan.steps
        )
        return loss

    def _evaluate(self) -> float | None:
        """Loss per target token over the held-out examples, without dropout."""
        if not self._held_out:
            return None

        def made() -> float:
            # No more at once than a step was planned for.
            tokens = min(self.plan.micro_batch_tokens, self.spec.training.global_batch * self.plan.longest)
            return sum(self._run.loss(batch) for batch in self._each(self._run.batches(self._held_out, tokens)))

        loss = machine.within_memory(made, self._shrink) / sum(document.trained_tokens for document in self._held_out)
        self._history.add_evaluation(self._progress.step, loss)
        return loss

    def _documents_of(self, step: int) -> list[Document]:
        epoch, index = divmod(step, self.plan.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            numbers = data.epoch_order(self._dataset_digest, self.spec.training.seed, epoch, len(self._documents))
            self._order = (epoch, numbers)
        size = self.spec.training.global_batch
        return [self._documents[number] for number in self._order[1][index * size : (index + 1) * size]]

    def checkpoint(self) -> Path:
        """Write the state after the last step to `output`/checkpoints; the new folder. Call it between steps.

        Raises:
            Diverged: the last update left weights that are not finite. The checkpoints before are kept.
        """
        if not self._is_finite:
            raise Diverged(f"weights are not finite after step {self.step}; lower the learning rate", step=self.step)
        state = {
            "fingerprint": self._fingerprint(),
            "engine": version("luthier"),
            "micro_batch_tokens": self.plan.micro_batch_tokens,
            "threads": self.plan.threads,
            "history": self._history.to_state(),
            **dataclasses.asdict(self._progress),
        }
        return checkpoint.save(Path(self.spec.output) / "checkpoints", self._progress.step, self._tensors(), state)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint as if nothing had happened, to the bit on CPU.

        Raises:
            CheckpointError: the checkpoint is torn or altered, or of another spec or dataset.
        """
        tensors, state = checkpoint.load(folder)
        if state.pop("fingerprint", None) != self._fingerprint():
            raise CheckpointError(f"{folder.name}: the checkpoint belongs to another spec or dataset")
        state.pop("engine", None)
        # The plan follows the memory and the processors that are free today; the order of the sums, and so the bits,
        # must not.
        settings = {name: state.pop(name) for name in ("micro_batch_tokens", "threads")}
        history = History.from_state(state.pop("history"))
        checkpoint.restore(tensors, self._tensors())
        if settings["threads"] and self._base.device.type == "cpu":
            torch.set_num_threads(settings["threads"])
        rate = machine.matmul_rate(self._base.device, self._base.compute_dtype)
        larger = settings["micro_batch_tokens"] > self.plan.micro_batch_tokens
        # Larger micro-batches than would be chosen today take less memory with every layer recomputed: the same bits.
        recomputed = self._run.layers if larger else self.plan.recomputed_layers
        self._run.recomputed = recomputed
        self.plan = dataclasses.replace(self.plan, **settings, recomputed_layers=recomputed, matmul_rate=rate)
        self._history = history
        self._progress = _Progress(**state)
        self._adapted.refresh()

    def finish(self) -> dict[str, Any]:
        """Write the best adapter to `output`/adapter, with its curves; the metrics of the job.

        Best is the lowest validation loss of those that `eval_every` asked for; without them the last, or after a
        divergence the one before the update that led to it (for adapters of up to 64 M parameters).

        Raises:
            AdapterError: a weight is not finite.
        """
        progress, spec, history = self._progress, self.spec, self._history
        diverged = progress.nonfinite_in_a_row >= spec.training.max_nonfinite_steps or not self._is_finite
        better = history.best_step != progress.step if self._knows_best else diverged
        if self._kept is not None and better:
            self._adapted.parameters.copy_(self._kept)
            self._adapted.refresh()
        result = adapter.Adapter(
            weights=self._adapted.weights(),
            rank=spec.lora.rank,
            alpha=spec.lora.resolved_alpha,
            alphas=self._adapted.alphas,
            use_rslora=spec.lora.use_rslora,
            base_model_name=spec.base_model_name or spec.base_model,
            base_digest=self._base.digest,
            target_modules=self._target_modules,
        )
        folder = Path(spec.output) / "adapter"
        adapter.write(result, folder, lineage=self._lineage(), files={"curves.svg": curves.render(history)})
        evaluations = history.evaluations
        return {
            "train_loss": progress.loss_sum / max(1, progress.trained_tokens),
            "validation_loss_before": _finite(self.validation_loss_before),
            "validation_loss_after": _finite(evaluations[-1].loss) if len(evaluations) > 1 else None,
            "best_step": history.best_step,
            "best_validation_loss": history.best_validation_loss,
            "overfitting_epoch": history.overfitting_epoch,
            "stopped_early": progress.stopped_early,
            "skipped_steps": history.skipped_steps,
            "steps": progress.step,
            "tokens": progress.tokens,
            "trained_tokens": progress.trained_tokens,
        }

    def close(self) -> None:
        """Take the adapter off the base model, which stays loaded and is as it was before. Safe to call twice.

        The process has as many threads again as it had before, for the next job to choose from.
        """
        self._packer.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads_before)
        try:
            self._run.keep_dequantized(False)
        finally:
            self._adapted.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tensors(self) -> dict[str, torch.Tensor]:
        kept = {} if self._kept is None else {"kept": self._kept}
        return {"parameters": self._adapted.parameters, **kept, **self._optimizer.state()}

    def _lineage(self) -> dict[str, Any]:
        return lineage.lineage(self.spec, self._dataset_digest, self._validation_digest)

    def _fingerprint(self) -> str:
        return lineage.fingerprint(self._lineage(), self.spec, self._base, self._adapted)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
