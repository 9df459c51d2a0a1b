"""POST /adapters: adapters from elsewhere, and everything that is none."""

import io
import json
import tarfile
from collections.abc import Mapping
from typing import Any

import httpx2
import pytest

from service import storage as objects
from service.errors import NoSpace
from tests.service import rows
from tests.service.adapter_files import make_adapter
from tests.service.site import Site

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD = make_adapter(1)


def send(site: Site, files: Mapping[str, bytes], key: str | None = None, **fields: Any) -> httpx2.Response:
    data = {"base_model": rows.BASE_MODEL, **fields}
    headers = {"Idempotency-Key": key} if key else {}
    named = {name: ("../../etc/x", content) for name, content in files.items()}
    return site.ann.post(
        "/adapters", data={k: v for k, v in data.items() if v is not None}, files=named, headers=headers
    )


def pair(config: bytes = GOOD[CONFIG], weights: bytes = GOOD[WEIGHTS]) -> dict[str, bytes]:
    return {"config": config, "weights": weights}


def tar(files: Mapping[str, bytes], folder: str = "adapter-1/") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def stored(site: Site, job: dict[str, Any]) -> dict[str, bytes]:
    prefix = f"jobs/{job['id']}/source/"
    keys = site.storage.keys(prefix.rstrip("/"))
    return {key.removeprefix(prefix): b"".join(site.storage.read(key)) for key in keys}


def test_two_files_become_a_job(site: Site) -> None:
    answer = send(site, pair(), name="from elsewhere", rank="16", quantization="nf4")
    job = answer.json()
    assert (answer.status_code, job["kind"], job["status"], job["name"]) == (202, "ingest", "queued", "from elsewhere")
    assert (job["base_model"], job["attempt"]) == (rows.BASE_MODEL, 0)
    assert job["spec"]["ingest"] == {"rank": 16, "max_error": 0.1, "quantization": "nf4"}
    assert stored(site, job) == {CONFIG: GOOD[CONFIG], WEIGHTS: GOOD[WEIGHTS]}
    assert site.claim().job_id == job["id"]
    assert not any(site.settings.work_dir.iterdir())


def test_a_tar_as_it_was_downloaded(sqlite_site: Site) -> None:
    for folder in ("", "adapter-1/", "./"):
        answer = send(sqlite_site, {"archive": tar(GOOD, folder)})
        assert answer.status_code == 202, answer.text
        assert stored(sqlite_site, answer.json()) == {CONFIG: GOOD[CONFIG], WEIGHTS: GOOD[WEIGHTS]}


def test_a_tar_by_gnu_with_long_names_and_folders(sqlite_site: Site) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        info = tarfile.TarInfo("a" * 150 + "/x")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"abc"))
        folder = tarfile.TarInfo("adapter")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name in (CONFIG, WEIGHTS):
            info = tarfile.TarInfo(f"adapter/{name}")
            info.size = len(GOOD[name])
            archive.addfile(info, io.BytesIO(GOOD[name]))
    answer = send(sqlite_site, {"archive": buffer.getvalue()})
    assert answer.status_code == 202, answer.text
    assert stored(sqlite_site, answer.json())[WEIGHTS] == GOOD[WEIGHTS]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_of_a_long_path(sqlite_site: Site, form: int) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name in (CONFIG, WEIGHTS):
            info = tarfile.TarInfo(f"{'x' * 60}/{'y' * 60}/checkpoint-500/{name}")
            info.size, info.mtime = len(GOOD[name]), 1.5
            archive.addfile(info, io.BytesIO(GOOD[name]))
    answer = send(sqlite_site, {"archive": buffer.getvalue()})
    assert answer.status_code == 202, answer.text
    hidden = buffer.getvalue().replace(b"x" * 60, b"../" * 20)
    assert send(sqlite_site, {"archive": hidden}).status_code in (415, 422)


def test_the_adapter_before_training_comes_along(sqlite_site: Site) -> None:
    before = make_adapter(2)
    files = pair() | {"initial_config": before[CONFIG], "initial_weights": before[WEIGHTS]}
    answer = send(sqlite_site, files)
    assert answer.status_code == 202, answer.text
    assert stored(sqlite_site, answer.json())[f"initial/{WEIGHTS}"] == before[WEIGHTS]
    half = send(sqlite_site, pair() | {"initial_config": before[CONFIG]})
    assert (half.status_code, half.json()["error"]["param"]) == (422, "initial_weights")


def test_the_same_key_and_files_are_one_job(site: Site) -> None:
    first, again = send(site, pair(), key="k"), send(site, pair(), key="k")
    assert (first.json()["id"], again.headers["idempotent-replayed"]) == (again.json()["id"], "true")
    other = send(site, pair(weights=make_adapter(2)[WEIGHTS]), key="k")
    assert other.json()["error"]["code"] == "idempotency_mismatch"


def renamed(header: dict[str, Any], size: int) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(size)


def member(name: str, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


TENSOR = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
# What is sent, the status, and what the message names.
HOSTILE: dict[str, tuple[dict[str, bytes], int, str]] = {
    "M3 nothing": ({}, 422, "config"),
    "M3 no weights": ({"config": GOOD[CONFIG]}, 422, "weights"),
    "M4 both ways": (pair() | {"archive": tar(GOOD)}, 422, "archive"),
    "M1 a pickle": (pair(weights=b"\x80\x02}q\x00."), 415, "pickle"),
    "M1 a zip": (pair(weights=b"PK\x03\x04" + bytes(100)), 415, "pickle"),
    "M1 GGUF": (pair(weights=b"GGUF" + bytes(100)), 415, "GGUF"),
    "M1 an array": (pair(weights=b"\x93NUMPY" + bytes(100)), 415, "NumPy"),
    "M2 a header longer than the file": (pair(weights=(10**6).to_bytes(8, "little") + b"{}"), 422, "header"),
    "M2 a header beyond the limit": (pair(weights=(10**9).to_bytes(8, "little") + b"{}"), 422, "header"),
    "M2 a header of 2.5 MB": (pair(weights=(5 << 19).to_bytes(8, "little") + b"{}"), 413, "header"),
    "M2 a header that is no JSON": (pair(weights=(8).to_bytes(8, "little") + b"not json"), 422, "JSON"),
    "M2 duplicate tensors": (
        pair(weights=(30).to_bytes(8, "little") + b'{"a":{"dtype":1},"a":{}}      ' + bytes(9)), 422, "twice"),
    "M2 tensors that overlap": (pair(weights=renamed({"a": TENSOR, "b": TENSOR}, 16)), 422, ""),
    "M2 a hole": (pair(weights=renamed({"a": TENSOR}, 20)), 422, ""),
    "M2 beyond the end": (pair(weights=renamed({"a": TENSOR}, 8)), 422, ""),
    "M2 a shape that overflows": (
        pair(weights=renamed({"a": TENSOR | {"shape": [2**62, 8]}}, 16)), 422, ""),
    "M2 an unknown type": (pair(weights=renamed({"a": TENSOR | {"dtype": "F33"}}, 16)), 422, ""),
    "M3 a config that is no JSON": (pair(config=b"peft"), 422, "config"),
    "M3 a config with a NaN": (pair(config=b'{"r": NaN}'), 422, "config"),
    "M3 a config of 200 KB": (pair(config=b" " * 200_000), 413, "config"),
    "M1 no tar": ({"archive": b"x" * 2000}, 415, "tar"),
    "M1 a compressed tar": ({"archive": b"\x1f\x8b" + bytes(600)}, 415, "tar"),
    "M1 half a tar": ({"archive": tar(GOOD)[:700]}, 422, "torn"),
    "M3 a tar without weights": ({"archive": tar({CONFIG: GOOD[CONFIG]})}, 422, "weights"),
    "M1 a tar with a pickle": ({"archive": tar({"adapter_model.bin": b"x"})}, 415, "pickle"),
    "M4 a file twice": ({"archive": tar({**GOOD, f"x/{CONFIG}": b"{}"})}, 422, "twice"),
    "M4 a path upwards": ({"archive": member(f"../{CONFIG}")}, 422, "out of the folder"),
    "M4 an absolute path": ({"archive": member(f"/etc/{CONFIG}")}, 422, "out of the folder"),
    "M4 a symbolic link": ({"archive": member(CONFIG, type=tarfile.SYMTYPE, linkname="/etc/passwd")}, 422, "plain"),
    "M4 a hard link": ({"archive": member(CONFIG, type=tarfile.LNKTYPE, linkname=WEIGHTS)}, 422, "plain"),
    "M4 a device": ({"archive": member(CONFIG, type=tarfile.CHRTYPE)}, 422, "plain"),
    "M4 a sparse file": ({"archive": member(CONFIG, type=tarfile.GNUTYPE_SPARSE)}, 422, "plain"),
    "M4 a note of 1 GB": ({"archive": member("x", type=tarfile.XHDTYPE, size=1 << 30)}, 422, "too long"),
    "M4 2000 members": ({"archive": b"".join(member(str(i))[:512] for i in range(2000)) + bytes(1024)}, 422, "1000"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_what_is_no_adapter_is_refused(shared_site: Site, case: str) -> None:
    files, status, word = HOSTILE[case]
    answer = send(shared_site, files or {"config": b""})
    error = answer.json()["error"]
    assert (answer.status_code, error["category"]) == (status, "user"), answer.text
    assert word in error["message"], error["message"]
    assert shared_site.ann.get("/jobs").json()["data"] == []
    assert not any(shared_site.settings.work_dir.iterdir())


# What the headers alone tell: entries of the config, other fields of make_adapter, and what the message names.
UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "M3 DoRA without its magnitudes": ({"use_dora": True}, "magnitude"),
    "M3 another kind": ({"peft_type": "IA3"}, "peft_type"),
    "M3 a rank that is not the tensors'": ({"r": 5}, "rank"),
    "M3 a module that is not targeted": ({"target_modules": ["v_proj"]}, "q_proj"),
    "M3 PiSSA without its beginning": ({"init_lora_weights": "pissa"}, "initial_weights"),
    "M3 another shape": ({"size": 16}, "base_model"),
    "M3 other layers": ({"modules": ["transformer.h.0.attn.c_attn"]}, "base_model"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_the_headers_tell_is_refused_at_once(shared_site: Site, case: str) -> None:
    fields, word = UNFIT[case]
    made = make_adapter(1, **fields)
    answer = send(shared_site, pair(made[CONFIG], made[WEIGHTS]))
    assert answer.status_code == 422, answer.text
    assert word in answer.json()["error"]["message"].lower(), answer.text
    assert shared_site.ann.get("/jobs").json()["data"] == []


def test_more_than_the_limit_is_refused(shared_site: Site) -> None:
    weights = renamed({"a": TENSOR | {"shape": [2**20], "data_offsets": [0, 1 << 22]}}, 1 << 22)
    for files in (pair(weights=weights), {"archive": tar({**GOOD, WEIGHTS: weights})}):
        answer = send(shared_site, files)
        assert answer.status_code == 413, answer.text


FIELDS: list[tuple[dict[str, Any], int, str]] = [
    ({"base_model": None}, 422, "base_model"),
    ({"base_model": "nope"}, 422, "base_model"),
    ({"base_model": "../x"}, 422, "base_model"),
    ({"name": "<b>"}, 422, "name"),
    ({"rank": "x"}, 422, "rank"),
    ({"rank": "1e9"}, 422, "rank"),
    ({"rank": "true"}, 422, "rank"),
    ({"max_error": "NaN"}, 422, "max_error"),
    ({"quantization": "nf3"}, 422, "quantization"),
    ({"output": "/etc"}, 422, "output"),
]


@pytest.mark.parametrize(("fields", "status", "param"), FIELDS)
def test_fields(shared_site: Site, fields: dict[str, Any], status: int, param: str) -> None:
    answer = send(shared_site, pair(), **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_only_forms_are_read(shared_site: Site) -> None:
    for kind in ("application/octet-stream", "application/json", "application/x-tar"):
        answer = shared_site.ann.post("/adapters", content=b"x", headers={"content-type": kind})
        assert answer.status_code == 415


def test_a_full_store_is_a_507_and_nothing_is_left(sqlite_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise NoSpace("could not store an object: No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(type(sqlite_site.storage), "put_file", full)
        answer = send(sqlite_site, pair(), key="k")
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "disk_full")
    (job,) = sqlite_site.ann.get("/jobs").json()["data"]
    assert (job["status"], job["error"]["code"]) == ("failed", "disk_full")
    assert isinstance(sqlite_site.storage, objects.LocalStorage)
    assert not any(sqlite_site.settings.work_dir.iterdir())
    assert send(sqlite_site, pair(), key="k").json()["status"] == "queued"
