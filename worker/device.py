"""Which device a worker uses, and that it alone does."""

import fcntl
import os
import socket
import time
from pathlib import Path

from service.settings import Settings

_WAIT_SECONDS = 30.0  # a killed worker's host needs a moment to let go


class DeviceLock:
    """A file lock per accelerator of this machine; it holds even when the database cannot be asked.

    `slot` names the device in the database, where a unique index allows one running job each. A CPU is shared: every
    worker has a slot of its own. The host inherits `descriptor`, so that the device is free only once both are gone.
    """

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.run_dir
        self.device = _resolve(settings.device)
        self.descriptor: int | None = None
        self.slot = f"{socket.gethostname()}:{self.device}"
        self._exclusive = self.device.startswith("cuda")
        if not self._exclusive:
            self.slot += f":{os.getpid()}"

    def acquire(self) -> None:
        """Raises BlockingIOError when another worker of this machine keeps the device."""
        if not self._exclusive:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._folder / f"{self.device.replace(':', '-')}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + _WAIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                self.descriptor = descriptor
                return

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _resolve(device: str) -> str:
    """ "auto" without asking torch, which this process does not import: it is the host's to load."""
    if device == "auto":
        return "cuda:0" if Path("/dev/nvidia0").exists() else "cpu"
    return "cuda:0" if device == "cuda" else device
