"""/adapters/aliases: a name is used wherever an id is, and moves in one step."""

from pathlib import Path
from typing import Any

import pytest

from tests.service.adapter_files import make_adapter
from tests.service.site import Site

PATHS = ["", "/files", "/files/README.md", "/archive"]


def name(site: Site, alias: str, adapter: str) -> Any:
    return site.ann.put(f"/adapters/aliases/{alias}", json={"adapter": adapter})


def test_an_alias_stands_for_an_adapter_everywhere(site: Site, tmp_path: Path) -> None:
    adapter = site.adapter(tmp_path)
    told = name(site, "live", adapter)
    assert (told.status_code, told.json()) == (200, {"alias": "live", "object": "adapter.alias", "adapter": adapter})
    assert site.ann.get("/adapters/aliases").json() == {"object": "list", "data": [told.json()]}
    for path in PATHS:
        assert site.ann.get(f"/adapters/live{path}").content == site.ann.get(f"/adapters/{adapter}{path}").content
    merged = site.ann.post("/adapters/merge", json={"adapters": [{"adapter": "live", "weight": 2}]}).json()
    assert merged["parents"] == [{"adapter": adapter, "weight": 2}]
    queued = site.ann.post("/adapters/live/export", json={"format": "merged"}).json()
    assert [source["adapter"] for source in queued["spec"]["adapters"]] == [adapter]


def test_an_alias_moves_and_what_was_queued_keeps_the_old_adapter(site: Site, tmp_path: Path) -> None:
    old, new = site.adapter(tmp_path), site.adapter(tmp_path, make_adapter(1))
    name(site, "live", old)
    queued = site.ann.post("/adapters/live/export", json={}).json()["id"]
    name(site, "live", new)
    assert site.ann.get("/adapters/live").json()["id"] == new
    assert site.ann.get(f"/jobs/{queued}").json()["spec"]["adapters"][0]["adapter"] == old
    assert name(site, "also", "live").json()["adapter"] == new


def test_an_alias_goes_alone_or_with_its_adapter(site: Site, tmp_path: Path) -> None:
    adapter = site.adapter(tmp_path)
    name(site, "a", adapter)
    name(site, "b", adapter)
    gone = site.ann.delete("/adapters/aliases/a")
    assert gone.json() == {"id": "a", "object": "adapter.alias", "deleted": True}
    assert site.ann.delete("/adapters/aliases/a").status_code == 404
    assert site.ann.get("/adapters/a").status_code == 404
    assert site.ann.delete("/adapters/b").json()["id"] == adapter
    assert site.ann.get("/adapters/aliases").json()["data"] == []


def test_owners_have_names_of_their_own(site: Site, tmp_path: Path) -> None:
    adapter = site.adapter(tmp_path)
    name(site, "live", adapter)
    for path in PATHS:
        assert site.bob.get(f"/adapters/live{path}").status_code == 404
    assert site.bob.put("/adapters/aliases/live", json={"adapter": adapter}).status_code == 404
    assert site.bob.put("/adapters/aliases/mine", json={"adapter": "live"}).status_code == 404
    assert site.bob.delete("/adapters/aliases/live").status_code == 404
    assert site.bob.get("/adapters/aliases").json()["data"] == []


@pytest.mark.parametrize("alias", ["aliases", "adapter-" + "0" * 32, "-x", "x" * 101, "a b", "a%00b", "a\u202eb"])
def test_what_cannot_be_an_alias(shared_site: Site, alias: str) -> None:
    answer = shared_site.ann.put(f"/adapters/aliases/{alias}", json={"adapter": "x"})
    assert answer.status_code in (404, 422), answer.text


def test_a_body_that_names_no_adapter(shared_site: Site) -> None:
    for body, status in (
        ({}, 422),
        ({"adapter": 1}, 422),
        ({"adapter": "x", "owner": "y"}, 422),
        ({"adapter": "x"}, 404),
    ):
        assert shared_site.ann.put("/adapters/aliases/live", json=body).status_code == status
