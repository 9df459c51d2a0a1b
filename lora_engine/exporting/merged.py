"""A base model with the deltas of adapters in its weights, as safetensors files, in memory bounded by a few blocks."""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_engine.exporting import sums
from lora_engine.exporting.deltas import Deltas
from lora_engine.exporting.pipeline import Output
from lora_engine.exporting.sums import DTYPES, Block, Piece, Rounding
from lora_engine.safetensors_file import layout

_METADATA = {"format": "pt"}
INDEX = "model.safetensors.index.json"


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
    return size // DTYPES[piece.entry.dtype].itemsize * DTYPES[piece.dtype].itemsize


def write(pieces: Sequence[Piece], deltas: Deltas, folder: Path, limit: int, tell: Callable[[int], None]) -> Rounding:
    """Write `model.safetensors`, or numbered files and their index, of at most `limit` bytes each.

    Args:
        tell: called in this thread with the bytes of each block; what it raises ends the export.

    Raises:
        AdapterError: a sum or a cast that leaves the range of its type.
        OSError: a file cannot be read or written.
    """
    parts = shards(pieces, limit)
    files_of = dict(zip([folder / name for name in _names(len(parts))], parts, strict=True))
    with _Writer(files_of) as writer:

        def told(block: Block) -> None:
            tell(written_bytes(block.piece) * (block.stop - block.start) // max(block.piece.count, 1))

        rounding = sums.stream(writer.order, deltas, writer, told)
    if len(parts) > 1:
        weight_map = {piece.name: path.name for path, part in files_of.items() for piece in part}
        index = {
            "metadata": {"total_size": sum(map(written_bytes, pieces))},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return rounding


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


class _Writer:
    """Knows the place of every block. A file is made with its first block, and closed when all of it was written.

    Attributes:
        order: all pieces in the order of their places.
    """

    def __init__(self, files: dict[Path, list[Piece]]) -> None:
        self.order: list[Piece] = []
        self._places: dict[str, tuple[Path, int]] = {}  # piece → file and its first byte there
        self._headers: dict[Path, bytes] = {}
        self._left: dict[Path, int] = {}  # bytes to be written
        self._outputs: dict[Path, Output] = {}
        self._lock = threading.Lock()
        for path, pieces in files.items():
            by_name = {piece.name: piece for piece in pieces}
            tensors = {piece.name: (piece.dtype, piece.entry.shape) for piece in pieces}
            self._headers[path], entries = layout(tensors, _METADATA)
            self.order += [by_name[name] for name in entries]
            self._places |= {name: (path, entry.start) for name, entry in entries.items()}
            self._left[path] = sum(map(written_bytes, pieces))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        for output in self._outputs.values():
            output.close()

    def place(self, block: Block) -> int:
        row = written_bytes(block.piece) // max(block.piece.count, 1)
        return self._places[block.piece.name][1] + block.start * row

    def write(self, block: Block, data: Tensor) -> None:
        path, _ = self._places[block.piece.name]
        self._output(path).write(data, self.place(block))
        with self._lock:
            self._left[path] -= data.nbytes
            finished = self._outputs.pop(path, None) if not self._left[path] else None
        if finished is not None:
            finished.close()

    def _output(self, path: Path) -> Output:
        with self._lock:
            if path not in self._outputs:
                header = self._headers[path]
                self._outputs[path] = Output(path, len(header) + self._left[path])
                self._outputs[path].write(torch.frombuffer(bytearray(header), dtype=torch.uint8), 0)
            return self._outputs[path]
