"""Folders that appear whole or not at all, on a disk that fails: strace answers the system calls in its place."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_engine.folders import published

PROGRAM = """
import sys
from pathlib import Path
from lora_engine.folders import published
with published(Path(sys.argv[1])) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
"""
CALLS = 4  # fsync: of both files, the folder, and the one that it lies in


def write(folder: Path, inject: str, trace: Path) -> int:
    """The exit status of a program that writes `folder`, with a fault injected into its system calls."""
    strace = ["strace", "-f", "-o", str(trace), "-e", f"trace={inject.split(':')[0]}"]
    command = [*strace, "-e", f"inject={inject}", sys.executable, "-c", PROGRAM, str(folder)]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture(scope="module")
def _strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-o", "/dev/null", "true"], check=False, capture_output=True).returncode:
        pytest.skip("strace may not trace here")


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    parent = tmp_path / "parent"
    parent.mkdir()
    return parent


@pytest.mark.usefixtures("_strace")
@pytest.mark.parametrize("call", range(1, CALLS + 1))
def test_a_sync_that_fails_is_never_taken_for_done(parent: Path, tmp_path: Path, call: int) -> None:
    trace = tmp_path / "trace"
    assert write(parent / "step-1", f"fsync:error=EIO:when={call}", trace) == 1
    assert trace.read_text().count("INJECTED") == 1
    assert trace.read_text().count("fsync(") == call  # it was not tried again: the next one would lie
    names = [path.name for path in parent.iterdir()]
    if call < CALLS:
        assert names == []
    else:  # it is there and whole, but whether it will be after a power cut nobody knows: the caller hears of it
        assert {path.read_text() for path in (parent / "step-1").iterdir()} == {"new"}


@pytest.mark.usefixtures("_strace")
def test_all_is_synced_when_nothing_fails(parent: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    assert write(parent / "step-1", f"fsync:error=EIO:when={CALLS + 1}", trace) == 0
    assert trace.read_text().count("fsync(") == CALLS


@pytest.mark.usefixtures("_strace")
def test_a_process_that_is_killed_at_the_rename_leaves_nothing_half(parent: Path, tmp_path: Path) -> None:
    assert write(parent / "step-1", "rename:signal=KILL:when=1", tmp_path / "trace") == -9
    assert [path.name for path in parent.iterdir() if not path.name.startswith(".")] in ([], ["step-1"])
    if (parent / "step-1").exists():
        assert {path.read_text() for path in (parent / "step-1").iterdir()} == {"new"}


def test_what_was_there_is_replaced_or_kept(parent: Path) -> None:
    folder = parent / "result"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), published(folder):
        _ = 1 / 0
    assert [path.name for path in folder.iterdir()] == ["old"]
    with published(folder) as new:
        (new / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert [path.name for path in parent.iterdir()] == ["result"]
