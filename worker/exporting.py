"""What gives an artifact, as the host does it: the only caller of these verbs of the engine."""

from typing import Any

from lora_engine.exporting.config import ExportSpec
from lora_engine.fields import from_mapping
from worker.channel import HostChannel
from worker.telling import teller
from worker.warm_base import WarmBase, verified


def export(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001 - verbs look alike
    """Write adapters in another format, or into the base model. News: phase, progress …, then finished."""
    from lora_engine.exporting import export as engine_export

    spec = from_mapping(ExportSpec, order["spec"])
    verified(order["base"], channel)
    channel.send("phase", phase="exporting")
    metrics = engine_export.export(spec, teller(channel))
    channel.send("finished", folder=spec.output, metrics=metrics)
