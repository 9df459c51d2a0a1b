"""/adapters: what jobs leave, downloaded whole, in parts and as one archive."""

import hashlib
import io
import tarfile
from pathlib import Path

import httpx
import pytest

from service.storage import LocalStorage
from tests.service import rows
from tests.service.site import FILES, Site, listening

WEIGHTS = FILES["adapter_model.safetensors"]


@pytest.fixture
def adapter(site: Site, tmp_path: Path) -> str:
    site.train(name="support")
    return site.succeed(tmp_path)


@pytest.fixture(scope="module")
def shared_adapter(shared_site: Site, tmp_path_factory: pytest.TempPathFactory) -> str:
    shared_site.train()
    return shared_site.succeed(tmp_path_factory.mktemp("adapter"))


def test_an_adapter_tells_where_it_comes_from(site: Site, adapter: str) -> None:
    told = site.ann.get(f"/adapters/{adapter}").json()
    assert (told["object"], told["name"], told["kind"], told["rank"]) == ("adapter", "support", "train", 8)
    assert (told["base_model"], told["base_digest"]) == (rows.BASE_MODEL, "b" * 64)
    assert site.ann.get(f"/jobs/{told['job']}").json()["adapter"] == adapter
    assert told["files"] == [
        {"name": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in FILES.items()
    ]
    assert (told["parents"], told["metrics"]) == ([], {"train_loss": 0.5})
    assert site.ann.get("/adapters").json()["data"] == [told]
    assert site.ann.get(f"/adapters/{adapter}/files").json() == {"object": "list", "data": told["files"]}


def test_another_owners_adapter_is_like_none_at_all(site: Site, adapter: str) -> None:
    nobodys = "adapter-" + "0" * 32
    paths = ["", "/files", "/files/README.md", "/archive"]
    for method, path in [("GET", path) for path in paths] + [("DELETE", ""), ("HEAD", "/archive")]:
        other = site.bob.request(method, f"/adapters/{adapter}{path}")
        none = site.bob.request(method, f"/adapters/{nobodys}{path}")
        assert other.status_code == none.status_code == 404
        assert other.text.replace(adapter, "") == none.text.replace(nobodys, "")
    answers = [site.bob.post("/adapters/merge", json={"adapters": [{"adapter": a}]}) for a in (adapter, nobodys)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert site.bob.get("/adapters").json()["data"] == []
    assert site.ann.get(f"/adapters/{adapter}").status_code == 200


def test_a_deleted_adapter_is_gone(site: Site, adapter: str) -> None:
    deleted = site.ann.delete(f"/adapters/{adapter}").json()
    assert deleted == {"id": adapter, "object": "adapter", "deleted": True}
    for path in ["", "/files", "/files/README.md", "/archive"]:
        assert site.ann.get(f"/adapters/{adapter}{path}").status_code == 404
    assert site.ann.delete(f"/adapters/{adapter}").status_code == 404
    assert site.ann.get("/adapters").json()["data"] == []


def test_a_file_comes_with_its_hash_as_etag(shared_site: Site, shared_adapter: str) -> None:
    url = f"/adapters/{shared_adapter}/files/adapter_model.safetensors"
    whole = shared_site.ann.get(url)
    etag = f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    assert (whole.status_code, whole.content) == (200, WEIGHTS)
    assert (whole.headers["etag"], whole.headers["content-length"]) == (etag, str(len(WEIGHTS)))
    assert whole.headers["content-disposition"] == 'attachment; filename="adapter_model.safetensors"'
    assert (whole.headers["x-content-type-options"], whole.headers["accept-ranges"]) == ("nosniff", "bytes")
    head = shared_site.ann.head(url)
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", str(len(WEIGHTS)))
    for tags in (etag, f'W/{etag}, "x"', f'"x", {etag}', "*"):
        unchanged = shared_site.ann.get(url, headers={"If-None-Match": tags, "Range": "bytes=0-1"})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", etag)
    assert shared_site.ann.get(url, headers={"If-None-Match": '"x"'}).status_code == 200


SIZE = len(WEIGHTS)
RANGES: list[tuple[str, int, slice | None]] = [
    ("bytes=0-0", 206, slice(0, 1)),
    ("bytes=10-19", 206, slice(10, 20)),
    ("bytes=102300-", 206, slice(102300, None)),
    ("bytes=-7", 206, slice(-7, None)),
    (f"bytes=5-{10**18}", 206, slice(5, None)),
    (f"bytes=-{10**18}", 206, slice(0, None)),
    (f"bytes={SIZE - 1}-{SIZE + 5}", 206, slice(SIZE - 1, None)),
    (f"bytes={SIZE}-", 416, None),
    ("bytes=-0", 416, None),
    (f"bytes={10**18}-", 416, None),
    ("bytes=0-1,4-5", 200, slice(None)),
    ("bytes=" + ",".join(["0-"] * 500), 200, slice(None)),
    ("bytes=9-5", 200, slice(None)),
    ("bytes=-", 200, slice(None)),
    ("bytes=a-b", 200, slice(None)),
    ("bytes=" + "9" * 5000 + "-", 200, slice(None)),
    ("lines=0-1", 200, slice(None)),
]


@pytest.mark.parametrize(("value", "status", "part"), RANGES)
def test_m7_ranges(shared_site: Site, shared_adapter: str, value: str, status: int, part: slice | None) -> None:
    url = f"/adapters/{shared_adapter}/files/adapter_model.safetensors"
    answer = shared_site.ann.get(url, headers={"Range": value})
    assert answer.status_code == status
    if part is None:
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
        assert answer.json()["error"]["code"] == "range_not_satisfiable"
        return
    assert answer.content == WEIGHTS[part]
    assert answer.headers["content-length"] == str(len(WEIGHTS[part]))
    if status == 206:
        start, stop, _ = part.indices(SIZE)
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{SIZE}"


def test_a_range_of_another_version_is_the_whole_file(shared_site: Site, shared_adapter: str) -> None:
    url = f"/adapters/{shared_adapter}/files/adapter_model.safetensors"
    etag = shared_site.ann.head(url).headers["etag"]
    for condition, status in [(etag, 206), ('"x"', 200), (f"W/{etag}", 200), ("Tue, 24 Nov 2026 06:00:00 GMT", 200)]:
        answer = shared_site.ann.get(url, headers={"Range": "bytes=0-1", "If-Range": condition})
        assert answer.status_code == status


def test_a_file_with_an_empty_body(sqlite_site: Site, tmp_path: Path) -> None:
    sqlite_site.train()
    adapter = sqlite_site.succeed(tmp_path, {"empty": b""})
    answer = sqlite_site.ann.get(f"/adapters/{adapter}/files/empty")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0")
    assert sqlite_site.ann.get(f"/adapters/{adapter}/files/empty", headers={"Range": "bytes=0-"}).status_code == 416


@pytest.mark.parametrize(
    "name",
    ["nope", "../README.md", "..%2fREADME.md", "%2e%2e/%2e%2e/etc/passwd", "..;/README.md", "..%5cREADME.md",
     "README.md%00", "README.md/", "/etc/passwd", "%252e%252e/x", "README.MD"],
)  # fmt: skip
def test_only_the_files_that_were_published_are_handed_out(shared_site: Site, shared_adapter: str, name: str) -> None:
    answer = shared_site.ann.get(f"/adapters/{shared_adapter}/files/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["category"] == "user"


def test_an_archive_is_one_tar_of_known_length(shared_site: Site, shared_adapter: str) -> None:
    url = f"/adapters/{shared_adapter}/archive"
    answer = shared_site.ann.get(url)
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'attachment; filename="{shared_adapter}.tar"'
    with tarfile.open(fileobj=io.BytesIO(answer.content), mode="r:") as archive:
        members = archive.getmembers()
        assert [member.name for member in members] == [f"{shared_adapter}/{name}" for name in sorted(FILES)]
        assert {(member.mtime, member.mode, member.uid) for member in members} == {(0, 0o644, 0)}
        for member in members:
            file = archive.extractfile(member)
            assert file is not None
            assert file.read() == FILES[member.name.rpartition("/")[2]]
    assert shared_site.ann.get(url).content == answer.content
    assert shared_site.ann.head(url).headers["content-length"] == str(len(answer.content))
    assert shared_site.ann.get(url, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


@pytest.mark.parametrize("path", ["files/adapter_model.safetensors", "archive"])
def test_damaged_bytes_never_make_a_whole_download(sqlite_site: Site, tmp_path: Path, path: str) -> None:
    sqlite_site.train()
    adapter = sqlite_site.succeed(tmp_path)
    (key,) = (key for key in sqlite_site.storage.keys("adapters") if key.endswith(".safetensors"))
    file = sqlite_site.settings.data_dir / "objects" / key
    content = bytearray(file.read_bytes())
    content[50_000] ^= 1
    file.write_bytes(content)
    with listening(sqlite_site.app) as url, pytest.raises(httpx.RemoteProtocolError, match="peer closed connection"):
        httpx.get(f"{url}/adapters/{adapter}/{path}", headers=sqlite_site.ann.headers)


def test_a_file_that_the_store_lost_is_told_as_our_fault(sqlite_site: Site, tmp_path: Path) -> None:
    sqlite_site.train()
    adapter = sqlite_site.succeed(tmp_path)
    assert isinstance(sqlite_site.storage, LocalStorage)
    sqlite_site.storage.delete_prefix("adapters")
    answer = sqlite_site.ann.get(f"/adapters/{adapter}/files/README.md")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "object_missing")
