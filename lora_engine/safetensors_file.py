"""safetensors files without torch: headers under limits of our own, tensors as numpy arrays, and a writer.

    8 bytes     length n of the header, little-endian
    n bytes     JSON: name → {"dtype", "shape", "data_offsets": [start, end] within what follows}, "__metadata__"
    the rest    the tensors, one after the other, without holes

Nothing in a header is believed: lengths, names, shapes and offsets are checked against each other and the file's size
before memory is asked for. The writer makes the same bytes as the safetensors package (0.8) does of the same tensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lora_engine import strict_json
from lora_engine.errors import AdapterError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float32]"

MAX_HEADER_BYTES = 16_000_000
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 512
_MAX_DIMENSIONS = 8
_LENGTH_BYTES = 8
_ALIGNMENT = 8
# Lists, objects and numbers take many times the memory of their text: what no header has is not parsed.
_MOST = ((b"[", 2 * MAX_TENSORS + 100), (b"{", MAX_TENSORS + 100), (b",", (_MAX_DIMENSIONS + 4) * MAX_TENSORS + 100))
# Bits of one element. The order is the format's: the package writes the last kinds first, and equal kinds by name.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64,
    "U64": 64,
}  # fmt: skip
_RANKS = {dtype: rank for rank, dtype in enumerate(_BITS)}
FLOATS = ("F32", "F16", "BF16")  # what fp32 holds exactly


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its type as the format spells it ("F32", "BF16" …), and the bytes [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name, in the order of its header.

    Raises:
        AdapterError: the file cannot be read, or as `header_of` does.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH_BYTES)
            return header_of(start + file.read(data_offset(start, size) - len(start)), size)
    except OSError as error:
        raise AdapterError(f"{path.name}: {error.strerror or error}") from None
    except AdapterError as error:
        raise AdapterError(f"{path.name}: {error.message}") from None


def data_offset(first_bytes: bytes, file_size: int) -> int:
    """How many bytes length and header take, told by the first eight: so many must be read for `header_of`.

    Raises:
        AdapterError: there are fewer than eight bytes, or the length is beyond the file or the limit.
    """
    if len(first_bytes) < _LENGTH_BYTES:
        raise AdapterError(f"the file has {file_size} bytes, too few for a safetensors header")
    length = int.from_bytes(first_bytes[:_LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise AdapterError(
            f"the header takes {length} bytes, at most {MAX_HEADER_BYTES} are read: no safetensors file?"
        )
    if _LENGTH_BYTES + length > file_size:
        raise AdapterError(f"the header takes {length} bytes, but the file ends after {file_size}: it is torn")
    return _LENGTH_BYTES + length


def header_of(first_bytes: bytes, file_size: int) -> dict[str, Entry]:
    """As `read_header`, from a file's first `data_offset` bytes (or more) and its size.

    Raises:
        AdapterError: not a safetensors header; a name, type or shape that cannot be, shapes and offsets that disagree,
            tensors that overlap, leave holes or reach beyond the file; more than the limits allow.
    """
    offset = data_offset(first_bytes, file_size)
    if len(first_bytes) < offset:
        raise AdapterError(f"the header takes {offset} bytes, only {len(first_bytes)} were read: the file is torn")
    text = first_bytes[_LENGTH_BYTES:offset]
    for character, most in _MOST:
        if text.count(character) > most:
            raise AdapterError(f"the header has more {character.decode()} than {MAX_TENSORS} tensors have")
    try:
        header = strict_json.loads(text)
    except strict_json.StrictJSONError as error:
        raise AdapterError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise AdapterError("the header is not an object")
    _check_metadata(header.pop("__metadata__", {}))
    if len(header) > MAX_TENSORS:
        raise AdapterError(f"the file holds {len(header)} tensors, at most {MAX_TENSORS} are read")
    entries = {name: _entry(name, value, offset) for name, value in header.items()}
    _check_layout(entries, offset, file_size)
    return entries


def read_array(path: Path, entry: Entry, rows: slice | None = None) -> "Array":
    """A tensor of `FLOATS`, or a slice of its first axis, as fp32 in memory of its own.

    Raises:
        AdapterError: another type, or the file cannot be read or has become shorter.
    """
    import numpy as np

    if entry.dtype not in FLOATS:
        raise AdapterError(f"{path.name}: weights of type {entry.dtype} are not read")
    count = entry.shape[0] if entry.shape else 1
    begin, end, _ = (rows or slice(None)).indices(count)
    shape = (max(end - begin, 0), *entry.shape[1:]) if rows is not None else entry.shape
    row_bytes = (entry.end - entry.start) // max(count, 1)
    stored = np.empty(prod(shape), dtype={"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[entry.dtype])
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(entry.start + begin * row_bytes)
            _fill(file, _bytes_of(stored))
    except (OSError, EOFError) as error:
        raise AdapterError(f"{path.name}: {error}") from None
    if entry.dtype == "BF16":  # the upper half of an fp32
        return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32).reshape(shape)
    return stored.astype(np.float32, copy=False).reshape(shape)


def layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, Entry]]:
    """How a file of these tensors (name → type, shape) begins, and where each lies, in the order they are written."""
    order = sorted(tensors, key=lambda name: (-_RANKS[tensors[name][0]], name.encode()))
    described: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        start, end = end, end + prod(shape) * _BITS[dtype] // 8
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    offset = _LENGTH_BYTES + len(text)
    entries = {
        name: Entry(*tensors[name], *(offset + position for position in described[name]["data_offsets"]))
        for name in order
    }
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, entries


def write(path: Path, arrays: Mapping[str, "Array"], metadata: Mapping[str, str], dtype: str = "F32") -> None:
    """Write fp32 arrays as a file of one type out of `FLOATS`, rounded to the nearest, ties to even.

    Raises:
        AdapterError: a value that `dtype` cannot hold (NaN, infinite, beyond fp16's 65504), with the tensor's name.
    """
    start, entries = layout({name: (dtype, tuple(array.shape)) for name, array in arrays.items()}, metadata)
    with path.open("wb") as file:
        file.write(start)
        for name in entries:
            file.write(_encoded(name, arrays[name], dtype))


def _encoded(name: str, array: "Array", dtype: str) -> memoryview:
    import numpy as np

    values = np.ascontiguousarray(array, dtype="<f4").reshape(-1)
    with np.errstate(over="ignore"):
        stored = _bf16(values) if dtype == "BF16" else values.astype("<f2" if dtype == "F16" else "<f4", copy=False)
    largest = np.abs(values).max(initial=0)
    if not np.isfinite(largest):
        raise AdapterError(f"{name}: weights are not finite")
    # bf16 has fp32's range but for what its rounding carries beyond.
    if (dtype == "F16" and largest >= 65520) or (dtype == "BF16" and largest >= 3.3961775e38):
        raise AdapterError(f"{name}: {largest:.3g} is beyond what {dtype} holds; use fp32")
    return _bytes_of(stored)


def _bf16(values: "Array") -> "NDArray[np.uint16]":
    bits = values.view("<u4")
    rounded: NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # wraps for NaN alone
    return rounded


def _bytes_of(array: "NDArray[Any]") -> memoryview:
    return array.reshape(-1).data.cast("B") if array.size else memoryview(b"")


def _fill(file: Any, view: memoryview) -> None:
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("the file has become shorter")
        view = view[count:]


def _check_metadata(metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("the header's __metadata__ is not an object of strings")


def _entry(name: str, value: Any, offset: int) -> Entry:
    """One tensor's description, whose shape and offsets agree."""
    if len(name) > MAX_NAME_LENGTH:
        raise AdapterError(f"the name {name[:40]}… has {len(name)} characters, at most {MAX_NAME_LENGTH} are read")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(f"{name}: the header does not give dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise AdapterError(f"{name}: {str(dtype)[:40]!r} is not a type of safetensors")
    if not _sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise AdapterError(f"{name}: {str(shape)[:60]} is not a shape of at most {_MAX_DIMENSIONS} axes")
    if not _sizes(offsets) or len(offsets) != 2:
        raise AdapterError(f"{name}: {str(offsets)[:60]} are not two offsets")
    start, end = offsets
    if end - start < 0 or prod(shape) * _BITS[dtype] != 8 * (end - start):
        raise AdapterError(f"{name}: {dtype} of shape {str(shape)[:60]} does not take {end - start} bytes")
    return Entry(dtype, tuple(shape), offset + start, offset + end)


def _sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _check_layout(entries: Mapping[str, Entry], offset: int, file_size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position, before = offset, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position:
            fault = "overlaps" if entry.start < position else "leaves a hole after"
            raise AdapterError(f"{name} {fault} {before}")
        if entry.end > file_size:
            raise AdapterError(f"{name} ends at byte {entry.end}, but the file has {file_size}: it is torn")
        position, before = entry.end, name
    if position != file_size:
        raise AdapterError(f"{file_size - position} bytes after the last tensor belong to none")
