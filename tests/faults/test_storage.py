"""An object store that fails, hangs, lies or loses its answers (F22, F23, F24)."""

import os
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest

from service.errors import Unavailable
from service.storage import ObjectDamaged, ObjectMissing, S3Storage, fetch, file_sha256, put_folder
from tests.conftest import Failpoints
from tests.faults.store import FakeStore, Kind

CONTENT = os.urandom(200_000)


@pytest.fixture
def storage(fake_store: FakeStore) -> S3Storage:
    return S3Storage("bucket", "p", request_timeout=timedelta(seconds=0.3), patience=timedelta(seconds=1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


@pytest.mark.parametrize("kind", ["500", "503", "429", "reset", "hang"])
@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_f22_what_fails_in_passing_is_tried_again(
    storage: S3Storage, fake_store: FakeStore, file: Path, tmp_path: Path, method: str, kind: Kind
) -> None:
    fake_store.fail(method, kind, times=1 if kind == "hang" else 2)
    storage.put_file("a", file, file_sha256(file))
    fake_store.fail(method, kind, times=1)
    fetch(storage, "a", tmp_path / "copy", file_sha256(file))
    assert (tmp_path / "copy").read_bytes() == CONTENT


@pytest.mark.parametrize("kind", ["503", "reset", "hang"])
def test_f22_a_store_that_stays_away_is_given_up_in_time(
    storage: S3Storage, fake_store: FakeStore, file: Path, kind: Kind
) -> None:
    for method in ("PUT", "GET", "HEAD"):
        fake_store.fail(method, kind, times=1000)
    for act in (lambda: storage.put_file("a", file, file_sha256(file)), lambda: storage.read("a")):
        began = time.monotonic()
        with pytest.raises(Unavailable):
            act()
        assert time.monotonic() - began < 4  # patience, one request and one pause, on a busy machine


def test_f22_pauses_grow(storage: S3Storage, fake_store: FakeStore, file: Path) -> None:
    """In a second a store that answers 503 at once is asked some five times, and not five thousand."""
    fake_store.fail("PUT", "503", times=1000)
    with pytest.raises(Unavailable):
        storage.put_file("a", file, file_sha256(file))
    assert 2 < fake_store.asked["PUT"] < 20


def test_f22_the_heartbeat_goes_on_while_a_store_hangs(storage: S3Storage, fake_store: FakeStore, file: Path) -> None:
    """The lease is renewed by another thread of the same interpreter: the wait must not hold its lock."""
    fake_store.fail("PUT", "hang", times=1)
    beats, ended = [0], threading.Event()

    def beat() -> None:
        while not ended.wait(0.01):
            beats[0] += 1

    thread = threading.Thread(target=beat)
    thread.start()
    storage.put_file("a", file, file_sha256(file))
    ended.set()
    thread.join()
    assert beats[0] > 10


@pytest.mark.parametrize("kind", ["short", "flipped", "dropped"])
def test_f23_other_bytes_than_were_sent_are_never_taken_for_stored(
    storage: S3Storage, fake_store: FakeStore, file: Path, kind: Kind
) -> None:
    fake_store.fail("PUT", kind)
    with pytest.raises((ObjectDamaged, ObjectMissing)):
        storage.put_file("a", file, file_sha256(file))
    assert fake_store.objects == {}


def test_f23_other_bytes_than_were_stored_are_never_used(
    storage: S3Storage, fake_store: FakeStore, file: Path, tmp_path: Path
) -> None:
    storage.put_file("a", file, file_sha256(file))
    fake_store.fail("GET", "flipped")
    with pytest.raises(ObjectDamaged):
        fetch(storage, "a", tmp_path / "copy", file_sha256(file))
    assert not (tmp_path / "copy").exists()


def test_f24_a_put_whose_answer_is_lost_is_repeated_to_the_same_end(
    storage: S3Storage, fake_store: FakeStore, file: Path
) -> None:
    fake_store.fail("PUT", "executed")
    storage.put_file("a", file, file_sha256(file))
    assert fake_store.objects == {"p/a": CONTENT}
    assert fake_store.asked["PUT"] == 2


def test_f24_a_process_that_fails_after_a_put_leaves_what_the_next_one_replaces(
    storage: S3Storage, fake_store: FakeStore, file: Path, points: Failpoints
) -> None:
    points.arm("storage.after_put", "raise", error="ETIMEDOUT")
    with pytest.raises(OSError, match="timed out"):
        storage.put_file("a", file, file_sha256(file))
    storage.put_file("a", file, file_sha256(file))
    assert fake_store.objects == {"p/a": CONTENT}


def test_a_folder_that_breaks_off_has_no_manifest(
    storage: S3Storage, fake_store: FakeStore, tmp_path: Path, points: Failpoints
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("MANIFEST.json", "a", "b"):
        (folder / name).write_bytes(name.encode())
    points.arm("storage.between_files", "raise", at=2, error="EIO")
    with pytest.raises(OSError, match="Input/output"):
        put_folder(storage, "f", folder, last="MANIFEST.json")
    assert sorted(fake_store.objects) == ["p/f/a", "p/f/b"]


def test_a_fetch_that_breaks_off_leaves_no_file(
    storage: S3Storage, file: Path, tmp_path: Path, points: Failpoints
) -> None:
    storage.put_file("a", file, file_sha256(file))
    points.arm("storage.fetching", "raise", error="EIO")
    with pytest.raises(OSError, match="Input/output"):
        fetch(storage, "a", tmp_path / "copy", file_sha256(file))
    assert not (tmp_path / "copy").exists()
