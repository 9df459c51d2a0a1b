"""Folders that appear whole or not at all, also after a power cut."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_engine import failpoints


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes `folder`'s place on success and is removed on error.

    Every file and both folders are fsynced before and after the rename. A folder that was there is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        # mkdtemp and safetensors make things for their owner alone, which would keep the result from other readers.
        temporary.chmod(0o755)
        for path in sorted(temporary.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
            fsync(path)
        fsync(temporary)
        failpoints.reach("folder.before_rename")
        _replace(temporary, folder)
        failpoints.reach("folder.after_rename")
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        folder.rename(old)  # POSIX lets a folder take the place of an empty one
        temporary.rename(folder)
    finally:
        shutil.rmtree(old, ignore_errors=True)
