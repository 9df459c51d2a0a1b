"""/artifacts and the jobs that leave them."""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest

from service import sweep
from tests.service import rows
from tests.service.site import Site

FILES = {"certificate.json": b"{}", "model.gguf": bytes(range(256)) * 40, "pictures/cosines.svg": b"<svg/>"}


@pytest.fixture
def artifact(site: Site, tmp_path: Path) -> str:
    adapter = site.adapter(tmp_path)
    answer = site.ann.post(f"/adapters/{adapter}/export", json={"format": "gguf", "name": "for llama.cpp"})
    assert answer.status_code == 202, answer.text
    return site.succeed(tmp_path, FILES, rank=None)


def test_an_artifact_tells_where_it_comes_from(site: Site, artifact: str) -> None:
    told = site.ann.get(f"/artifacts/{artifact}").json()
    assert (told["object"], told["kind"], told["name"]) == ("artifact", "export", "for llama.cpp")
    (adapter,) = site.ann.get("/adapters").json()["data"]
    assert told["parents"] == [{"adapter": adapter["id"], "weight": 1.0}]
    job = site.ann.get(f"/jobs/{told['job']}").json()
    assert (job["status"], job["kind"], job["artifact"], job["adapter"]) == ("succeeded", "export", artifact, None)
    assert job["metrics"] == told["metrics"] == {"train_loss": 0.5}
    assert site.ann.get("/artifacts").json()["data"] == [told]
    assert site.ann.get("/artifacts?kind=analyze").json()["data"] == []
    assert site.ann.get(f"/artifacts/{artifact}/files").json()["data"] == told["files"]


def test_its_files_come_alone_in_parts_and_together(site: Site, artifact: str) -> None:
    url = f"/artifacts/{artifact}"
    whole = site.ann.get(f"{url}/files/model.gguf")
    etag = f'"{hashlib.sha256(FILES["model.gguf"]).hexdigest()}"'
    assert (whole.content, whole.headers["etag"]) == (FILES["model.gguf"], etag)
    assert site.ann.get(f"{url}/files/model.gguf", headers={"If-None-Match": etag}).status_code == 304
    part = site.ann.get(f"{url}/files/model.gguf", headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, FILES["model.gguf"][10:20])
    picture = site.ann.get(f"{url}/files/pictures/cosines.svg")
    assert (picture.content, picture.headers["content-type"]) == (b"<svg/>", "image/svg+xml")
    assert picture.headers["content-disposition"].startswith("attachment")
    archive = site.ann.get(f"{url}/archive")
    with tarfile.open(fileobj=io.BytesIO(archive.content)) as tar:
        assert sorted(tar.getnames()) == [f"{artifact}/{name}" for name in sorted(FILES)]
    for name in ("../certificate.json", "nope", "pictures", "..%2f..%2fx"):
        assert site.ann.get(f"{url}/files/{name}").status_code == 404


def test_a_deleted_artifact_is_gone_and_then_its_objects(site: Site, artifact: str) -> None:
    deleted = site.ann.delete(f"/artifacts/{artifact}")
    assert deleted.json() == {"id": artifact, "object": "artifact", "deleted": True}
    for path in ("", "/files", "/files/model.gguf", "/archive"):
        assert site.ann.get(f"/artifacts/{artifact}{path}").status_code == 404
    assert site.ann.delete(f"/artifacts/{artifact}").status_code == 404
    (job,) = site.ann.get("/jobs?kind=export").json()["data"]
    assert (job["status"], job["artifact"]) == ("succeeded", None)
    sweep.purge_deleted(site.database, site.storage)
    assert list(site.storage.keys("artifacts")) == []
    assert list(site.storage.keys("adapters")) != []


def test_what_an_export_that_lost_has_uploaded_is_removed(site: Site, artifact: str, tmp_path: Path) -> None:
    told = site.ann.get(f"/artifacts/{artifact}").json()
    stale = tmp_path / "stale"
    stale.write_bytes(b"x")
    site.storage.put_file(f"artifacts/{told['job']}/e0/stale", stale, hashlib.sha256(b"x").hexdigest())
    with site.database.unit_of_work() as session:
        from service.models import Job

        session.get_one(Job, told["job"]).epoch = 2
    site.storage.put_file(f"artifacts/{told['job']}/e2/stale", stale, hashlib.sha256(b"x").hexdigest())
    sweep.purge_leftovers(site.database, site.storage, -1)
    assert f"artifacts/{told['job']}/e2/stale" not in set(site.storage.keys("artifacts"))
    assert site.ann.get(f"/artifacts/{artifact}/files/model.gguf").content == FILES["model.gguf"]


def test_another_owners_artifact_is_like_none_at_all(site: Site, artifact: str) -> None:
    nobodys = "artifact-" + "0" * 32
    cases = [("GET", path) for path in ("", "/files", "/files/model.gguf", "/archive")] + [("DELETE", "")]
    for method, path in cases:
        other = site.bob.request(method, f"/artifacts/{artifact}{path}")
        none = site.bob.request(method, f"/artifacts/{nobodys}{path}")
        assert other.status_code == none.status_code == 404
        assert other.text.replace(artifact, "") == none.text.replace(nobodys, "")
    assert site.bob.get("/artifacts").json()["data"] == []


def test_an_adapter_that_is_exported_cannot_be_deleted_meanwhile(site: Site, tmp_path: Path) -> None:
    adapter = site.adapter(tmp_path)
    site.ann.post(f"/adapters/{adapter}/export", json={})
    assert site.ann.delete(f"/adapters/{adapter}").json()["error"]["code"] == "in_use"


EXPORTS: list[tuple[dict[str, Any], str]] = [
    ({"format": "onnx"}, "format"),
    ({"format": "peft", "max_shard_bytes": 10**9}, "max_shard_bytes"),
    ({"format": "merged", "dtype": "fp8"}, "dtype"),
    ({"weight": 1e9}, "weight"),
    ({"weights": {"(a+)+$": 1}}, "weights"),
    ({"others": [{"adapter": "x", "weight": "1"}]}, "others[0].weight"),
    ({"merge": {"method": "ties"}}, "merge.method"),
    ({"format": "merged", "merge": {"method": "ties", "rank": 4}}, "merge.rank"),
    ({"format": "merged", "merge": {"density": 0.5}}, "merge.density"),
    ({"others": [{"adapter": "x", "weights": {f"m{i}": 1 for i in range(600)}}] * 2}, "others"),
    ({"others": [{"adapter": "x"}] * 64}, "others"),
    ({"output": "/etc"}, "output"),
    ({"name": "\u202e"}, "name"),
]


@pytest.mark.parametrize(("body", "param"), EXPORTS)
def test_an_export_that_cannot_be_is_refused_by_field(shared_site: Site, body: dict[str, Any], param: str) -> None:
    answer = shared_site.ann.post("/adapters/adapter-1/export", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param), answer.text


UNFIT: list[tuple[str, dict[str, Any], str]] = [
    ("export", {"weight": 0}, "weight"),
    ("export", {"weights": {"nope_proj": 1}}, "nope_proj"),
    ("analyze", {"weight": 0}, "weight"),
]


@pytest.mark.parametrize(("verb", "fields", "word"), UNFIT)
def test_what_headers_tell_is_refused_at_once(
    sqlite_site: Site, tmp_path: Path, verb: str, fields: dict[str, Any], word: str
) -> None:
    adapter = sqlite_site.adapter(tmp_path)
    path, body = f"/adapters/{adapter}/export", fields
    if verb == "analyze":
        path, body = "/adapters/analyze", {"adapters": [{"adapter": adapter, **fields}]}
    answer = sqlite_site.ann.post(path, json=body)
    assert (answer.status_code, word in answer.json()["error"]["message"]) == (422, True), answer.text
    assert sqlite_site.ann.get(f"/jobs?kind={verb}").json()["data"] == []


def test_others_must_be_ones_own(site: Site, tmp_path: Path) -> None:
    adapter = site.adapter(tmp_path)
    answer = site.ann.post(f"/adapters/{adapter}/export", json={"others": [{"adapter": "adapter-1"}]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "others[0]")
    assert site.bob.post(f"/adapters/{adapter}/export", json={}).status_code == 404


def test_a_search_names_different_adapters_and_a_dataset(site: Site, tmp_path: Path) -> None:
    adapter, dataset = site.adapter(tmp_path), rows.add_dataset(site.database, site.ids["ann"])

    def ask(**fields: Any) -> tuple[int, str | None]:
        answer = site.ann.post("/adapters/search-weights", json={"adapters": [adapter], "dataset": dataset, **fields})
        return answer.status_code, (answer.json()["error"] or {}).get("param")

    assert ask() == (202, None)
    assert ask(adapters=[adapter, adapter]) == (422, "adapters")
    assert ask(adapters=[adapter, "adapter-1"]) == (404, "adapters[1]")
    assert ask(dataset="dataset-1") == (404, "dataset")
    assert ask(per="head") == (422, "per")
    assert ask(adapters=[]) == (422, "adapters")


def test_only_a_merge_can_be_verified(site: Site, tmp_path: Path) -> None:
    adapter = site.adapter(tmp_path)
    answer = site.ann.post(f"/adapters/{adapter}/verify")
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_merged")
    merged = site.ann.post("/adapters/merge", json={"adapters": [{"adapter": adapter}]}).json()["id"]
    queued = site.ann.post(f"/adapters/{merged}/verify", headers={"Idempotency-Key": "v"})
    assert (queued.status_code, queued.json()["kind"]) == (202, "verify")
    again = site.ann.post(f"/adapters/{merged}/verify", headers={"Idempotency-Key": "v"})
    assert again.json()["id"] == queued.json()["id"]
    assert site.ann.delete(f"/adapters/{merged}").status_code == 409
    assert site.bob.post(f"/adapters/{merged}/verify").status_code == 404


def test_an_extraction_needs_two_models_of_one_shape(site: Site) -> None:
    rows.add_base_model(site.database, "tuned", digest="e" * 64)
    rows.add_base_model(site.database, "wider", digest="f" * 64, modules=rows.MODULES[:1])

    def ask(tuned: str) -> tuple[int, str | None]:
        answer = site.ann.post("/adapters/extract", json={"base_model": rows.BASE_MODEL, "tuned_model": tuned})
        return answer.status_code, (answer.json()["error"] or {}).get("param")

    assert ask("tuned") == (202, None)
    for other in ("wider", "nope", rows.BASE_MODEL):
        assert ask(other) == (422, "tuned_model")
