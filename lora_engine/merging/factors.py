"""The factors of a module's sources side by side: Σ weight_i · scaling_i · B_i·A_i = B · diag(scale) · A.

The scale stays apart in fp64, so that whoever rounds does it once. No torch.
"""

from dataclasses import dataclass

import numpy as np

from lora_engine.adapter_folder import load_module
from lora_engine.errors import AdapterError
from lora_engine.merging.arrays import Array, Wide
from lora_engine.merging.sources import ModulePlan, Part

_LARGEST = 1e15


@dataclass(frozen=True, slots=True)
class Factors:
    """A delta B · diag(scale) · A: B (outputs × R) and A (R × inputs), fp32 as files have them or fp64 as computed.

    `blocks` says which columns of B and rows of A are those of each source, in the order of the plan.
    """

    B: Wide | Array
    A: Wide | Array
    scale: Wide
    blocks: tuple[slice, ...] = ()


def load(module: str, plan: ModulePlan, *, weighted: bool = True) -> Factors:
    """The factors of one module; without `weighted` the scale leaves out the weights.

    Raises:
        AdapterError: a value that is not finite or absurdly large, or a file that has become shorter meanwhile.
    """
    B = np.zeros((plan.outputs, plan.rank), np.float32)
    A = np.zeros((plan.rank, plan.inputs), np.float32)
    scale = np.empty(plan.rank)
    blocks = []
    start = 0
    for part in plan.parts:
        block = slice(start, start + part.rank)
        try:
            A[block], B[:, block] = load_module(part.header, module)
        except AdapterError as error:
            raise AdapterError(f"{part.header.folder.name}: {error.message}") from None
        scale[block] = part.scaling * (part.weight if weighted else 1.0)
        _check_size(part, module, A[block], B[:, block])
        blocks.append(block)
        start = block.stop
    return Factors(B, A, scale, tuple(blocks))


def _check_size(part: Part, module: str, A: Array, B: Array) -> None:
    """Squares of the delta's entries have to stay within fp32."""
    sizes = [float(np.abs(item).max(initial=0)) for item in (A, B)]
    factor = abs(part.scaling) * max(1.0, abs(part.weight))
    if not sizes[0] * sizes[1] * part.rank * factor <= _LARGEST or not max(factor, *sizes) <= _LARGEST:
        raise AdapterError(
            f"{part.header.folder.name}: {module}: factors up to {max(sizes):.2g} and a scaling of {part.scaling:.2g} "
            "are too large to compute with; no trained adapter has such numbers"
        )


def changing(factors: Factors, parts: tuple[Part, ...]) -> tuple[Factors, tuple[Part, ...]]:
    """Without the parts that are zero here, as where an adapter has a module only because its loaders want it."""
    kept = [index for index, block in enumerate(factors.blocks) if factors.B[:, block].any() and factors.A[block].any()]
    sizes = [parts[index].rank for index in kept]
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    columns = np.zeros(factors.scale.size, dtype=bool)
    for index in kept:
        columns[factors.blocks[index]] = True
    blocks = tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))
    left = Factors(factors.B[:, columns], factors.A[columns], factors.scale[columns], blocks)
    return left, tuple(parts[index] for index in kept)
