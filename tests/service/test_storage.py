"""Objects in a directory, in moto's S3 and in nanio's: whole or not at all, and the same for whoever uses them."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import obstore
import pytest

from service.errors import NoSpace, Unavailable
from service.storage import (
    LocalStorage,
    ObjectDamaged,
    ObjectMissing,
    Storage,
    fetch,
    file_sha256,
    open_storage,
    put_folder,
)
from tests import servers

CONTENT = os.urandom(100) + bytes(10 << 20) + b"end"  # longer than one ranged read of S3


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(CONTENT)
    return path


def test_what_was_put_is_read_back_whole_and_in_parts(storage: Storage, file: Path, tmp_path: Path) -> None:
    storage.put_file("a/b/c", file, file_sha256(file))
    assert b"".join(storage.read("a/b/c")) == CONTENT
    for start, length in [
        (0, 1),
        (50, 100),
        (len(CONTENT) - 3, None),
        (len(CONTENT) - 3, 99),
        (len(CONTENT), 5),
        (7, 0),
    ]:
        expected = CONTENT[start:] if length is None else CONTENT[start : start + length]
        assert b"".join(storage.read("a/b/c", start, length)) == expected
    fetch(storage, "a/b/c", tmp_path / "copy" / "c", file_sha256(file))
    assert (tmp_path / "copy" / "c").read_bytes() == CONTENT


def test_an_empty_object(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    storage.put_file("a/empty", tmp_path / "empty", file_sha256(tmp_path / "empty"))
    assert list(storage.read("a/empty")) == []


def test_putting_again_replaces(storage: Storage, file: Path, tmp_path: Path) -> None:
    storage.put_file("a/b", file, file_sha256(file))
    (tmp_path / "other").write_bytes(b"other")
    storage.put_file("a/b", tmp_path / "other", file_sha256(tmp_path / "other"))
    assert b"".join(storage.read("a/b")) == b"other"


def test_a_wrong_hash_leaves_no_object(storage: Storage, file: Path) -> None:
    with pytest.raises(ObjectDamaged):
        storage.put_file("a/b", file, "0" * 64)
    with pytest.raises(ObjectMissing):
        storage.read("a/b")
    assert list(storage.keys("a")) == []


def test_an_absent_object_is_told_before_anything_is_sent(storage: Storage) -> None:
    with pytest.raises(ObjectMissing):
        storage.read("a/b")


def test_a_fetch_of_altered_bytes_leaves_no_file(storage: Storage, file: Path, tmp_path: Path) -> None:
    storage.put_file("a/b", file, file_sha256(file))
    with pytest.raises(ObjectDamaged):
        fetch(storage, "a/b", tmp_path / "copy", "0" * 64)
    assert not (tmp_path / "copy").exists()


def test_keys_and_deletion_go_by_whole_names(storage: Storage, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x")
    for key in ("jobs/1/a", "jobs/1/b/c", "jobs/10/a", "jobs/2"):
        storage.put_file(key, tmp_path / "f", file_sha256(tmp_path / "f"))
    assert sorted(storage.keys("jobs/1")) == ["jobs/1/a", "jobs/1/b/c"]
    storage.delete_prefix("jobs/1")
    assert sorted(storage.keys("jobs")) == ["jobs/10/a", "jobs/2"]
    storage.delete_prefix("jobs/2")
    storage.delete_prefix("jobs/2")
    assert sorted(storage.keys("jobs")) == ["jobs/10/a"]


def test_a_folder_goes_up_with_its_manifest_last(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for name in ("MANIFEST.json", "a", "sub/z"):
        (folder / name).write_bytes(name.encode())
    order: list[str] = []
    put = type(storage).put_file

    def recording(self: Storage, key: str, path: Path, sha256: str) -> None:
        order.append(key)
        put(self, key, path, sha256)

    monkeypatch.setattr(type(storage), "put_file", recording)
    files = put_folder(storage, "p", folder, last="MANIFEST.json")
    assert order == ["p/a", "p/sub/z", "p/MANIFEST.json"]
    assert [(item["name"], item["size"]) for item in files] == [("MANIFEST.json", 13), ("a", 1), ("sub/z", 5)]
    assert b"".join(storage.read("p/sub/z")) == b"sub/z"


def test_a_store_that_works_passes_its_check(storage: Storage) -> None:
    storage.check()


def test_objects_are_for_the_services_eyes_only(tmp_path: Path) -> None:
    LocalStorage(tmp_path / "objects")
    assert stat.S_IMODE((tmp_path / "objects").stat().st_mode) == 0o700


@pytest.mark.parametrize("key", ["", ".", "../outside", "a/../../outside", "{outside}", "/{outside}"])
def test_no_key_leads_out_of_the_folder(tmp_path: Path, key: str, file: Path) -> None:
    storage, outside = LocalStorage(tmp_path / "objects"), tmp_path / "outside"
    outside.write_bytes(b"not yours")
    key = key.format(outside=outside)
    with pytest.raises(ValueError, match="not an object key"):
        storage.put_file(key, file, file_sha256(file))
    with pytest.raises(ValueError, match="not an object key"):
        storage.read(key)
    with pytest.raises(ValueError, match="not an object key"):
        storage.delete_prefix(key)
    assert outside.read_bytes() == b"not yours"


def test_a_torn_write_leaves_nothing(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path / "objects")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpace):
        storage.put_file("a/b", file, file_sha256(file))
    assert [path for path in (tmp_path / "objects").rglob("*") if path.is_file()] == []


def test_a_missing_folder_fails_the_check(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "objects")
    (tmp_path / "objects").rmdir()
    with pytest.raises(Unavailable):
        storage.check()


def test_wrong_credentials_are_refused(
    s3_bucket: Callable[[str], str], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_bucket("nanio")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    storage = open_storage(url)
    with pytest.raises(Unavailable):
        storage.check()
    with pytest.raises(Unavailable):
        storage.put_file("a/b", file, file_sha256(file))


def test_a_store_that_is_not_there_is_unavailable(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    for name, value in (servers.S3_CREDENTIALS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}).items():
        monkeypatch.setenv(name, value)
    storage = open_storage("s3://bucket/prefix")
    with pytest.raises(Unavailable):
        storage.check()


@pytest.mark.parametrize("fault", ["short", "flipped", "dropped"])
def test_a_store_that_lies_is_found_out(
    s3_bucket: Callable[[str], str], file: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Answers 200 and keeps other bytes: one less, one bit flipped, or none at all."""
    storage = open_storage(s3_bucket("moto"))
    put = obstore.put

    def lying(store: object, key: str, source: Path) -> None:
        content = bytearray(source.read_bytes())
        if fault == "short":
            del content[-1]
        content[5] ^= fault == "flipped"
        if fault != "dropped":
            put(store, key, bytes(content))  # type: ignore[arg-type]

    monkeypatch.setattr(obstore, "put", lying)
    with pytest.raises((ObjectDamaged, ObjectMissing)):
        storage.put_file("a/b", file, file_sha256(file))
    assert list(storage.keys("a")) == []


def test_the_secret_key_may_lie_in_a_file(
    s3_bucket: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = s3_bucket("nanio")  # which checks signatures
    secret = tmp_path / "key"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY_FILE", str(secret))
    secret.write_text(f"{os.environ['AWS_SECRET_ACCESS_KEY']}\n")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    open_storage(url).check()
    secret.write_text("another-key")
    with pytest.raises(Unavailable):
        open_storage(url).check()


def test_only_known_schemes_are_opened() -> None:
    with pytest.raises(ValueError, match="LUTHIER_STORAGE_URL"):
        open_storage("http://example.org")
