"""The base model that was used last, kept for the next job; and whether its files are the pinned ones."""

import logging
from pathlib import Path
from typing import Any

import torch

from lora_engine import base_files, base_model, failpoints
from lora_engine.base_model import BaseModel
from lora_engine.config import TrainingConfig
from lora_engine.errors import BaseModelError
from worker.channel import HostChannel

log = logging.getLogger(__name__)


class WarmBase:
    """One base model on the device at most."""

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        if threads:
            torch.set_num_threads(threads)
        self._key: tuple[str, str, str] | None = None
        self._base: BaseModel | None = None

    def get(self, base: dict[str, Any], training: TrainingConfig, channel: HostChannel) -> BaseModel:
        """The base model, loaded unless it is here already.

        Raises:
            BaseModelError: the folder is missing, or its files are not the ones the catalogue pinned.
        """
        key = (base["digest"], training.quantization, training.compute_dtype)
        if self._key != key or self._base is None:
            self._key = self._base = None  # free the old one before the new one needs the room
            folder = verified(base, channel)
            channel.send("phase", phase="loading base model")
            failpoints.reach("host.loading")
            self._base = base_model.load(
                folder,
                quantization=training.quantization,
                compute_dtype=training.compute_dtype,
                device=self.device,
                digest=base["digest"],
            )
            self._key = key
        return self._base


def verified(base: dict[str, Any], channel: HostChannel) -> Path:
    """The base model's folder. Raises BaseModelError unless its files are here, and the pinned ones."""
    channel.send("phase", phase="verifying base model")
    folder = Path(base["folder"])
    try:
        digest = base_files.digest(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        log.error("base model %s: %s", base["id"], error)
        raise BaseModelError(
            f"the folder of base model {base['id']} cannot be read on this worker: {error.strerror}"
        ) from error
    if digest != base["digest"]:
        raise BaseModelError(f"the files of base model {base['id']} are not those that the catalogue pinned")
    return folder
