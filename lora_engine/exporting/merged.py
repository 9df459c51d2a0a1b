"""A base model with the deltas of adapters in its weights, as safetensors files, in memory bounded by a few blocks.

Every tensor is read, changed and written in blocks of rows: W + Σ weight_i · scaling_i · B_i·A_i, all of it in fp32 and
rounded once. The sum is one product over the factors in the order of the adapters' digests, so that the order in which
they were named changes no bit. What the rounding costs is measured on the way.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_engine.adapter import LoraWeights
from lora_engine.errors import AdapterError
from lora_engine.exporting.deltas import Deltas, norm
from lora_engine.exporting.pipeline import Files, pipelined, write_all
from lora_engine.exporting.streamed import dequantized
from lora_engine.safetensors_file import Entry, layout

Tell = Callable[[int, int], None]

_BLOCK_BYTES = 8 << 20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_METADATA = {"format": "pt"}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of the result.

    Attributes:
        name: as it is stored.
        source, entry: where the base model has it.
        dtype: of the result, as safetensors spells it.
        module: whose delta is added; `transposed` where the weight lies in × out.
        quantization: the weight is quantised and dequantised first: "none", "nf4" or "int8".
    """

    name: str
    source: Path
    entry: Entry
    dtype: str
    module: str | None = None
    transposed: bool = False
    quantization: str = "none"

    @property
    def unchanged(self) -> bool:
        return self.module is None and self.quantization == "none" and self.dtype == self.entry.dtype


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


def shards(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """Consecutive pieces of at most `limit` bytes together; a larger tensor has a file of its own."""
    result: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        own = written_bytes(piece)
        if result[-1] and size + own > limit:
            result.append([])
            size = 0
        result[-1].append(piece)
        size += own
    return result


def written_bytes(piece: Piece) -> int:
    size = piece.entry.end - piece.entry.start
    if piece.dtype == piece.entry.dtype:
        return size
    return size // _DTYPES[piece.entry.dtype].itemsize * _DTYPES[piece.dtype].itemsize


def write(pieces: Sequence[Piece], deltas: Deltas, folder: Path, limit: int, tell: Tell) -> Rounding:
    """Write `model.safetensors`, or numbered files and their index, of at most `limit` bytes each.

    Args:
        tell: called with bytes written and in all; what it raises ends the export.

    Raises:
        AdapterError: a sum or a cast that leaves the range of its type.
        OSError: a file cannot be read or written.
    """
    parts = shards(pieces, limit)
    paths = [folder / name for name in _names(len(parts))]
    rounding = Rounding()
    total = sum(map(written_bytes, pieces))
    with Files() as files, _Writer() as writer:
        sums = _Sums(deltas, files, rounding)
        blocks = (block for path, part in zip(paths, parts, strict=True) for block in _blocks(path, part))
        pipelined(_told(blocks, total, tell), partial(_read, files), sums.compute, writer.write)
    if len(parts) > 1:
        weight_map = {piece.name: path.name for path, part in zip(paths, parts, strict=True) for piece in part}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return rounding


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows start … stop of a piece; `header` before the first block of a file."""

    path: Path
    piece: Piece
    start: int
    stop: int
    header: bytes | None


def _blocks(path: Path, pieces: Sequence[Piece]) -> Iterator[_Block]:
    by_name = {piece.name: piece for piece in pieces}
    header, entries = layout({name: (piece.dtype, piece.entry.shape) for name, piece in by_name.items()}, _METADATA)
    before: bytes | None = header
    for name in entries:
        piece = by_name[name]
        count, row_bytes = _rows(piece)
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        for start in range(0, max(count, 1), step):
            yield _Block(path, piece, start, min(start + step, count), before)
            before = None


def _told(blocks: Iterator[_Block], total: int, tell: Tell) -> Iterator[_Block]:
    """The blocks, telling in the caller's thread how many bytes are under way or written."""
    done = 0
    for block in blocks:
        yield block
        count, _ = _rows(block.piece)
        done += written_bytes(block.piece) * (block.stop - block.start) // max(count, 1)
        tell(min(done, total), total)


def _rows(piece: Piece) -> tuple[int, int]:
    """How many rows of how many bytes the base model's tensor has; one, where it has no axis."""
    count = piece.entry.shape[0] if piece.entry.shape else 1
    return count, (piece.entry.end - piece.entry.start) // max(count, 1)


def _read(files: Files, block: _Block) -> Tensor:
    """The block's bytes; none where the whole tensor has to be known first."""
    if block.piece.quantization != "none":
        return torch.empty(0, dtype=torch.uint8)
    _, row_bytes = _rows(block.piece)
    start = block.piece.entry.start
    return files.read(block.piece.source, start + block.start * row_bytes, start + block.stop * row_bytes)


class _Sums:
    """What is written for each block, and what its rounding costs."""

    def __init__(self, deltas: Deltas, files: Files, rounding: Rounding) -> None:
        self._deltas, self._files, self._rounding = deltas, files, rounding
        self._piece: Piece | None = None
        self._factors: LoraWeights | None = None
        self._dequantized: Tensor | None = None

    def compute(self, block: _Block, data: Tensor) -> Tensor:
        """The rows in the type that is written, from the stored bytes."""
        piece = block.piece
        if piece.unchanged:
            return data
        self._turn_to(piece)
        if self._dequantized is not None:
            weight = self._dequantized[block.start : block.stop]
        else:
            weight = _matrix(data, piece, block.stop - block.start).float()
        delta = self._delta(block)
        result = (weight if delta is None else weight + delta).to(_DTYPES[piece.dtype])
        if not bool(torch.isfinite(result).all()):
            raise AdapterError(f"{piece.name}: values beyond what {piece.dtype} holds; export it as fp32 or bf16")
        if delta is not None and piece.module is not None:
            self._rounding.errors[piece.module] += _squared_error(result, weight, delta)
        return result

    def _turn_to(self, piece: Piece) -> None:
        if piece is self._piece:
            return
        self._piece, self._factors, self._dequantized = piece, None, None
        if piece.module is not None:
            self._factors = self._deltas.factors(piece.module)
            self._rounding.deltas[piece.module] = norm(self._factors) ** 2
            self._rounding.errors[piece.module] = 0.0
        if piece.quantization != "none":
            self._dequantized = dequantized(partial(self._whole, piece), piece.quantization)
            if piece.transposed:
                self._dequantized = self._dequantized.t().contiguous()

    def _whole(self, piece: Piece) -> Tensor:
        """The stored weight, out × in."""
        data = self._files.read(piece.source, piece.entry.start, piece.entry.end)
        weight = _matrix(data, piece, _rows(piece)[0])
        return weight.t().contiguous() if piece.transposed else weight

    def _delta(self, block: _Block) -> Tensor | None:
        if self._factors is None:
            return None
        A, B = self._factors.A, self._factors.B
        left, right = (A.t(), B.t()) if block.piece.transposed else (B, A)
        return left[block.start : block.stop] @ right


def _matrix(data: Tensor, piece: Piece, rows: int) -> Tensor:
    return data.view(_DTYPES[piece.entry.dtype]).view(rows, -1)


def _squared_error(result: Tensor, weight: Tensor, delta: Tensor) -> float:
    """‖result - (weight + delta)‖², without an error of its own: what fp32 loses in the sum is found again (Knuth)."""
    total = weight + delta
    taken = total - weight
    lost = (weight - (total - taken)) + (delta - taken)
    error = (result.float() - total) - lost
    return float((error * error).sum(dtype=torch.float64))


class _Writer:
    """Writes blocks to one file after the other."""

    def __init__(self) -> None:
        self._file: Any = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def write(self, block: _Block, data: Tensor) -> None:
        if block.header is not None:
            self._close()
            self._file = block.path.open("wb", buffering=0)
            self._file.write(block.header)
        write_all(self._file, data)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
