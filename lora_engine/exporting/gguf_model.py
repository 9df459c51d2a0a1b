"""A base model with the deltas of adapters in its weights, as one GGUF file for llama.cpp, streamed as `merged` is.

Matrices are F32, F16 or Q8_0 (blocks of 32 weights with one scale), vectors F32. The order of rows follows
`gguf_layout`; the metadata that of llama.cpp's `convert_hf_to_gguf.py`.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lora_engine.errors import AdapterError
from lora_engine.exporting import gguf_vocabulary, limits, sums
from lora_engine.exporting.base import Base
from lora_engine.exporting.deltas import Deltas
from lora_engine.exporting.gguf_layout import GGUFLayout, reorder, restore, stored_rows
from lora_engine.exporting.pipeline import Output
from lora_engine.exporting.sums import Block, Piece, Rounding
from lora_engine.exporting.tensors import aligned

_FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def check(base: Base) -> None:
    """Raises AdapterError for a model that llama.cpp would not compute alike."""
    limits.check_gguf_model(base.model.config.to_dict())
    gguf_vocabulary.check(base.tokenizer)


def pieces(found: Sequence[Piece], base: Base, layout: GGUFLayout, precision: str) -> list[Piece]:
    """Those of a merged model, under the names, in the types and orders of GGUF.

    Raises:
        AdapterError: a tensor that llama.cpp does not know.
    """
    by_stored = {stored: name for name, stored in base.tensors.names.items()}
    known = {name for name, _ in base.model.named_parameters(remove_duplicate=False)}
    result = []
    for piece in found:
        name = by_stored.get(piece.name, piece.name)
        if name not in known:  # rotary frequencies and the like, which are computed
            continue
        if len(piece.entry.shape) == 2:
            dtype = precision if piece.entry.shape[1] % 32 == 0 or precision != "Q8_0" else "F16"
        else:
            dtype = "F32"
        result.append(replace(piece, name=layout.name(name), dtype=dtype, heads=layout.heads(name)))
    return result


def written_bytes(piece: Piece) -> int:
    """Of the tensor's data."""
    return int(np.prod(_byte_shape(piece)))


def write(
    found: Sequence[Piece], base: Base, deltas: Deltas, path: Path, *, architecture: str, name: str, precision: str,
    tell: Callable[[int], None],
) -> Rounding:  # fmt: skip
    """Write the file; `found` are `pieces`.

    Raises:
        AdapterError: a sum or a cast that leaves the range of its type.
        OSError: a file cannot be read or written.
    """
    alignment = _write_start(found, base, path, architecture, name, precision)
    extra = _rope_factors(base.model.config)
    first = end = path.stat().st_size
    places = {}
    for key, size in [
        ("", 0 if extra is None else extra.nbytes),
        *((piece.name, written_bytes(piece)) for piece in found),
    ]:
        places[key], end = end, end + size + -size % alignment
    with Output(path, end) as file:
        if extra is not None:
            file.write(extra, first)

        def told(block: Block) -> None:
            tell(_rows_bytes(block.piece, block.stop - block.start))

        return sums.stream(found, deltas, _Target(file, places), told, _encode)


@dataclass(frozen=True, slots=True)
class _Target:
    """One file, and where in it each piece begins."""

    file: Output
    places: dict[str, int]

    def place(self, block: Block) -> int:
        return self.places[block.piece.name] + _rows_bytes(block.piece, block.start)

    def write(self, block: Block, data: Tensor) -> None:
        self.file.write(data, self.place(block))


def _rows_bytes(piece: Piece, rows: int) -> int:
    """Of so many rows as they are written."""
    return written_bytes(piece) // max(piece.count, 1) * rows


def _write_start(
    found: Sequence[Piece], base: Base, path: Path, architecture: str, name: str, precision: str
) -> int:  # fmt: skip
    """Everything before the first tensor's data; the alignment of the data."""
    writer: Any = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        _add_sizes(writer, base.model.config)
        writer.add_file_type(_FILE_TYPES[precision])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        gguf_vocabulary.add(writer, base.tokenizer, len(base.model.get_input_embeddings().weight))
        extra = _rope_factors(base.model.config)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", tuple(extra.shape), np.dtype(np.float32), extra.nbytes)
        for piece in found:
            raw = None if piece.dtype != "Q8_0" else gguf.GGMLQuantizationType.Q8_0
            stored = np.dtype({"F32": np.float32, "F16": np.float16, "Q8_0": np.uint8}[piece.dtype])
            shape = _byte_shape(piece) if raw else piece.entry.shape
            writer.add_tensor_info(piece.name, shape, stored, written_bytes(piece), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.write_padding(writer.fout[0], writer.fout[0].tell())
    finally:
        writer.close()
    return int(writer.data_alignment)


def _add_sizes(writer: Any, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _rope(config: Any) -> dict[str, Any]:
    found = {"rope_type": "default", **(config.rope_parameters or {})}
    if "rope_theta" not in found:
        raise AdapterError("format: rotary embeddings that differ between layers are not written as GGUF")
    return found


def _rope_factors(config: Any) -> Tensor | None:
    """By how much Llama 3's stretched wavelengths are longer than plain ones, fp32 (pairs of a head)."""
    if _rope(config)["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched: Tensor
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    pairs = len(stretched)
    plain: Tensor = _rope(config)["rope_theta"] ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    return plain / stretched


def _encode(piece: Piece, exact: Tensor) -> tuple[Tensor, Tensor]:
    kind = gguf.GGMLQuantizationType[piece.dtype]
    heads = piece.heads and piece.heads * len(exact) // piece.count
    ordered = (reorder(exact, heads) if heads else exact).contiguous()
    with np.errstate(over="ignore"):
        data = gguf.quantize(ordered.numpy(), kind)
    decoded = torch.from_numpy(gguf.dequantize(data, kind))
    return torch.from_numpy(data), restore(decoded, heads) if heads else decoded


def _byte_shape(piece: Piece) -> tuple[int, ...]:
    """Of the data, in bytes along the last axis."""
    size, item = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[piece.dtype]]
    *rows, width = piece.entry.shape
    return (*rows, width // size * item)


class GGUFTensors:
    """A GGUF file by the names of the model that it was written from (`exporting.tensors.Tensors`)."""

    def __init__(self, path: Path, layout: GGUFLayout, model: Any) -> None:
        self._layout = layout
        self._tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        expected = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        self._names = {name: stored for name in expected if (stored := layout.name(name)) in self._tensors}
        unknown = set(self._tensors) - set(self._names.values()) - {"rope_freqs.weight"}
        if unknown:
            raise AdapterError(f"{path.name}: tensors that the model does not have: {', '.join(sorted(unknown))}")

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """A slice of the first axis, in the model's own order, fp32."""
        tensor = self._tensors[self._names[name]]
        places = stored_rows(int(tensor.data.shape[0]), self._layout.heads(name))[start:stop]
        found: Any = gguf.dequantize(tensor.data[places.numpy()], tensor.tensor_type)
        return aligned(found.astype(np.float32))

    def rest(self, streamed: Container[str]) -> Iterator[tuple[str, Tensor]]:
        for name in self._names:
            if name not in streamed:
                yield name, self.rows(name, 0, int(self._tensors[self._names[name]].data.shape[0]))
