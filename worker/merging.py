"""Merging as the host does it: the only caller of the engine's merge."""

from pathlib import Path
from typing import Any

from lora_engine import adapter
from lora_engine import merge as engine_merge
from lora_engine.config import MergeSpec, from_mapping
from worker.channel import HostChannel


def merge(order: dict[str, Any], channel: HostChannel) -> None:
    """Merge adapters that lie in local folders into one. News: phase, then finished."""
    spec = from_mapping(MergeSpec, order["spec"])
    channel.send("phase", phase="merging")
    metrics = engine_merge.stack(spec)
    digest = adapter.digest(Path(spec.output))
    channel.send("finished", folder=spec.output, digest=digest, rank=metrics["rank"], metrics=metrics)
