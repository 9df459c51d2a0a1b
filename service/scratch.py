"""Folders of `work_dir` for the length of a request; what a killed process leaves of them is swept."""

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from service.settings import Settings

ABANDONED_SECONDS = 3600.0  # a request writes far more often than this
_PREFIX = "scratch-"
log = logging.getLogger(__name__)


@contextmanager
def folder(settings: Settings) -> Iterator[Path]:
    """A new folder, gone after the block."""
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=settings.work_dir))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def sweep_abandoned(settings: Settings) -> None:
    """Remove folders in which nothing has been written for long."""
    for path in settings.work_dir.glob(f"{_PREFIX}*"):
        with suppress(FileNotFoundError):  # another process sweeps too
            newest = max(item.stat().st_mtime for item in (path, *path.rglob("*")))
            if newest < time.time() - ABANDONED_SECONDS:
                shutil.rmtree(path)
                log.warning("removed the abandoned %s", path.name)
