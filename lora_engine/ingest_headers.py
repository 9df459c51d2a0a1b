"""What a foreign adapter's config and header say, read in a confined process: strangers wrote both."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_engine import strict_json
from lora_engine.confined import Confined, Exceeded
from lora_engine.errors import AdapterError
from lora_engine.fields import from_mapping, to_mapping
from lora_engine.ingest_config import IngestConfig
from lora_engine.ingest_plan import plan
from lora_engine.safetensors_file import header_of

_MEMORY_BYTES = 512 << 20  # a header of 2 MB takes less than 50
_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Told:
    """An adapter that can be taken in, as far as its headers say.

    Attributes:
        shapes: (outputs, inputs) of the adapted linear layers by name.
        moved_base: what its initialisation is called that changed the base model too; "" where it did not.
    """

    shapes: Mapping[str, tuple[int, int]]
    moved_base: str


def look(config: bytes, first_bytes: bytes, file_size: int, ingest: IngestConfig | None = None) -> Told:
    """Read adapter_config.json and the first bytes of the weights' file, which has `file_size` bytes in all.

    Takes about 60 ms: each adapter has a process of its own, so that none finds what another has left.

    Raises:
        AdapterError: what the adapter does cannot be kept, or its tensors do not fit its config; `field` says which of
            "config" and "weights" cannot be read.
    """
    request = {
        "config": base64.b64encode(config).decode(),
        "weights": base64.b64encode(first_bytes).decode(),
        "size": file_size,
        "ingest": to_mapping(ingest or IngestConfig()),
    }
    with Confined(f"{__name__}:answer", memory_bytes=_MEMORY_BYTES, seconds=_SECONDS) as child:
        try:
            told = child.call(request)
        except Exceeded as error:
            raise AdapterError(f"reading it was given up: {error}", field="weights") from None
    return Told({name: (outputs, inputs) for name, (outputs, inputs) in told["shapes"].items()}, told["moved_base"])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """The other side of `look`."""
    try:
        config = strict_json.loads(base64.b64decode(request["config"]))
    except strict_json.StrictJSONError as error:
        raise AdapterError(str(error), field="config") from None
    try:
        tensors = header_of(base64.b64decode(request["weights"]), request["size"])
    except AdapterError as error:
        raise AdapterError(error.message, field="weights") from None
    told = plan(config, tensors, from_mapping(IngestConfig, request["ingest"]))
    moved = str(config["init_lora_weights"])[:40] if told.moved_base else ""
    return {"shapes": {name: (one.outputs, one.inputs) for name, one in told.modules.items()}, "moved_base": moved}
