"""What gives an artifact, as the host does it: the only caller of these verbs of the engine."""

import json
from pathlib import Path
from typing import Any

from lora_engine import analysis as engine_analysis
from lora_engine.analysis_config import AnalyzeSpec
from lora_engine.exporting import export as engine_export
from lora_engine.exporting.config import ExportSpec
from lora_engine.fields import from_mapping
from lora_engine.folders import published
from lora_engine.merging.verify import verify as engine_verify
from worker.channel import HostChannel
from worker.telling import teller
from worker.warm_base import WarmBase, verified


def export(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001 - verbs look alike
    """Write adapters in another format, or into the base model. News: phase, progress …, then finished."""
    spec = from_mapping(ExportSpec, order["spec"])
    verified(order["base"], channel)
    channel.send("phase", phase="exporting")
    metrics = engine_export.export(spec, teller(channel))
    channel.send("finished", folder=spec.output, metrics=metrics)


def analyze(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001
    """A report on how adapters interfere, with pictures. News: phase, progress …, then finished."""
    spec = from_mapping(AnalyzeSpec, order["spec"])
    verified(order["base"], channel)
    channel.send("phase", phase="analysing")
    metrics = engine_analysis.analyze(spec, teller(channel))
    channel.send("finished", folder=spec.output, metrics=metrics)


def verify(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:  # noqa: ARG001
    """Compute a merge's certificate again. News: phase, then finished, with `verification.json` as the artifact."""
    channel.send("phase", phase="verifying")
    report = engine_verify(Path(order["adapter"]), [Path(source) for source in order["sources"]])
    with published(Path(order["output"])) as folder:
        (folder / "verification.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    channel.send("finished", folder=order["output"], metrics=report)
