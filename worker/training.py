"""Training as the host does it: the only caller of the engine's `Training`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lora_engine import adapter, base_files, base_model
from lora_engine.base_model import BaseModel
from lora_engine.config import TrainingConfig, TrainSpec, from_mapping
from lora_engine.errors import BaseModelError, CheckpointError
from lora_engine.train import Training
from worker.channel import HostChannel


class WarmBase:
    """The base model that was used last, kept for the next job on the same one."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        if threads:
            torch.set_num_threads(threads)
        self._key: tuple[str, str, str] | None = None
        self._base: BaseModel | None = None

    def get(self, base: dict[str, Any], training: TrainingConfig, channel: HostChannel) -> BaseModel:
        """The base model, loaded unless it is here already.

        Raises:
            BaseModelError: the folder's files are not the ones the catalogue pinned.
        """
        key = (base["digest"], training.quantization, training.compute_dtype)
        if self._key != key or self._base is None:
            self._key = self._base = None  # free the old one before the new one needs the room
            channel.send("phase", phase="verifying base model")
            folder = Path(base["folder"])
            if base_files.digest(folder) != base["digest"]:
                raise BaseModelError(f"the files of base model {base['id']} are not those that the catalogue pinned")
            channel.send("phase", phase="loading base model")
            self._base = base_model.load(
                folder,
                quantization=training.quantization,
                compute_dtype=training.compute_dtype,
                device=self.device,
                digest=base["digest"],
            )
            self._key = key
        return self._base


def _resume(training: Training, folder: Path, channel: HostChannel) -> None:
    """Go on from a checkpoint; one that the engine refuses costs the steps before it, never the job."""
    try:
        training.resume(folder)
    except CheckpointError as error:
        channel.send("warning", message=f"Starting over: {error.message}")


def train(order: dict[str, Any], warm: WarmBase, channel: HostChannel) -> None:
    """Train to the end, or to a stop. News: phase, planned, step…, checkpoint…, then finished or stopped."""
    spec = from_mapping(TrainSpec, order["spec"])
    base = warm.get(order["base"], spec.training, channel)
    channel.send("phase", phase="preparing examples")
    with Training(spec, base) as training:
        if order["resume"] is not None:
            _resume(training, Path(order["resume"]), channel)
        channel.send("planned", step=training.step, total_steps=training.plan.steps)
        for step in training.steps():
            channel.send("step", **asdict(step))
            wanted = channel.stop
            if wanted != "abandon" and (step.checkpoint_due or wanted == "checkpoint"):
                channel.send("checkpoint", step=step.step, folder=str(training.checkpoint()))
            if wanted is not None:
                channel.send("stopped")
                return
        channel.send("phase", phase="writing adapter")
        metrics = training.finish()
    folder = Path(spec.output) / "adapter"
    channel.send("finished", folder=str(folder), digest=adapter.digest(folder), rank=spec.lora.rank, metrics=metrics)
