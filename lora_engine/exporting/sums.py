"""Weights of a base model plus the deltas of adapters, block by block of rows, in fp32 and rounded once.

    written = encode(W + Σ weight_i · scaling_i · B_i·A_i)

The sum is one product over the factors in the order of the adapters' digests, so that the order in which they were
named changes no bit. What the rounding costs is measured on the way, against the norm of the delta.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import isfinite, prod, sqrt
from pathlib import Path

import torch
from torch import Tensor

from lora_engine import nf4
from lora_engine.errors import AdapterError
from lora_engine.exporting.deltas import Delta, Deltas
from lora_engine.exporting.pipeline import Files
from lora_engine.exporting.streamed import dequantized
from lora_engine.safetensors_file import Entry

Tell = Callable[[int], None]  # with the bytes that were done since the last call

BLOCK_BYTES = 8 << 20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the result.

    Attributes:
        name: as it is written.
        source, entry: where the base model has it.
        dtype: of the result, as its format spells it.
        module: whose delta is added; `transposed` where the weight lies in × out.
        quantization: the weight is quantised and dequantised first: "none", "nf4" or "int8".
        heads: where set, the rows belong to so many attention heads, and the encoder reorders those of each.
    """

    name: str
    source: Path
    entry: Entry
    dtype: str
    module: str | None = None
    transposed: bool = False
    quantization: str = "none"
    heads: int = 0

    @property
    def unchanged(self) -> bool:
        """Whether the stored bytes are what is written."""
        return self.module is None and self.quantization == "none" and self.dtype == self.entry.dtype and not self.heads

    @property
    def count(self) -> int:
        """Of rows; one, where the tensor has no axis."""
        return self.entry.shape[0] if self.entry.shape else 1

    @property
    def row_bytes(self) -> int:
        """As the base model has them."""
        return (self.entry.end - self.entry.start) // max(self.count, 1)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows start … stop of a piece."""

    piece: Piece
    start: int
    stop: int


# (piece, fp32 rows) → (what is written, what a reader makes of it in fp32)
Encode = Callable[[Piece, Tensor], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Rounding:
    """Squared norms by module: of the delta, and of what rounding the sum has changed."""

    deltas: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def relative(self) -> dict[str, float]:
        """‖rounding‖ / ‖D‖ by module."""
        return {name: sqrt(error / self.deltas[name]) for name, error in self.errors.items() if self.deltas[name]}

    def total(self) -> float:
        """‖rounding‖ / ‖D‖ over all modules."""
        deltas = sum(self.deltas.values())
        return sqrt(sum(self.errors.values()) / deltas) if deltas else 0.0


def blocks(piece: Piece) -> Iterator[Block]:
    """All of a piece, whole attention heads together."""
    step = _whole_heads(piece, BLOCK_BYTES // max(piece.row_bytes, 1))
    for start in range(0, max(piece.count, 1), step):
        yield Block(piece, start, min(start + step, piece.count))


def read(files: Files, block: Block) -> Tensor:
    """The block's stored bytes; none where the whole tensor has to be known first."""
    piece = block.piece
    if piece.quantization != "none":
        return torch.empty(0, dtype=torch.uint8)
    begin = piece.entry.start
    return files.read(piece.source, begin + block.start * piece.row_bytes, begin + block.stop * piece.row_bytes)


class Sums:
    """What is written for each block, and what its rounding costs."""

    def __init__(self, deltas: Deltas, files: Files, encode: Encode) -> None:
        self.rounding = Rounding()
        self._deltas, self._files, self._encode = deltas, files, encode
        self._piece: Piece | None = None
        self._delta: Delta | None = None
        self._measured = False  # whether the delta's norm is found as its rows are computed
        self._dequantized: Tensor | None = None

    def compute(self, block: Block, data: Tensor) -> Tensor:
        """What is written, from the stored bytes.

        Raises:
            AdapterError: a value that leaves the range of its type.
        """
        if block.piece.unchanged:
            return data
        self._turn_to(block.piece)
        written = [self._part(block, data, start, stop) for start, stop in _parts(block)]
        return torch.cat(written) if len(written) > 1 else written[0]

    def _part(self, block: Block, data: Tensor, start: int, stop: int) -> Tensor:
        """Rows start … stop, few enough for what is computed on the way to stay in the processor's cache."""
        piece = block.piece
        if self._dequantized is not None:
            weight = self._dequantized[start:stop]
        else:
            weight = _matrix(data, piece, block.stop - block.start)[start - block.start : stop - block.start].float()
        total, lost = self._sum(piece, weight, start, stop)
        written, decoded = self._encode(piece, total)
        error = decoded - total if lost is None else lost
        squared = float(torch.dot(error.view(-1), error.view(-1)))
        if not isfinite(squared):
            raise AdapterError(f"{piece.name}: values beyond what {piece.dtype} holds; export it as fp32 or bf16")
        if piece.module is not None:
            self.rounding.errors[piece.module] += squared
        return written

    def _sum(self, piece: Piece, weight: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Weight + delta in fp32; and what is lost by that, where nothing else is lost after it."""
        if self._delta is None or piece.module is None:
            return weight, None
        if not self._measured and piece.dtype != "F32":
            return self._delta.add_to(weight, start, stop, transposed=piece.transposed), None
        delta = self._delta.part(start, stop, transposed=piece.transposed)
        if self._measured:
            self.rounding.deltas[piece.module] += float(torch.dot(delta.reshape(-1), delta.reshape(-1)))
        return weight + delta, _lost(weight, delta) if piece.dtype == "F32" else None

    def _turn_to(self, piece: Piece) -> None:
        if piece is self._piece:
            return
        self._piece, self._delta, self._dequantized = piece, None, None
        if piece.module is not None:
            self._delta = self._deltas.delta(piece.module)
            norm = self._delta.squared_norm()
            self._measured = norm is None
            self.rounding.deltas[piece.module] = norm or 0.0
            self.rounding.errors[piece.module] = 0.0
        if piece.quantization != "none":
            self._dequantized = dequantized(partial(self._whole, piece), piece.quantization)
            if piece.transposed:
                self._dequantized = self._dequantized.t().contiguous()

    def _whole(self, piece: Piece) -> Tensor:
        """The stored weight, out × in."""
        weight = _matrix(self._files.read(piece.source, piece.entry.start, piece.entry.end), piece, piece.count)
        return weight.t().contiguous() if piece.transposed else weight


def told(found: Iterator[Block], size: Callable[[Piece], int], tell: Tell) -> Iterator[Block]:
    """The blocks; `tell` is called in the caller's thread with how many bytes of the result each one is."""
    for block in found:
        yield block
        tell(size(block.piece) * (block.stop - block.start) // max(block.piece.count, 1))


def _matrix(data: Tensor, piece: Piece, rows: int) -> Tensor:
    return data.view(DTYPES[piece.entry.dtype]).view(rows, -1)


def _parts(block: Block) -> Iterator[tuple[int, int]]:
    """Rows of the block to work on at a time, whole attention heads together."""
    width = max(1, prod(block.piece.entry.shape[1:]))
    step = _whole_heads(block.piece, nf4.chunk_size(torch.device("cpu")) // width)
    for start in range(block.start, max(block.stop, block.start + 1), step):
        yield start, min(start + step, block.stop)


def _whole_heads(piece: Piece, rows: int) -> int:
    """The next smaller number of rows that tears no attention head, and at least one."""
    size = piece.count // piece.heads if piece.heads else 1
    return max(1, rows // size) * size


def _lost(weight: Tensor, delta: Tensor) -> Tensor:
    """(weight + delta) - fp32(weight + delta), exactly (Knuth's two-sum)."""
    total = weight + delta
    taken = total - weight
    return (weight - (total - taken)).add_(delta - taken)
