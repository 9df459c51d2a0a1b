"""What reads bytes of strangers, as targets of a fuzzer: each either takes them or says why not.

python -m tests.fuzz.parsers safetensors -max_total_time=60     # with atheris; also: rows, form, tar, adapter
"""

import base64
import json
import tarfile
from collections.abc import Callable
from contextlib import suppress

from lora_engine import examples, ingest_headers
from lora_engine.errors import EngineError
from lora_engine.safetensors_file import header_of
from service.api.form import Form
from service.errors import ServiceError
from service.tar_stream import TarStream

_HEADER = json.dumps(
    {
        f"base_model.model.a.lora_{letter}.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [at, at + 16]}
        for letter, at in (("A", 0), ("B", 16))
    }
).encode()
_FILE = len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(32)
_CONFIG = b'{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["a"], "rank_pattern": {"a": 2}}'
_MEMBER = tarfile.TarInfo("a/adapter_config.json")
_MEMBER.size = 2
_TAR = _MEMBER.tobuf() + b"{}".ljust(1536, b"\0")


def safetensors(data: bytes) -> None:
    header_of(data, len(data))


def adapter(data: bytes) -> None:
    """The config and the header that `POST /adapters` takes, as the confined process reads them."""
    texts = {"config": base64.b64encode(data).decode(), "weights": base64.b64encode(_FILE).decode()}
    ingest_headers.answer({**texts, "size": len(_FILE), "ingest": {}})


def rows(data: bytes) -> None:
    for _ in examples.read_examples(data.split(b"\n")):
        pass


def form(data: bytes) -> None:
    taken = Form("multipart/form-data; boundary=XX", ("name",), {"file": lambda _: None})
    for start in range(0, len(data), 7):
        taken.write(data[start : start + 7])
    taken.finish()
    taken.text("name")


def tar(data: bytes) -> None:
    stream = TarStream({"adapter_config.json": lambda _: None})
    stream.write(data)
    stream.finish()


# Each with an input that it takes, from which others are made.
TARGETS: dict[str, tuple[Callable[[bytes], None], bytes]] = {
    "safetensors": (safetensors, _FILE),
    "adapter": (adapter, _CONFIG),
    "rows": (rows, b'{"messages": [{"role": "assistant", "content": "\\u00e9", "weight": 1}]}\n'
             b'{"prompt": "", "completion": "x"}'),
    "form": (form, b'--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--XX--\r\n'),
    "tar": (tar, _TAR),
}  # fmt: skip


def attempt(name: str, data: bytes) -> None:
    """Raises what a target must not: anything but a refusal."""
    with suppress(EngineError, ServiceError):
        TARGETS[name][0](data)
