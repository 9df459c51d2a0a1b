"""What gives an adapter and is no training, as the host does it: the only caller of these verbs of the engine."""

from pathlib import Path
from typing import Any

from lora_engine import ingest as engine_ingest
from lora_engine import weight_search
from lora_engine.errors import AdapterError, BaseModelError
from lora_engine.fields import from_mapping
from lora_engine.ingest_config import IngestSpec
from lora_engine.merging import extract as engine_extract
from lora_engine.merging import merge as engine_merge
from lora_engine.merging.config import ExtractSpec, MergeSpec
from lora_engine.weight_search_config import SearchSpec
from worker.channel import HostChannel
from worker.telling import teller
from worker.training import adapter_result
from worker.warm_base import WarmBase, verified


def merge(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001 - verbs look alike
    """Merge adapters that lie in local folders into one. News: phase, progress …, then finished."""
    spec = from_mapping(MergeSpec, order["spec"])
    channel.send("phase", phase="merging")
    metrics = engine_merge.merge(spec, teller(channel))
    channel.send("finished", **adapter_result(Path(spec.output), metrics))


def search(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:
    """Find the weights of a stack on the warm base model. News: phase, progress …, then finished."""
    spec = from_mapping(SearchSpec, order["spec"])
    base = warm.get(order["base"], spec.search.training, channel)
    channel.send("phase", phase="searching weights")
    metrics = weight_search.search(spec, teller(channel), base)
    channel.send("finished", **adapter_result(Path(spec.output), metrics))


def extract(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001
    """An adapter from two full models. News: phase, progress …, then finished."""
    spec = from_mapping(ExtractSpec, order["spec"])
    for base in (order["base"], order["tuned"]):
        verified(base, channel)
    channel.send("phase", phase="extracting")
    try:
        metrics = engine_extract.extract(spec, teller(channel))
    except BaseModelError as error:  # their files are as pinned: they are not two of one kind, which is the request's
        raise AdapterError(error.message) from None
    channel.send("finished", **adapter_result(Path(spec.output), metrics))


def ingest(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001
    """An adapter from elsewhere into one of ours. News: phase, progress …, then finished."""
    spec = from_mapping(IngestSpec, order["spec"])
    verified(order["base"], channel)
    channel.send("phase", phase="taking in")
    metrics = engine_ingest.ingest(spec, teller(channel))
    channel.send("finished", **adapter_result(Path(spec.output), metrics))
