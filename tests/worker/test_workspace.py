"""Checkpoints on their way to the store, while the engine goes on and removes old ones."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_engine import checkpoint
from service.leases import Claim
from service.storage import LocalStorage
from worker.workspace import put_checkpoint

CLAIM = Claim("job-1", "user-1", "train", 1, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", 3, {"x": torch.ones(2)}, {"step": 3})


@pytest.fixture
def store(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "objects")


def test_a_whole_checkpoint_is_stored(folder: Path, store: LocalStorage) -> None:
    prefix, _ = put_checkpoint(store, CLAIM, 3, folder)
    assert {Path(key).name for key in store.keys(prefix)} == {"MANIFEST.json", "state.json", "state.safetensors"}


@pytest.mark.parametrize("gone", ["MANIFEST.json", "state.json", "state.safetensors"])
def test_one_that_is_being_removed_is_not_taken_for_whole(
    folder: Path, store: LocalStorage, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = Path.rglob

    def listed_while_it_goes(path: Path, pattern: str) -> Iterator[Any]:
        (folder / gone).unlink()
        return listing(path, pattern)

    monkeypatch.setattr(Path, "rglob", listed_while_it_goes)
    with pytest.raises(FileNotFoundError):
        put_checkpoint(store, CLAIM, 3, folder)


def test_one_that_was_removed_is_missing(folder: Path, store: LocalStorage) -> None:
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        put_checkpoint(store, CLAIM, 3, folder)
