"""Fused passes for CPUs, compiled from `native/` on first use; without a C++ compiler PyTorch's operations serve.

A norm, a rotation, a gated activation, a softmax and attention each take PyTorch several operations with a result in
memory every time; here each is one pass over its rows. The library is compiled for this processor, once, into the
user's cache (`$XDG_CACHE_HOME/luthier`), under a name that says of what it was made. Calls go through ctypes, which
needs neither PyTorch's headers nor its ABI.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_engine.packing import AttentionGroup

log = logging.getLogger(__name__)
_SOURCES = sorted(Path(__file__).with_name("native").iterdir())
_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
# Compilers that do not know the processor yet would take it for an older one of half the vector width.
_WIDE = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_COMPILE_SECONDS = 120
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_STORED = {**_NAMES, torch.float16: "fp16"}  # that weights are read and written in
_UNLIMITED = 2**62


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("segments", "queries", "keys")),
        *((name, ctypes.c_void_p) for name in ("query_rows", "key_rows", "query_positions", "key_positions")),
        ("window", ctypes.c_int64),
    )


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "size")),
        *((name, ctypes.c_int64) for name in ("query_apart", "key_apart", "value_apart")),
        ("scaling", ctypes.c_float),
    )


def serve(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for tensors of this kind here."""
    return device.type == "cpu" and dtype in _NAMES and library() is not None


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler, or what it made cannot be loaded."""
    compiler = shutil.which("c++")
    if compiler is None or sys.platform != "linux":
        return None
    try:
        command = [compiler, *_FLAGS, *_processor()]
        folder = _cache()
        if folder is not None:
            return _loaded(command, folder)
        # What is loaded stays so when its file has gone.
        with tempfile.TemporaryDirectory(prefix="luthier-kernels-") as passing:
            return _loaded(command, Path(passing))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("no kernels: %s", error)
        return None


def _loaded(command: list[str], folder: Path) -> ctypes.CDLL:
    path = folder / f"kernels-{_digest(command)}.so"
    if not path.exists():
        _compile(command, path)
    return ctypes.CDLL(str(path))


def _processor() -> list[str]:
    """The compiler's options for this processor."""
    wide = set(_WIDE) <= set(_features().split())
    return ["-march=skylake-avx512", "-mprefer-vector-width=512"] if wide else ["-march=native"]


def _features() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _digest(command: list[str]) -> str:
    """Of everything that decides what is compiled: the source, the compiler, its options, and this processor."""
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True, timeout=_COMPILE_SECONDS)
    facts = [
        *(source.read_bytes() for source in _SOURCES),
        version.stdout,
        *(text.encode() for text in (*command, platform.machine(), _features())),
    ]
    return hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]


def _cache() -> Path | None:
    """A folder that only this user writes to, as what is loaded from it runs as this user; None: there is none."""
    given, home = os.environ.get("XDG_CACHE_HOME"), os.environ.get("HOME")
    if not given and not home:
        return None
    folder = (Path(given) if given else Path(home or "", ".cache")) / "luthier"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid() else None


def _compile(command: list[str], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder, path.name)
        whole = [*command, "-o", str(made), *(str(source) for source in _SOURCES if source.suffix == ".cpp")]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
        if done.returncode:
            raise OSError(f"{command[0]} ended with {done.returncode}: {done.stderr[:300]}")
        made.replace(path)


def norm_forward(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """weight · unit and unit = x / rms(x) in `dtype`, and 1 / rms(x) (fp32, …, 1); x and weight are fp32."""
    x = x.contiguous()
    unit, result = (torch.empty(x.shape, dtype=dtype) for _ in range(2))
    inverse = torch.empty((*x.shape[:-1], 1))
    _call("norm_forward", dtype, x, weight, ctypes.c_float(eps), unit, result, inverse, *_rows(x))
    return result, unit, inverse


def norm_backward(dy: Tensor, unit: Tensor, inverse: Tensor, weight: Tensor, added: Tensor | None) -> Tensor:
    """dx (fp32) + `added` (fp32)."""
    dy = dy.contiguous()
    dx = torch.empty(dy.shape)
    _call("norm_backward", unit.dtype, dy, unit, inverse, weight, added, dx, *_rows(dy))
    return dx


def silu_product(gate_up: Tensor) -> Tensor:
    """silu(gate) · up (rows × width) of rows that hold gate and up (rows × 2 width)."""
    result = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _call("silu_product", gate_up.dtype, gate_up, result, *_rows(result))
    return result


def silu_product_backward(upstream: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `gate_up` from that of the product."""
    gradient = torch.empty_like(gate_up)
    _call("silu_product_backward", gate_up.dtype, upstream, gate_up, gradient, *_rows(upstream))
    return gradient


def rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> None:
    """As `blocks.rotate`, in place; rows of x (rows, heads, size) may lie further apart than their heads are wide."""
    rows, heads, size = x.shape
    pairs = cos.shape[-1]
    cos, sin = cos.contiguous(), sin.contiguous()
    counts = [ctypes.c_int64(count) for count in (rows, x.stride(0), heads, size, pairs)]
    _call("rotate", x.dtype, x, cos, sin, ctypes.c_float(direction), *counts, _threads(rows * heads * size))


def softmax_loss(logits: Tensor, targets: Tensor, scales: Tensor | None) -> Tensor:
    """-log p(target) of each row (fp32) of logits (rows × vocabulary).

    With `scales` (rows, fp32) the logits become the gradient of Σ scale · loss in place.
    """
    losses = torch.empty(len(logits))
    targets = targets.contiguous()
    scales = scales if scales is None else scales.float().contiguous()
    _call("softmax_loss", logits.dtype, logits, targets, scales, losses, *_rows(logits))
    return losses


def attend(
    q: Tensor, k: Tensor, v: Tensor, group: AttentionGroup, scaling: float, window: int | None, result: Tensor,
    logs: Tensor,
) -> None:  # fmt: skip
    """Attended values of a group's queries into `result` (like q, contiguous), and the logarithm of each softmax's
    denominator into `logs` (query rows × heads, fp32)."""
    members = _members(group, window), _heads(q, k, v, scaling)
    threads = _threads(group.scores * q.shape[1] * q.shape[2])
    _call("attend", q.dtype, q, k, v, *(ctypes.byref(member) for member in members), result, logs, threads)


def attend_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, result: Tensor, logs: Tensor, group: AttentionGroup,
    scaling: float, window: int | None, gradients: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Gradients of q (like q, written) and of k and v (fp32, added to) from `upstream`, that of `result`."""
    members = _members(group, window), _heads(q, k, v, scaling)
    threads = _threads(group.scores * q.shape[1] * q.shape[2])
    structures = (ctypes.byref(member) for member in members)
    _call("attend_backward", q.dtype, upstream, q, k, v, result, logs, *structures, *gradients, threads)


def adds(stored: torch.dtype, written: torch.dtype) -> bool:
    """Whether `add_product` reads and writes these types here."""
    known = stored in _STORED and written in _STORED and library() is not None
    return known and hasattr(library(), f"add_product_{_STORED[stored]}_{_STORED[written]}")


def panels(right: Tensor) -> Tensor:
    """`right` (rank × width, fp32) as `add_product` reads it: panels of columns, the last one padded with zeros."""
    loaded: Any = library()
    columns = loaded.panel_columns()
    padded = nn.functional.pad(right, (0, -right.shape[1] % columns))
    return padded.view(len(right), padded.shape[1] // columns, columns).transpose(0, 1).contiguous()


def add_product(weight: Tensor, left: Tensor, right: Tensor, result: Tensor) -> float:
    """result = weight + left · right, rounded once; Σ of the squares of what that rounding changed.

    For fp32 results that is the rounding of the sum itself. Computed by this thread alone, with other Python threads
    at work meanwhile; no bit depends on which rows are computed together.

    Args:
        weight: rows × width, contiguous.
        left: rows × rank, fp32, contiguous.
        right: what `panels` made.
        result: as `weight`, or the same memory where the types are of one size.
    """
    function = getattr(library(), f"add_product_{_STORED[weight.dtype]}_{_STORED[result.dtype]}")
    function.restype = ctypes.c_double
    counts = [ctypes.c_int64(count) for count in (*weight.shape, left.shape[1])]
    return float(function(*map(_pointer, (weight, left, right, result)), *counts))


def _members(group: AttentionGroup, window: int | None) -> _Group:
    rows = (group.queries, group.keys, group.query_positions, group.key_positions)
    assert all(tensor.is_contiguous() for tensor in rows)  # noqa: S101 - made so by packing
    pointers = [tensor.data_ptr() for tensor in rows]
    return _Group(*group.queries.shape, group.keys.shape[1], *pointers, window or _UNLIMITED)


def _heads(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> _Heads:
    return _Heads(q.shape[1], *k.shape[1:], q.stride(0), k.stride(0), v.stride(0), scaling)


def _rows(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int]:
    width = x.shape[-1]
    return ctypes.c_int64(x.numel() // width), ctypes.c_int64(width), _threads(x.numel())


def _threads(work: int) -> ctypes.c_int:
    # Waking a thread costs as much as some thousand numbers.
    return ctypes.c_int(torch.get_num_threads() if work > 1 << 14 else 1)


def _call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
    function = getattr(library(), f"{name}_{_NAMES[dtype]}")
    function(*(_pointer(item) if item is None or isinstance(item, Tensor) else item for item in arguments))


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
