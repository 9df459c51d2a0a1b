"""What a training job will do and need, decided before its first step.

The global batch is never changed to save memory: only how many tokens pass through the model at once, and whether the
dequantised weights of an NF4 base are kept. The result of training does not depend on either.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lora_engine.base_model import BaseModel, Module
from lora_engine.config import TrainingConfig
from lora_engine.data import Dataset, Document
from lora_engine.errors import WouldNotFit

# Beyond so many tokens a micro-batch fills the device's arithmetic units and only costs memory.
_PREFERRED_TOKENS = {"cpu": 1024, "cuda": 8192}
# fp32 master, gradient and AdamW's two moments.
_STATE_BYTES = 16
# Activations kept for backward, per byte of the linear layers' outputs: norms, residuals and attention come on top.
_ACTIVATION_FACTOR = 1.3
_RESERVE = 0.9
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2; inside a container it is the container's own


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
        micro_batch_tokens: most tokens, with padding, in one pass through the model.
        dequantize_once: the dequantised weights of an NF4 base are kept.
        predicted_peak_bytes: of memory on the device, base model included.
        available_bytes: of memory on the device for this job, base model included.
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
    micro_batch_tokens: int
    dequantize_once: bool
    predicted_peak_bytes: int
    available_bytes: int


def make(
    config: TrainingConfig,
    base: BaseModel,
    modules: Sequence[Module],
    trainable_parameters: int,
    dataset: Dataset,
    training: Sequence[Document],
    validation: Sequence[Document],
) -> Plan:
    """Plan a job on a loaded base; `modules` are all its linear layers.

    Raises:
        WouldNotFit: the longest document alone needs more memory than there is.
    """
    longest = max(len(document) for document in (*training, *validation))
    per_epoch = -(-len(training) // config.global_batch)
    resident = base_bytes(base)
    available = resident + available_bytes(base.device)
    share = max(document.trained_tokens / len(document) for document in (*training, *validation))
    needed = 0
    for dequantize_once, tokens in _choices(base, longest):
        needed = resident + predicted_bytes(base, modules, trainable_parameters, tokens, share, dequantize_once)
        if needed <= resident + _RESERVE * (available - resident):
            break
    else:
        raise WouldNotFit(
            f"the job needs {needed / 1e9:.2f} GB for its longest example ({longest} tokens), there are "
            f"{available / 1e9:.2f} GB; lower sequence_length or the rank, or use quantization nf4",
            needed_bytes=needed,
            available_bytes=available,
        )
    return Plan(
        examples=len(training),
        validation_examples=len(validation),
        truncated=dataset.truncated,
        dropped=dataset.dropped,
        tokens=sum(len(document) for document in training),
        trained_tokens=sum(document.trained_tokens for document in training),
        longest=longest,
        steps=config.max_steps or config.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        trainable_parameters=trainable_parameters,
        micro_batch_tokens=tokens,
        dequantize_once=dequantize_once,
        predicted_peak_bytes=needed,
        available_bytes=available,
    )


def predicted_bytes(
    base: BaseModel, modules: Sequence[Module], trainable: int, tokens: int, target_share: float, dequantize_once: bool
) -> int:
    """Bytes a job takes beside the base model, with `tokens` in a micro-batch, `target_share` of them targets."""
    item = base.compute_dtype.itemsize
    trunk = [module for module in modules if not module.head]
    state = trainable * (_STATE_BYTES + (item if item < 4 else 0))
    activations = _ACTIVATION_FACTOR * tokens * item * sum(module.outputs for module in trunk)
    # Logits in the compute dtype, in fp32, and their gradients in both.
    vocabulary = sum(module.outputs for module in modules if module.head)
    logits = tokens * target_share * vocabulary * 2 * (item + 4)
    weights = item * sum(module.inputs * module.outputs for module in trunk) if dequantize_once else 0
    return int(state + activations + logits + weights)


def base_bytes(base: BaseModel) -> int:
    """Bytes of the loaded base model's tensors."""
    tensors = {id(tensor): tensor for tensor in (*base.model.parameters(), *base.model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def available_bytes(device: torch.device) -> int:
    """Bytes of memory that are free on `device` now, within the container's limit where there is one."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = _table(_MEMINFO)
    if "MemAvailable:" not in meminfo:  # not Linux: all there is, as what is free is not told
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = meminfo["MemAvailable:"] * 1024
    limit = _CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text(encoding="ascii").strip()) != "max":
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        reclaimable = _table(_CGROUP / "memory.stat").get("inactive_file", 0)
        available = min(available, max(0, int(text) - used + reclaimable))
    return available


def _table(path: Path) -> dict[str, int]:
    """Lines of a name and a number, as the kernel writes them; empty where there is no such file."""
    if not path.exists():
        return {}
    rows = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1}


def _choices(base: BaseModel, longest: int) -> Iterator[tuple[bool, int]]:
    """(dequantise once, tokens in a micro-batch), best first."""
    preferred = max(longest, _PREFERRED_TOKENS.get(base.device.type, 1024))
    for once in (True, False) if base.quantization == "nf4" else (False,):
        tokens = preferred
        while tokens > longest:
            yield once, tokens
            tokens //= 2
        yield once, longest
