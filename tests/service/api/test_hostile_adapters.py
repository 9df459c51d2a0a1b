"""Hostile adapters and downloads, M1 to M8; what is refused while it arrives is in test_adapter_uploads."""

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from service import sweep
from service.api import download
from tests.service import rows
from tests.service.api.hostile import check
from tests.service.api.test_adapter_uploads import CONFIG, GOOD, WEIGHTS, pair, send, stored, tar
from tests.service.site import Site, listening


def test_m3_a_config_names_nothing_that_is_loaded(sqlite_site: Site) -> None:
    """Paths, classes and code that a config points to are words: the base model is the one that the request names."""
    words = {
        "base_model_name_or_path": "/etc/passwd",
        "revision": "../x",
        "auto_mapping": {"base_model_class": "os.system", "parent_library": "os"},
    }
    answer = send(sqlite_site, pair(config=json.dumps(json.loads(GOOD[CONFIG]) | words).encode()))
    if answer.status_code == 202:
        assert answer.json()["base_model"] == rows.BASE_MODEL
    else:
        assert "auto_mapping" in check(answer, 422)["message"]


def test_m4_other_files_of_an_archive_are_not_kept(sqlite_site: Site) -> None:
    others = {"tokenizer.json": b"{}", "chat_template.jinja": b"{{ 1 }}", "tokenizer_config.json": b"{}", "x.py": b"x"}
    answer = send(sqlite_site, {"archive": tar({**others, **GOOD})})
    assert set(stored(sqlite_site, answer.json())) == {CONFIG, WEIGHTS}
    for name in ("tokenizer", "tokenizer.json", "chat_template"):
        assert check(send(sqlite_site, {**pair(), name: b"{}"}), 422)["param"] == name


@pytest.mark.parametrize("path", ["archive", f"files/{WEIGHTS}"])
def test_m8_a_download_is_whole_or_breaks_off(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The adapter is deleted and its objects are swept meanwhile: what arrives is all of it, or visibly cut."""
    adapter = sqlite_site.adapter(tmp_path, {CONFIG: b"{}", WEIGHTS: bytes(8 << 20), "z.md": b"last"})
    whole = sqlite_site.ann.get(f"/adapters/{adapter}/{path}").content
    swept = threading.Event()

    def slow(chunks: Any, file: download.StoredFile) -> Any:
        for index, chunk in enumerate(verified(chunks, file)):
            yield chunk
            if index == 0:
                swept.wait(20)

    verified = download.verified
    monkeypatch.setattr(download, "verified", slow)
    with listening(sqlite_site.app) as url, httpx.Client(base_url=url, headers=sqlite_site.ann.headers) as client:
        received, broken = b"", False
        with client.stream("GET", f"/adapters/{adapter}/{path}", timeout=20) as answer:
            try:
                for chunk in answer.iter_raw():
                    received += chunk
                    if not swept.is_set():
                        assert sqlite_site.ann.delete(f"/adapters/{adapter}").status_code == 200
                        sweep.purge_deleted(sqlite_site.database, sqlite_site.storage)
                        swept.set()
            except httpx.RemoteProtocolError:
                broken = True
    assert broken == (received != whole)
    assert not list(sqlite_site.storage.keys("adapters"))
