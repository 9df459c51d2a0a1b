import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from lora_engine import safetensors_file
from lora_engine.errors import AdapterError
from lora_engine.safetensors_file import Entry

PT = {"format": "pt"}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.lists(st.integers(0, 4), max_size=3)


def values(shape: Any, seed: int = 0) -> torch.Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(start: int, end: int, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


@given(shapes=st.dictionaries(NAMES, SHAPES, min_size=1, max_size=6), dtype=st.sampled_from(sorted(DTYPES)))
def test_the_writer_makes_the_bytes_of_the_package(
    shapes: dict[str, list[int]], dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("written") / "file.safetensors"
    tensors = {name: values(shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    safetensors_file.write(path, {name: item.numpy() for name, item in tensors.items()}, PT, dtype)
    assert path.read_bytes() == save({name: item.to(DTYPES[dtype]) for name, item in tensors.items()}, PT)


def test_every_kind_of_tensor_lies_where_the_package_puts_it() -> None:
    kinds = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "I16": torch.int16, "U16": torch.uint16, **DTYPES, "I32": torch.int32,
        "U32": torch.uint32, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64, "C64": torch.complex64,
    }  # fmt: skip
    tensors = {f"{name} {kind}": torch.zeros(3, 2).to(dtype) for kind, dtype in kinds.items() for name in "ba"}
    whole = save(tensors, PT)
    start, entries = safetensors_file.layout({name: (name.split()[1], (3, 2)) for name in tensors}, PT)
    assert whole.startswith(start)
    assert safetensors_file.header_of(whole, len(whole)) == entries


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_are_read_as_fp32_whole_or_by_rows(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    tensors = {
        "a": values((5, 3)).to(DTYPES[dtype]),
        "b": values(()).to(DTYPES[dtype]),
        "c": torch.zeros(0, 4),
        "i": torch.ones(2).int(),
    }
    save_file(tensors, path)
    header = safetensors_file.read_header(path)
    for name in "abc":
        found = safetensors_file.read_array(path, header[name])
        assert found.dtype == np.float32
        assert found.flags.owndata or found.base.flags.owndata
        assert torch.equal(torch.from_numpy(found), tensors[name].float())
    rows = safetensors_file.read_array(path, header["a"], slice(1, 4))
    assert torch.equal(torch.from_numpy(rows), tensors["a"][1:4].float())
    assert safetensors_file.read_array(path, header["a"], slice(5, 9)).shape == (0, 3)
    with pytest.raises(AdapterError, match="type I32"):
        safetensors_file.read_array(path, header["i"])


def test_rounding_to_bf16_and_fp16_is_that_of_torch(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    array = bits.view(np.float32)
    for dtype, limit in (("BF16", 3e38), ("F16", 65000)):
        chosen = array[np.abs(array) < limit]
        safetensors_file.write(path, {"x": chosen}, PT, dtype)
        assert torch.equal(load_file(path)["x"], torch.from_numpy(chosen).to(DTYPES[dtype]))


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "F32", "not finite"),
        (float("-inf"), "BF16", "not finite"),
        (-65520.0, "F16", "beyond what F16"),
        (3.4e38, "BF16", "beyond what BF16"),
    ],
)
def test_values_that_cannot_be_stored_are_refused_by_name(
    value: float, dtype: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"^layer: .*{reason}"):
        safetensors_file.write(tmp_path / "file", {"layer": np.array([1, value], np.float32)}, PT, dtype)


def test_the_largest_values_are_stored(tmp_path: Path) -> None:
    for value, dtype in ((65519.0, "F16"), (3.3895314e38, "BF16"), (3.4e38, "F32")):
        safetensors_file.write(tmp_path / "file", {"x": np.array([value], np.float32)}, PT, dtype)
        assert load_file(tmp_path / "file")["x"].isfinite().all()


def test_a_header_is_read_from_the_first_bytes_alone() -> None:
    whole = save({"a": values((3, 4)), "b": values((2,))}, PT)
    offset = safetensors_file.data_offset(whole[:8], len(whole))
    assert safetensors_file.header_of(whole[:offset], len(whole)) == {
        "a": Entry("F32", (3, 4), offset, offset + 48),
        "b": Entry("F32", (2,), offset + 48, offset + 56),
    }
    with pytest.raises(AdapterError, match="only 20 were read"):
        safetensors_file.header_of(whole[:20], len(whole))


FAULTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes"),
    "no length": (b"\1\0\0", "has 3 bytes"),
    "a zip, as torch.save makes": (b"PK\3\4" + bytes(100), "no safetensors file"),
    "endless header": (file_of({}, length=2**63), "at most 16000000"),
    "header beyond the file": (file_of({}, length=100), "it is torn"),
    "not JSON": (file_of(b"{'a': 1}"), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not UTF-8"),
    "an array": (file_of([]), "not an object"),
    "nested": (file_of(b"[" * 100_000), "not JSON: nested"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "twice": (file_of(b'{"a":1,"a":2}'), "'a' appears twice"),
    "name": (file_of({"n" * 513: tensor(0, 4)}, bytes(4)), "513 characters"),
    "no entry": (file_of({"a": 3}), "a: the header does not give"),
    "field missing": (file_of({"a": {"dtype": "F32", "shape": [1]}}), "a: the header does not give"),
    "field too many": (file_of({"a": tensor(0, 4) | {"evil": 1}}, bytes(4)), "a: the header does not give"),
    "type": (file_of({"a": tensor(0, 4, dtype="F31")}, bytes(4)), "a: 'F31' is not a type"),
    "type of no string": (file_of({"a": tensor(0, 4, dtype=["F32"])}, bytes(4)), "is not a type"),
    "negative axis": (file_of({"a": tensor(0, 4, [-1, -1])}, bytes(4)), "is not a shape"),
    "axis of no int": (file_of({"a": tensor(0, 4, [1.0])}, bytes(4)), "is not a shape"),
    "axis of a bool": (file_of({"a": tensor(0, 4, [True])}, bytes(4)), "is not a shape"),
    "shape of no list": (file_of({"a": tensor(0, 4, 1)}, bytes(4)), "is not a shape"),
    "nine axes": (file_of({"a": tensor(0, 4, [1] * 9)}, bytes(4)), "at most 8 axes"),
    "product overflows": (file_of({"a": tensor(0, 4, [2**33, 2**33, 2])}, bytes(4)), "does not take 4 bytes"),
    "shape and bytes": (file_of({"a": tensor(0, 4, [2])}, bytes(4)), "does not take 4 bytes"),
    "offsets turned": (file_of({"a": tensor(4, 0, [1])}, bytes(4)), "does not take -4 bytes"),
    "negative offset": (file_of({"a": tensor(-4, 0, [1])}, bytes(4)), "are not two offsets"),
    "three offsets": (file_of({"a": tensor(0, 4) | {"data_offsets": [0, 4, 4]}}, bytes(4)), "are not two offsets"),
    "overlap": (file_of({"a": tensor(0, 8), "b": tensor(4, 8)}, bytes(8)), "b overlaps a"),
    "hole": (file_of({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "b leaves a hole after a"),
    "hole at the start": (file_of({"a": tensor(4, 8)}, bytes(8)), "a leaves a hole after the header"),
    "beyond the file": (file_of({"a": tensor(0, 8)}, bytes(4)), "a ends at byte"),
    "bytes left": (file_of({"a": tensor(0, 4)}, bytes(12)), "8 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_every_fault_of_a_header_is_named(case: str, tmp_path: Path) -> None:
    content, reason = FAULTS[case]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterError, match=reason) as caught:
        safetensors_file.read_header(path)
    assert caught.value.message.startswith("file.safetensors: ")


@pytest.mark.parametrize("character", ["[", "{", ","])
def test_a_header_that_takes_memory_beyond_its_size_is_not_parsed(character: str, monkeypatch: Any) -> None:
    whole = file_of(b'{"a":[' + character.encode() * 1_500_000)
    monkeypatch.setattr("lora_engine.strict_json.loads", None)
    with pytest.raises(AdapterError, match=f"more \\{character} than 100000 tensors"):
        safetensors_file.header_of(whole, len(whole))


def test_too_many_tensors_are_refused() -> None:
    whole = file_of({str(number): tensor(0, 0) for number in range(100_001)})
    with pytest.raises(AdapterError, match="100001 tensors"):
        safetensors_file.header_of(whole, len(whole))


def test_a_file_that_is_missing_or_shrinks_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    with pytest.raises(AdapterError, match="No such file"):
        safetensors_file.read_header(path)
    save_file({"a": values((100, 100))}, path)
    header = safetensors_file.read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="has become shorter"):
        safetensors_file.read_array(path, header["a"])


@given(st.binary(max_size=200), st.integers(0, 250))
def test_no_bytes_raise_anything_else(noise: bytes, position: int) -> None:
    whole = bytearray(save({"a": values((3, 4)), "b": values((2,))}, PT))
    whole[position : position + len(noise)] = noise
    try:
        found = safetensors_file.header_of(bytes(whole), len(whole))
    except AdapterError:
        return
    assert {name: entry.shape for name, entry in found.items()} == {
        name: tuple(item.shape) for name, item in load(bytes(whole)).items()
    }


def test_neither_torch_nor_safetensors_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from lora_engine import safetensors_file; from pathlib import Path; import numpy;"
        "safetensors_file.write(Path(sys.argv[1]), {'a': numpy.ones((2, 3), 'f4')}, {});"
        "safetensors_file.read_array(Path(sys.argv[1]), safetensors_file.read_header(Path(sys.argv[1]))['a']);"
        "print([name for name in ('torch', 'safetensors', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "f")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
