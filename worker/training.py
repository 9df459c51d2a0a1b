"""Training as the host does it: the only caller of the engine's `Training`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_engine import adapter_header, failpoints
from lora_engine.config import TrainSpec, from_mapping
from lora_engine.errors import AdapterError, CheckpointError, Diverged
from lora_engine.train import Training
from worker.channel import HostChannel
from worker.telling import pulse
from worker.warm_base import WarmBase


def _resume(training: Training, folder: Path, channel: HostChannel) -> None:
    """Go on from a checkpoint; one that the engine refuses costs the steps before it, never the job."""
    try:
        training.resume(folder)
    except CheckpointError as error:
        channel.send("warning", message=f"Starting over: {error.message}")


def train(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:
    """Train to the end, or to a stop. News: phase, planned, step…, checkpoint…, then finished, stopped or failed."""
    spec = from_mapping(TrainSpec, order["spec"])
    base = warm.get(order["base"], spec.training, channel)
    channel.send("phase", phase="preparing examples")
    with Training(spec, base, pulse(channel)) as training:
        if order["resume"] is not None:
            _resume(training, Path(order["resume"]), channel)
        plan = training.plan
        seconds = plan.predicted_step_seconds
        channel.send("planned", step=training.step, total_steps=plan.steps, predicted_step_seconds=seconds)
        try:
            if not _make_steps(training, channel):
                channel.send("stopped")
                return
        except Diverged as error:
            _diverged(error, training, channel)
            return
        channel.send("phase", phase="writing adapter")
        metrics = training.finish()
    failpoints.reach("host.finished")
    channel.send("finished", **adapter_result(Path(spec.output) / "adapter", metrics))


def _make_steps(training: Training, channel: HostChannel) -> bool:
    """Whether all were made, and no stop came first."""
    for step in training.steps():
        if step.step == 1 and training.validation_loss_before is not None:
            channel.send("evaluated", step=0, epoch=0.0, validation_loss=training.validation_loss_before)
        failpoints.reach("host.step")
        channel.send("step", **asdict(step))
        wanted = channel.stop
        if wanted != "abandon" and (step.checkpoint_due or wanted == "checkpoint"):
            channel.send("checkpoint", step=step.step, folder=str(training.checkpoint()))
        if wanted is not None:
            return False
    return True


def _diverged(error: Diverged, training: Training, channel: HostChannel) -> None:
    """The job has failed, but the last good adapter, if there is one, is its owner's all the same."""
    if not training.history.points:  # no step was taken
        raise error
    try:
        metrics = training.finish()
    except AdapterError:
        raise error from None
    reason = {"code": error.code, "category": error.category, "message": error.message}
    channel.send("failed", **reason, adapter=adapter_result(Path(training.spec.output) / "adapter", metrics))


def adapter_result(folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """An adapter as written: its rank is the largest of its modules'."""
    rank = max(module.rank for module in adapter_header.inspect(folder).modules.values())
    return {"folder": str(folder), "digest": adapter_header.digest(folder), "rank": rank, "metrics": metrics}
