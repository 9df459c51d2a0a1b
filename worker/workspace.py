"""A scratch folder per attempt, and the files that go in and out of it."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service import storage as objects
from service.errors import NoSpace
from service.leases import Claim
from service.models import Checkpoint
from service.storage import Storage

MANIFEST = "MANIFEST.json"
_LOCK = ".lock"


@contextmanager
def workspace(root: Path, claim: Claim) -> Iterator[Path]:
    """A new folder for this attempt, removed at the end. A lock tells other workers that somebody is in it."""
    folder = root / f"{claim.job_id}-e{claim.epoch}"
    folder.mkdir(parents=True)
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def check_room(folder: Path, needed: int) -> None:
    """Raises NoSpace unless `needed` bytes are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise NoSpace(f"the worker's disk has {free >> 20} MiB free and needs {needed >> 20}")


def remove_abandoned(root: Path) -> list[str]:
    """Folders of attempts whose worker died. Returns their names."""
    removed = []
    for folder in sorted(root.glob("job-*-e*")):
        try:
            descriptor = os.open(folder / _LOCK, os.O_RDWR)
        except FileNotFoundError:
            continue  # just being made, or just being removed
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder.name)
        finally:
            os.close(descriptor)
    return removed


def put_checkpoint(storage: Storage, claim: Claim, step: int, folder: Path) -> tuple[str, str]:
    """Upload a checkpoint, its manifest last. Returns the prefix and the manifest's SHA-256.

    Raises:
        FileNotFoundError, ObjectMissing: the engine has removed the checkpoint meanwhile, for newer ones.
    """
    prefix = f"jobs/{claim.job_id}/e{claim.epoch}/s{step}"
    named = {MANIFEST, *json.loads((folder / MANIFEST).read_bytes())["files"]}
    files = {file["name"]: str(file["sha256"]) for file in objects.put_folder(storage, prefix, folder, last=MANIFEST)}
    if set(files) != named:  # the folder was listed while it went
        raise FileNotFoundError(f"{folder.name} is not whole any more")
    return prefix, files[MANIFEST]


def fetch_checkpoint(storage: Storage, checkpoint: Checkpoint, folder: Path) -> None:
    """Bring back a checkpoint, every byte of it compared with its manifest, and that with the row.

    Raises:
        ObjectMissing, ObjectDamaged: an older one must do.
    """
    shutil.rmtree(folder, ignore_errors=True)
    objects.fetch(storage, f"{checkpoint.prefix}/{MANIFEST}", folder / MANIFEST, checkpoint.manifest_sha256)
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name, file in manifest["files"].items():
        objects.fetch(storage, f"{checkpoint.prefix}/{name}", folder / name, file["sha256"])
