"""Checkpoints: the resumable state of a training job, verified byte for byte before it is used.

    step-00000042/
        state.safetensors   adapter and optimizer
        state.json          step, running metrics, and the fingerprint of the spec and data it belongs to
        MANIFEST.json       size and SHA-256 of both, what they are of, and a SHA-256 of its own

A folder appears whole or not at all. A flipped bit would resume without complaint and end in another adapter; the
manifest is there to refuse it. No random state is among the files: order of the examples and dropout follow from the
spec, the dataset and the step.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_engine import failpoints, strict_json
from lora_engine.base_files import sha256_file
from lora_engine.errors import CheckpointError
from lora_engine.folders import published

KEPT = 2
_TENSORS, _STATE, _MANIFEST = "state.safetensors", "state.json", "MANIFEST.json"


def save(parent: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write `parent`/step-…, then remove all but the newest `KEPT`; the new folder."""
    folder = parent / f"step-{step:08d}"
    with published(folder) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary / _TENSORS)
        failpoints.reach("checkpoint.writing")
        _write_json(temporary / _STATE, state)
        files = {
            name: {"size": (temporary / name).stat().st_size, "sha256": sha256_file(temporary / name)}
            for name in (_STATE, _TENSORS)
        }
        made_of = {"step": step, "fingerprint": state.get("fingerprint"), "versions": _versions()}
        _write_json(temporary / _MANIFEST, _sealed({"files": files, **made_of}))
    # Those of later steps are of another run: this one's are never the ones to go.
    for old in [path for path in existing(parent) if path.name <= folder.name][:-KEPT]:
        # Out of sight first: whoever still reads it finds it whole or gone.
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))
    return folder


def load(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint.

    Raises:
        CheckpointError: a file is missing, of another size or of another content than the manifest says.
    """
    manifest = _read_json(folder / _MANIFEST)
    files = manifest.get("files")
    # Versions before this one wrote the files alone.
    if set(manifest) != {"files"} and _sealed(manifest) != manifest:
        raise CheckpointError(f"{folder.name}: the manifest is not what was written")
    if not isinstance(files, dict) or set(files) != {_STATE, _TENSORS}:
        raise CheckpointError(f"{folder.name}: the manifest does not list the files of a checkpoint")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder.name}: {name} is missing")
        if {"size": path.stat().st_size, "sha256": sha256_file(path)} != expected:
            raise CheckpointError(f"{folder.name}: {name} is not what was written")
    try:
        return load_file(folder / _TENSORS), _read_json(folder / _STATE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder.name}: {error}") from error


def existing(parent: Path) -> list[Path]:
    """Checkpoint folders in `parent`, oldest first, verified or not."""
    return sorted(path for path in parent.glob("step-*") if path.is_dir())


def restore(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy into the live tensors, in place.

    Raises:
        CheckpointError: other names or shapes than those of the job.
    """
    shapes = {name: tensor.shape for name, tensor in into.items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        raise CheckpointError("the checkpoint's tensors are not those of this job")
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(tensors[name])


def _sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """With a SHA-256 of everything else in it."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("luthier", "torch", "safetensors")}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = strict_json.loads(path.read_bytes())
    except (OSError, strict_json.StrictJSONError) as error:
        raise CheckpointError(f"{path.parent.name}: {path.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.parent.name}: {path.name} is not a JSON object")
    return value
