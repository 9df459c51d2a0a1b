"""Weights of a base model plus the deltas of adapters, block by block of rows, in fp32 and rounded once.

    written = encode(W + Σ weight_i · scaling_i · B_i·A_i)

The sum is one product over the factors in the order of the adapters' digests, so that the order in which they were
named changes no bit. What the rounding costs is measured on the way, against the norm of the delta. Where there are
kernels and nothing is encoded but a cast, product, sum, rounding and measuring are one pass in the block's own memory.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lora_engine import kernels, nf4
from lora_engine.errors import AdapterError
from lora_engine.exporting.deltas import Delta, Deltas, FactoredDelta
from lora_engine.exporting.pipeline import Buffers, Files, spread
from lora_engine.exporting.streamed import dequantized
from lora_engine.safetensors_file import Entry

Tell = Callable[[int], None]  # with the bytes that were done since the last call

BLOCK_BYTES = 8 << 20
_WAITING = 2  # threads beside those that compute, which wait for the disk
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


# (piece, fp32 rows) → (what is written, what a reader makes of it in fp32)
Encode = Callable[[Piece, Tensor], tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Rounding:
    """Squared norms by module: of the delta, and of what rounding the sum has changed."""

    deltas: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, module: str, delta: float, error: float) -> None:
        self.deltas[module] = self.deltas.get(module, 0.0) + delta
        self.errors[module] = self.errors.get(module, 0.0) + error

    def relative(self) -> dict[str, float]:
        """‖rounding‖ / ‖D‖ by module."""
        return {name: sqrt(error / self.deltas[name]) for name, error in self.errors.items() if self.deltas[name]}

    def total(self) -> float:
        """‖rounding‖ / ‖D‖ over all modules."""
        deltas = sum(self.deltas.values())
        return sqrt(sum(self.errors.values()) / deltas) if deltas else 0.0


class _Terms:
    """What all blocks of a piece are computed from, read by the first thread that asks for it."""

    def __init__(self, piece: Piece, deltas: Deltas, files: Files) -> None:
        self._piece, self._deltas, self._files = piece, deltas, files
        self._lock = threading.Lock()
        self._read = False
        self.delta: Delta | None = None
        self.norm: float | None = 0.0  # squared, of the delta; None: found as its rows are computed
        self.dequantized: Tensor | None = None
        self.factors: tuple[Tensor, Tensor] | None = None  # rows × rank and panels, where a kernel multiplies them

    def ready(self, *, fused: bool) -> "_Terms":
        """All of it; `fused`: for a kernel, where there is one for this piece.

        Raises:
            AdapterError: values that are not finite.
        """
        with self._lock:
            if not self._read:
                self._load()
                if fused and self._served():
                    self.factors = self._factors()
                self._read = True
        return self

    def _load(self) -> None:
        piece = self._piece
        if piece.module is not None:
            self.delta = self._deltas.delta(piece.module)
            self.norm = self.delta.squared_norm()
        if piece.quantization != "none":
            self.dequantized = dequantized(self._whole, piece.quantization)
            if piece.transposed:
                self.dequantized = self.dequantized.t().contiguous()

    def _served(self) -> bool:
        stored = DTYPES[self._piece.entry.dtype] if self.dequantized is None else torch.float32
        factored = self.delta is None or isinstance(self.delta, FactoredDelta)
        return factored and kernels.adds(stored, DTYPES[self._piece.dtype])

    def _factors(self) -> tuple[Tensor, Tensor]:
        if not isinstance(self.delta, FactoredDelta):
            width = prod(self._piece.entry.shape[1:])
            return torch.zeros(self._piece.count, 0), kernels.panels(torch.zeros(0, width))
        left, right = self.delta.sides(transposed=self._piece.transposed)
        return left.contiguous(), kernels.panels(right)

    def _whole(self) -> Tensor:
        """The stored weight, out × in."""
        piece = self._piece
        weight = _matrix(self._files.read(piece.source, piece.entry.start, piece.entry.end), piece, piece.count)
        return weight.t().contiguous() if piece.transposed else weight


@dataclass(frozen=True, slots=True)
class Block:
    """Rows start … stop of a piece."""

    piece: Piece
    start: int
    stop: int
    terms: _Terms


class Target(Protocol):
    """Where blocks are written."""

    def place(self, block: Block) -> int:
        """Of the block's first byte in its file."""
        raise NotImplementedError

    def write(self, block: Block, data: Tensor) -> None:
        """Called in any thread, with memory that is valid meanwhile."""


def stream(
    pieces: Iterable[Piece], deltas: Deltas, target: Target, tell: Callable[[Block], None], encode: Encode | None = None
) -> Rounding:  # fmt: skip
    """Read every block, compute what is written, and have it written, in as many threads as keep the disk busy.

    Args:
        tell: called in this thread with each block that was written, in order; what it raises ends it.
        encode: how sums are written; a cast to the piece's type when left out.

    Raises:
        AdapterError: a value that leaves the range of its type.
        OSError: a file cannot be read or written.
    """
    rounding = Rounding()

    def done(block: Block, squares: tuple[float, float]) -> None:
        if block.piece.module is not None:
            rounding.add(block.piece.module, *squares)
        tell(block)

    with Files() as files:
        sums = _Sums(files, target, encode)
        spread(blocks(pieces, deltas, files), sums.put, done, torch.get_num_threads() + _WAITING)
    return rounding


def blocks(pieces: Iterable[Piece], deltas: Deltas, files: Files) -> Iterator[Block]:
    """All of them, whole attention heads together."""
    for piece in pieces:
        terms = _Terms(piece, deltas, files)
        step = _whole_heads(piece, BLOCK_BYTES // max(piece.row_bytes, 1))
        for start in range(0, max(piece.count, 1), step):
            yield Block(piece, start, min(start + step, piece.count), terms)


class _Sums:
    """What is written for each block."""

    def __init__(self, files: Files, target: Target, encode: Encode | None) -> None:
        self._files, self._target = files, target
        self._fused, self._encode = encode is None, encode or _cast
        self._buffers = Buffers()
        # A kernel's call keeps one core busy, PyTorch's operations all of them.
        self._cores = threading.Semaphore(torch.get_num_threads())
        self._all_cores = threading.Lock()

    def put(self, block: Block) -> tuple[float, float]:
        """Squared norms of the delta's rows (all of them with the first block, where they are known) and of what
        rounding has changed."""
        piece, data = block.piece, torch.empty(0, dtype=torch.uint8)
        if piece.quantization == "none":  # else the whole tensor has to be known first
            begin, end = (piece.entry.start + row * piece.row_bytes for row in (block.start, block.stop))
            data = self._files.read(piece.source, begin, end, self._buffers.get("stored", end - begin, begin))
        if piece.unchanged:
            self._target.write(block, self._buffers.get("written", len(data), self._target.place(block)).copy_(data))
            return 0.0, 0.0
        terms = block.terms.ready(fused=self._fused)
        if terms.factors is None:
            with self._all_cores:
                written, delta, error = self._computed(block, data)
        else:
            with self._cores:
                written, error = self._in_one_pass(block, data, *terms.factors)
            delta = 0.0
        if not isfinite(error):
            raise AdapterError(f"{piece.name}: values beyond what {piece.dtype} holds; export it as fp32 or bf16")
        self._target.write(block, written)
        return delta + (terms.norm or 0.0) * (block.start == 0), error

    def _in_one_pass(self, block: Block, data: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, float]:
        weight, dtype = _weight(block, data), DTYPES[block.piece.dtype]
        memory = self._buffers.get("written", weight.numel() * dtype.itemsize, self._target.place(block))
        result = memory.view(dtype).view(weight.shape)
        return result, kernels.add_product(weight, left[block.start : block.stop], right, result)

    def _computed(self, block: Block, data: Tensor) -> tuple[Tensor, float, float]:
        """By PyTorch's operations; what is written, and the squared norms of delta and error."""
        weight, found = _weight(block, data), []
        for start, stop in _parts(block):
            rows = weight[start - block.start : stop - block.start].float()
            found.append(_part(block, rows, start, stop, self._encode))
        written, deltas, errors = zip(*found, strict=True)
        return torch.cat(written) if len(written) > 1 else written[0], sum(deltas), sum(errors)


def _weight(block: Block, data: Tensor) -> Tensor:
    """Rows of the block, as they are stored or dequantised."""
    if block.terms.dequantized is not None:
        return block.terms.dequantized[block.start : block.stop]
    return _matrix(data, block.piece, block.stop - block.start)


def _part(block: Block, weight: Tensor, start: int, stop: int, encode: Encode) -> tuple[Tensor, float, float]:
    """Rows start … stop, few enough for what is computed on the way to stay in the processor's cache."""
    piece, terms = block.piece, block.terms
    norm, lost, total = 0.0, None, weight
    if terms.delta is not None and terms.norm is not None and piece.dtype != "F32":
        total = terms.delta.add_to(weight, start, stop, transposed=piece.transposed)
    elif terms.delta is not None:
        delta = terms.delta.part(start, stop, transposed=piece.transposed)
        norm = _squared(delta) if terms.norm is None else 0.0
        total = weight + delta
        lost = _lost(weight, delta) if piece.dtype == "F32" else None
    written, decoded = encode(piece, total)
    return written, norm, _squared(decoded - total if lost is None else lost)


def _cast(piece: Piece, exact: Tensor) -> tuple[Tensor, Tensor]:
    written = exact.to(DTYPES[piece.dtype])
    return written, written.float()


def _squared(values: Tensor) -> float:
    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


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
