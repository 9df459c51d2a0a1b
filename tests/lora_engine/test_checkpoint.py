import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lora_engine import checkpoint
from lora_engine.errors import CheckpointError

TENSORS = {"parameters": torch.arange(6.0).view(2, 3), "step": torch.tensor(7.0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoint.save(tmp_path / "checkpoints", 42, TENSORS, {"step": 42, "loss": 0.1})


def test_what_is_saved_is_what_is_loaded(folder: Path) -> None:
    assert folder.name == "step-00000042"
    tensors, state = checkpoint.load(folder)
    assert state == {"step": 42, "loss": 0.1}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["step-00000042"]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "MANIFEST.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path, -1),
        lambda path: flip(path, len(path.read_bytes()) // 2),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["last bit", "middle bit", "truncated", "empty", "missing"],
)
def test_a_damaged_checkpoint_is_refused(folder: Path, name: str, damage: Callable[[Path], object]) -> None:
    if name == "MANIFEST.json":  # its last byte is white space: that bit would change nothing
        (folder / name).write_bytes((folder / name).read_bytes().rstrip())
    damage(folder / name)
    with pytest.raises(CheckpointError, match="step-00000042"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["state.json", "MANIFEST.json"])
def test_every_flipped_bit_is_noticed(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes().rstrip()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)


def test_the_manifest_says_what_the_files_are_of(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    assert (manifest["step"], set(manifest["versions"])) == (42, {"luthier", "torch", "safetensors"})
    # One of a version that wrote less is as good.
    (folder / "MANIFEST.json").write_text(json.dumps({"files": manifest["files"]}))
    assert checkpoint.load(folder)[1]["step"] == 42


def test_a_manifest_that_leaves_a_file_out_is_refused(folder: Path) -> None:
    path = folder / "MANIFEST.json"
    manifest = {"files": json.loads(path.read_text())["files"]}
    del manifest["files"]["state.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not list"):
        checkpoint.load(folder)


def test_only_the_newest_two_are_kept(folder: Path) -> None:
    for step in (43, 100, 101):
        checkpoint.save(folder.parent, step, TENSORS, {})
    assert [path.name for path in checkpoint.existing(folder.parent)] == ["step-00000100", "step-00000101"]


def test_a_failed_save_leaves_no_trace(folder: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(folder.parent, 43, TENSORS, {"step": object()})
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000042"]


def test_restoring_writes_in_place_and_only_what_fits() -> None:
    live = {"parameters": torch.zeros(2, 3), "step": torch.zeros(())}
    inside = live["parameters"]
    checkpoint.restore(TENSORS, live)
    assert torch.equal(inside, TENSORS["parameters"])
    for other in ({"parameters": torch.zeros(3, 2), "step": torch.zeros(())}, {"parameters": torch.zeros(2, 3)}):
        with pytest.raises(CheckpointError, match="not those of this job"):
            checkpoint.restore(TENSORS, other)


def test_checkpoints_of_another_run_do_not_push_out_this_ones(tmp_path: Path) -> None:
    for step in (8, 10, 2):
        newest = checkpoint.save(tmp_path, step, {"x": torch.ones(1)}, {})
    assert newest.is_dir()


def test_an_old_checkpoint_is_out_of_sight_before_a_file_of_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def look(path: Path, **_: object) -> None:
        if path.name.endswith(".old"):
            seen.append([path.name for path in checkpoint.existing(tmp_path)])

    monkeypatch.setattr(shutil, "rmtree", look)
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": torch.ones(1)}, {})
    assert seen == [["step-00000002", "step-00000003"]]
