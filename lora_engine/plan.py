"""What a training job will do, need and take, decided before its first step.

The global batch is never changed to save memory: only how many tokens pass through the model at once, how many layers
run forward a second time, and whether the dequantised weights of a quantised base are kept. The result of training does
not depend on any of them. The memory that each choice needs is added up from the shapes; one calibrating step on the
longest micro-batch then shows what it really takes, and how long; of many layers a few show it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

import torch

from lora_engine import base_model, data, lora, machine, passes
from lora_engine.base_model import BaseModel
from lora_engine.config import TrainingConfig, TrainSpec
from lora_engine.data import Dataset, Document
from lora_engine.errors import OutOfMemory, WouldNotFit
from lora_engine.passes import Batch, Pass

# Beyond so many tokens a micro-batch fills the device's arithmetic units and only costs memory.
_PREFERRED_TOKENS = {"cpu": 1024, "cuda": 8192}
# Fewer rows than this cost as much time as so many.
_LEAST_ROWS = {"cpu": 32, "cuda": 512}
_RESERVE = 0.9
# Parameters of an adapter of which a second copy is kept although nothing is evaluated.
_LARGEST_KEPT = 64 << 20
# Of the predictions: no less than the largest over a grid of small configurations (benchmarks/plan.py).
_MEMORY_ERROR, _TIME_ERROR = 0.16, 0.28
# What a heap takes for what a job holds, the mean of that grid: `machine.Heap` bounds it.
_HOLES = 1.09
# Seconds from which on what a pass does for the first time no longer shows in its time.
_LONG_PASS = 1.0
# Steps whose micro-batches are counted to predict the time of all.
_SAMPLED_STEPS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The figures of one job.

    Attributes:
        examples: that are trained on; `validation_examples` are not.
        truncated: examples cut at the sequence length; `dropped`: examples without a target left.
        tokens: of all training examples, per epoch; `trained_tokens` of them carry loss.
        longest: longest document, in tokens.
        steps: optimizer steps in all, `steps_per_epoch` of them per epoch.
        trainable_parameters: of the adapter.
        packed: the fast path is taken.
        micro_batch_tokens: most rows in one pass through the model.
        recomputed_layers: of the decoder, whose forward pass runs twice; `recompute_share` of all operations.
        offload: their inputs are kept in the host's memory.
        dequantize_once: the dequantised weights of a quantised base are kept.
        threads: of the processor; 0 where a GPU computes.
        predicted_peak_bytes: of memory on the device, base model included, within `memory_error` (a fraction).
        available_bytes: of memory on the device for this job, base model included.
        matmul_rate: operations a second of the device's matrix products, measured; None where nothing was.
        predicted_step_seconds, predicted_seconds: of a mean step and of the whole job with its evaluations, within
            `time_error` (a fraction); None where nothing was measured.
    """

    examples: int
    validation_examples: int
    truncated: int
    dropped: int
    tokens: int
    trained_tokens: int
    longest: int
    steps: int
    steps_per_epoch: int
    trainable_parameters: int
    packed: bool
    micro_batch_tokens: int
    recomputed_layers: int
    recompute_share: float
    offload: bool
    dequantize_once: bool
    threads: int
    predicted_peak_bytes: int
    memory_error: float
    available_bytes: int
    matmul_rate: float | None
    predicted_step_seconds: float | None
    predicted_seconds: float | None
    time_error: float

    @property
    def choice(self) -> "Choice":
        return Choice(*(getattr(self, item.name) for item in fields(Choice)))


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to spend memory on time: see `Plan`'s fields of these names."""

    micro_batch_tokens: int
    recomputed_layers: int
    offload: bool
    dequantize_once: bool


@dataclass(frozen=True, slots=True)
class Job:
    """What is planned.

    Attributes:
        run: how the base model with the adapter on it is run.
        trainable: parameters of the adapter.
        documents: that are trained on, of `dataset`; `held_out` are evaluated on.
        threads: of the processor, where they are given; `device_type` where it is not the base model's.
    """

    config: TrainingConfig
    base: BaseModel
    run: Pass
    trainable: int
    dataset: Dataset
    documents: Sequence[Document]
    held_out: Sequence[Document]
    threads: int | None = None
    device_type: str = ""

    @property
    def kind(self) -> str:
        """Of the device that is planned for: not that of a base model on the meta device."""
        return self.device_type or self.base.device.type

    @property
    def keeps_best(self) -> bool:
        """A second copy of the parameters is kept: of the best step, or of the one before a divergence."""
        return bool(self.held_out and self.config.eval_every) or self.trainable <= _LARGEST_KEPT

    @property
    def longest(self) -> int:
        return max(len(document) for document in (*self.documents, *self.held_out))

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.documents) // self.config.global_batch)

    @property
    def steps(self) -> int:
        return self.config.max_steps or self.config.epochs * self.steps_per_epoch

    def heaviest(self, max_tokens: int) -> Batch:
        """The largest micro-batch that could come: of a step that gets the longest documents of all."""
        longest = sorted(self.documents, key=len, reverse=True)[: self.config.global_batch]
        batches: list[Batch] = list(self.run.batches(longest, max_tokens, share=False))
        return max(batches, key=lambda batch: batch.rows)


def make(job: Job, *, calibrate: bool = True, available: int | None = None) -> Plan:
    """Choose and predict; `job.run` is left set up as chosen.

    Without `calibrate` nothing is computed: the base model may be on the meta device, and no time is predicted.
    `available` are the device's free bytes before anything of the job lies on it; left out, the machine is asked.

    Raises:
        WouldNotFit: the longest document alone needs more memory than there is; the message says what would help.
    """
    base, run = job.base, job.run
    threads = (job.threads or machine.quickest_threads()) if calibrate and base.device.type == "cpu" else 0
    if threads:
        torch.set_num_threads(threads)
    if available is None:
        # What the job has on the device already is available to it.
        available = machine.available_bytes(base.device) + base_bytes(base) + _adapter_bytes(job)
    limit = int(_RESERVE * available)
    least: int | None = None
    for choice in _choices(job):
        batch = job.heaviest(choice.micro_batch_tokens)
        peak = predicted_bytes(job, choice, batch)
        least = min(peak, least or peak)
        if peak > limit:
            continue
        rate = None
        if not calibrate:
            run.recomputed, run.offload = choice.recomputed_layers, choice.offload
        else:
            rate, surplus = _calibrated(job, choice, batch)
            peak += surplus
            if job.kind == "cpu":
                peak = int(_HOLES * peak)
            least = max(least, peak)
        if peak <= limit and not (calibrate and rate is None):
            break
        if calibrate:
            run.keep_dequantized(False)
            if job.kind == "cpu":  # what was too large for the job would stay in the heap as holes
                machine.give_back_freed_memory()
    else:
        raise _would_not_fit(job, least or 0, available)
    step_seconds, seconds = _predicted_seconds(job, choice, rate)
    return Plan(
        examples=len(job.documents),
        validation_examples=len(job.held_out),
        truncated=job.dataset.truncated,
        dropped=job.dataset.dropped,
        tokens=sum(len(document) for document in job.documents),
        trained_tokens=sum(document.trained_tokens for document in job.documents),
        longest=job.longest,
        steps=job.steps,
        steps_per_epoch=job.steps_per_epoch,
        trainable_parameters=job.trainable,
        packed=run.packed,
        micro_batch_tokens=choice.micro_batch_tokens,
        recomputed_layers=choice.recomputed_layers,
        recompute_share=run.recompute_share,
        offload=choice.offload,
        dequantize_once=choice.dequantize_once,
        threads=threads,
        predicted_peak_bytes=peak,
        memory_error=_MEMORY_ERROR,
        available_bytes=available,
        matmul_rate=machine.matmul_rate(base.device, base.compute_dtype) if calibrate else None,
        predicted_step_seconds=step_seconds,
        predicted_seconds=seconds,
        time_error=_TIME_ERROR,
    )


def of_config(spec: TrainSpec, available: int | None = None) -> Plan:
    """The plan of a job whose base model is known by its config alone, without weights, tokenizer or dataset.

    It is made for one step of `global_batch` examples that are all as long as `sequence_length` allows, answers from
    their middle on, on a device with `available` bytes: this machine's where left out.

    Raises:
        BaseModelError, SpecError, WouldNotFit: as `Training` and `make` do.
    """
    config = spec.training
    # Without a figure the plan is for this machine, with one for the GPU that it belongs to.
    kind = "cuda" if available is not None and spec.device == "auto" else base_model.device_of(spec.device).type
    automatic = "bf16" if kind == "cuda" else "fp32"
    dtype = automatic if config.compute_dtype == "auto" else config.compute_dtype
    base = base_model.outline(Path(spec.base_model), quantization=config.quantization, compute_dtype=dtype)
    length = min(config.sequence_length, base_model.context_length(base.model) or config.sequence_length)
    positions = torch.arange(length)
    documents = [
        Document(number, positions.int() + number, positions >= length // 2) for number in range(config.global_batch)
    ]
    adapted = lora.attach(base, spec.lora, config.seed)
    dataset = Dataset(tuple(documents), digest="", truncated=0, dropped=0)
    size = adapted.parameters.numel()
    job = Job(config, base, passes.choose(adapted), size, dataset, documents, (), device_type=kind)
    if available is None:
        available = machine.available_bytes(base_model.device_of(spec.device))
    return make(job, calibrate=False, available=available)


def apply(run: Pass, choice: Choice) -> None:
    """Set `run` up as chosen."""
    run.recomputed, run.offload = choice.recomputed_layers, choice.offload
    run.keep_dequantized(choice.dequantize_once)


def shrunk(run: Pass, choice: Choice, longest: int) -> Choice | None:
    """What to try after `choice` ran out of memory; None: nothing is left.

    Twice at most, so that each must help: first everything that leaves the sums as they are, every layer recomputed
    and no weights kept dequantised; then micro-batches as small as can be, and as many more of them.
    """
    if choice.recomputed_layers < run.layers or choice.dequantize_once:
        return replace(choice, recomputed_layers=run.layers, dequantize_once=False)
    if choice.micro_batch_tokens > longest:
        return replace(choice, micro_batch_tokens=longest)
    return None


def shrink(run: Pass, choice: Choice, longest: int, device: torch.device) -> Choice:
    """Set `run` up as `shrunk` says, and return that choice. Raises OutOfMemory where nothing is left to try."""
    smaller = shrunk(run, choice, longest)
    if smaller is None:
        raise OutOfMemory(
            f"a micro-batch of {choice.micro_batch_tokens} tokens did not fit, with every layer recomputed; "
            "lower sequence_length or the rank, or use nf4"
        )
    if device.type == "cuda":
        torch.cuda.empty_cache()
    apply(run, smaller)
    return smaller


def predicted_bytes(job: Job, choice: Choice, batch: Batch) -> int:
    """Bytes at the peak of a step whose largest micro-batch is `batch`, base model and adapter included."""
    base = job.base
    before = job.run.recomputed, job.run.offload
    job.run.recomputed, job.run.offload = choice.recomputed_layers, choice.offload
    needed = job.run.needed_bytes(batch)
    job.run.recomputed, job.run.offload = before
    dequantized = job.run.dequantized_bytes(keep=choice.dequantize_once)
    return base_bytes(base) + dequantized + _adapter_bytes(job) + _optimizer_bytes(job) + needed


def base_bytes(base: BaseModel) -> int:
    """Bytes of the loaded base model's tensors."""
    tensors = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _adapter_bytes(job: Job) -> int:
    """fp32 masters, gradients and the best masters so far, and copies in the compute dtype."""
    item = job.base.compute_dtype.itemsize
    return job.trainable * (8 + (item if item < 4 else 0) + 4 * job.keeps_best)


def _optimizer_bytes(job: Job) -> int:
    states = {"sgd": 4, "adamw_8bit": 2, "paged_adamw_8bit": 2}
    return job.trainable * states.get(job.config.optimizer, 8)


def _choices(job: Job) -> list[Choice]:
    """All of them, quickest first."""
    device, layers = job.kind, job.run.layers
    tokens = max(job.longest, _PREFERRED_TOKENS.get(device, 8192))
    sizes = [tokens]
    while tokens > job.longest:
        tokens = max(job.longest, tokens // 2)
        sizes.append(tokens)
    recomputed = sorted({layers * quarter // 4 for quarter in range(5)})
    kept = (True, False) if job.base.quantization != "none" else (False,)
    choices = [Choice(*choice, False, once) for choice in product(sizes, recomputed) for once in kept]
    if device == "cuda" and layers:
        choices += [Choice(job.longest, layers, True, False)]
    return sorted(choices, key=lambda choice: _slowness(choice, layers, _LEAST_ROWS.get(device, 512)))


def _slowness(choice: Choice, layers: int, least_rows: int) -> float:
    """Time a token, in no unit: what a small micro-batch, recomputation and dequantisation add."""
    rows = choice.micro_batch_tokens
    recompute = 0.5 * choice.recomputed_layers / layers if layers else 0.0
    dequantize = 0.0 if choice.dequantize_once else 2.0 * least_rows / rows
    return (1 + recompute + choice.offload) * (1 + least_rows / rows + dequantize)


def _calibrated(job: Job, choice: Choice, batch: Batch) -> tuple[float | None, int]:
    """(operations a second, bytes beyond what was reckoned) of one micro-batch; no rate where it did not fit.

    The first pass makes the products' plans and touches the memory, which a short one shows: it is made again.
    """
    device, run = job.base.device, job.run
    dropout = (job.config.seed, 0) if run.drops else None
    try:
        apply(run, choice)
        with run.sample():
            machine.forget_peak(device)
            before = machine.resident_bytes(device)
            seconds = 0.0
            for _ in range(2):
                started = time.perf_counter()
                run.gradients(batch, float(batch.trained_tokens), dropout)
                seconds = time.perf_counter() - started
                if seconds > _LONG_PASS:
                    break
            grown = machine.peak_bytes(device) - before
            # A heap that has been used before hides growth, so that less than was reckoned says nothing.
            surplus = max(0, grown - run.needed_bytes(batch))
            sampled = run.operations(batch) - run.head_operations(batch)
    except (RuntimeError, MemoryError) as error:
        if not machine.is_out_of_memory(error):
            raise
        return None, 0
    whole, head = run.operations(batch), run.head_operations(batch)
    return whole / (run.head_seconds + (seconds - run.head_seconds) * (whole - head) / sampled), surplus


def _predicted_seconds(job: Job, choice: Choice, rate: float | None) -> tuple[float | None, float | None]:
    """(of a mean step, of the whole job): from the micro-batches of the first steps."""
    if rate is None:
        return None, None
    size = job.config.global_batch
    order = data.epoch_order(job.dataset.digest, job.config.seed, 0, len(job.documents))
    starts = range(0, len(order), size)[:_SAMPLED_STEPS]
    steps = [[job.documents[number] for number in order[start : start + size]] for start in starts]
    run, tokens = job.run, choice.micro_batch_tokens
    step = sum(run.operations(batch) for documents in steps for batch in run.batches(documents, tokens))
    step_seconds = step / len(steps) / rate
    # A forward pass is about half of a step's operations.
    per_token = step_seconds / (sum(len(document) for documents in steps for document in documents) / len(steps))
    evaluations = 2 + (job.steps // job.config.eval_every if job.config.eval_every else 0)
    held_out = evaluations * sum(len(document) for document in job.held_out) * per_token / 2
    return step_seconds, job.steps * step_seconds + held_out


def _would_not_fit(job: Job, needed: int, available: int) -> WouldNotFit:
    advice = ["a shorter sequence_length"]
    if job.base.quantization == "none":
        advice.insert(0, "quantization nf4 or int8")
    if job.config.optimizer in ("adamw", "paged_adamw") and _optimizer_bytes(job) > needed // 20:
        saved = 6 * job.trainable
        advice.append(f"optimizer adamw_8bit (saves {saved / 1e9:.2f} GB), or a lower rank")
    return WouldNotFit(
        f"the job needs {needed / 1e9:.2f} GB for its longest example ({job.longest} tokens), there are "
        f"{available / 1e9:.2f} GB; what would help: {', '.join(advice)}",
        needed_bytes=needed,
        available_bytes=available,
    )
