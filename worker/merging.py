"""What gives an adapter and is no training, as the host does it: the only caller of these verbs of the engine."""

from pathlib import Path
from typing import Any

from lora_engine.fields import from_mapping
from lora_engine.merging import merge as engine_merge
from lora_engine.merging.config import MergeSpec
from worker.channel import HostChannel
from worker.telling import teller
from worker.training import adapter_result
from worker.warm_base import WarmBase


def merge(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001 - verbs look alike
    """Merge adapters that lie in local folders into one. News: phase, progress …, then finished."""
    spec = from_mapping(MergeSpec, order["spec"])
    channel.send("phase", phase="merging")
    metrics = engine_merge.merge(spec, teller(channel))
    channel.send("finished", **adapter_result(Path(spec.output), metrics))
