"""/base-models: the catalogue as users see it."""

from tests.service import rows
from tests.service.site import Site


def test_the_catalogue_is_the_same_for_everybody(site: Site) -> None:
    files = [{"name": "model.safetensors", "size": 5, "sha256": "a" * 64}]
    head = {"name": "lm_head", "inputs": 32, "outputs": 99, "head": True}
    rows.add_base_model(site.database, "big", files=files, modules=[*rows.MODULES, head], revision="f" * 40)
    told = site.ann.get("/base-models/big").json()
    created_at = told.pop("created_at")
    assert created_at > 1.7e9
    assert told == {
        "id": "big", "object": "base_model", "source": "big", "revision": "f" * 40, "digest": "b" * 64,
        "files": files, "architecture": "LlamaForCausalLM", "parameters": 1000, "context_length": 64,
        "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    page = site.bob.get("/base-models").json()
    assert [model["id"] for model in page["data"]] == [rows.BASE_MODEL, "big"]
    assert site.bob.get("/base-models", params={"after": rows.BASE_MODEL}).json()["data"] == [told | page["data"][1]]


def test_where_a_base_model_lies_is_nobodys_business(site: Site) -> None:
    rows.add_base_model(site.database, "secret", folder="/srv/secret/place")
    assert "/srv/secret/place" not in site.ann.get("/base-models").text
    assert "folder" not in site.ann.get("/base-models/secret").json()


def test_an_unknown_one_is_404(site: Site) -> None:
    assert site.ann.get("/base-models/nope").json()["error"]["code"] == "not_found"
