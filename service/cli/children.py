"""Child processes that are started again when they end, and end when this one does."""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

log = logging.getLogger("luthier")
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_STABLE_SECONDS = 30.0  # a child that ran for so long starts again at once
_MAX_PAUSE_SECONDS = 30.0


@dataclass
class Child:
    """One supervised process. `stop_seconds` is what it gets between SIGTERM and SIGKILL."""

    name: str
    command: Sequence[str]
    stop_seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _started: float = 0.0
    _restart_at: float | None = None
    _pause: float = 0.0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self._process = subprocess.Popen(
            list(self.command),
            env=os.environ | dict(self.environment),
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
            start_new_session=True,  # an interrupt at the terminal reaches `luthier up`, which stops them in order
        )
        self._started, self._restart_at = time.monotonic(), None

    def tend(self) -> None:
        """Start it again if it ended, after a pause that grows while it keeps ending."""
        if self._process is None or self._process.poll() is None:
            return
        if self._restart_at is None:
            stable = time.monotonic() - self._started > _STABLE_SECONDS
            self._pause = 0.0 if stable else min(max(0.5, self._pause * 2), _MAX_PAUSE_SECONDS)
            self._restart_at = time.monotonic() + self._pause
            log.warning("%s ended with %s; starting it again", self.name, self._process.returncode)
        if time.monotonic() >= self._restart_at:
            self.start()

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(self.stop_seconds)
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop in %g s and is killed", self.name, self.stop_seconds)
            self._process.kill()
            self._process.wait()


def _end_with_parent() -> None:
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
