"""A base model with the deltas of adapters in its weights, as safetensors files, in memory bounded by a few blocks."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from lora_engine.exporting import sums
from lora_engine.exporting.deltas import Deltas
from lora_engine.exporting.pipeline import Files, Output, pipelined
from lora_engine.exporting.sums import DTYPES, Block, Piece, Rounding, Sums, Tell
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


def write(pieces: Sequence[Piece], deltas: Deltas, folder: Path, limit: int, tell: Tell) -> Rounding:
    """Write `model.safetensors`, or numbered files and their index, of at most `limit` bytes each.

    Args:
        tell: called in this thread with the bytes of each block; what it raises ends the export.

    Raises:
        AdapterError: a sum or a cast that leaves the range of its type.
        OSError: a file cannot be read or written.
    """
    parts = shards(pieces, limit)
    files_of = dict(zip([folder / name for name in _names(len(parts))], parts, strict=True))
    with Files() as files, _Writer(files_of) as writer:
        computed = Sums(deltas, files, _encode)
        found = sums.told(writer.blocks(), written_bytes, tell)
        pipelined(found, partial(sums.read, files), computed.compute, writer.write)
    if len(parts) > 1:
        weight_map = {piece.name: path.name for path, part in files_of.items() for piece in part}
        index = {
            "metadata": {"total_size": sum(map(written_bytes, pieces))},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return computed.rounding


def _names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def _encode(piece: Piece, exact: Tensor) -> tuple[Tensor, Tensor]:
    written = exact.to(DTYPES[piece.dtype])
    return written, written.float()


class _Writer:
    """Writes the blocks of one file after the other, each file beginning with its header."""

    def __init__(self, files: dict[Path, list[Piece]]) -> None:
        self._headers: dict[str, tuple[Path, bytes]] = {}  # of the file that begins with this piece
        self._order: list[Piece] = []
        for path, pieces in files.items():
            by_name = {piece.name: piece for piece in pieces}
            tensors = {piece.name: (piece.dtype, piece.entry.shape) for piece in pieces}
            header, entries = layout(tensors, _METADATA)
            self._headers[next(iter(entries))] = path, header
            self._order += [by_name[name] for name in entries]
        self._file: Output | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def blocks(self) -> Iterator[Block]:
        """In the order in which `write` takes them."""
        return (block for piece in self._order for block in sums.blocks(piece))

    def write(self, block: Block, data: Tensor) -> None:
        if block.start == 0 and block.piece.name in self._headers:
            self._close()
            path, header = self._headers[block.piece.name]
            path.write_bytes(header)
            self._file = Output(path, append=True)
        if self._file is not None:
            self._file.write(data)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
