"""POST /adapters/merge: known by recipe, checked from headers, small stacks at once."""

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from fastapi.testclient import TestClient

from service import merges, sources
from service.models import Adapter
from tests.service import rows
from tests.service.adapter_files import NAMES, deltas, make_adapter
from tests.service.site import Site, merge


@pytest.fixture
def pair(site: Site, tmp_path: Path) -> list[str]:
    """Two adapters of different ranks, the second with a scaling of its own."""
    return [
        site.adapter(tmp_path, make_adapter(1, rank=2)),
        site.adapter(tmp_path, make_adapter(2, rank=3, lora_alpha=12)),
    ]


def download(site: Site, adapter: str, folder: Path) -> Path:
    folder.mkdir()
    for file in site.ann.get(f"/adapters/{adapter}/files").json()["data"]:
        (folder / file["name"]).write_bytes(site.ann.get(f"/adapters/{adapter}/files/{file['name']}").content)
    return folder


def test_a_small_stack_is_there_with_the_answer(site: Site, pair: list[str], tmp_path: Path) -> None:
    began = time.monotonic()
    answer = merge(site, (pair[0], 0.5), (pair[1], -2), name="both")
    assert time.monotonic() - began < 5  # with numpy's first import; the demand is a second
    told = answer.json()
    assert (answer.status_code, told["object"], told["kind"], told["name"]) == (201, "adapter", "merge", "both")
    assert told["rank"] == 5
    assert told["parents"] == [{"adapter": pair[0], "weight": 0.5}, {"adapter": pair[1], "weight": -2}]
    assert told["metrics"]["certificate"]["frobenius"] < 1e-6
    parts = [deltas(download(site, adapter, tmp_path / adapter)) for adapter in pair]
    merged = deltas(download(site, told["id"], tmp_path / "merged"))
    for name in (f"base_model.model.{module}" for module in NAMES):
        exact = 0.5 * parts[0][name] - 2 * parts[1][name]
        assert np.linalg.norm(merged[name] - exact) <= 1e-6 * np.linalg.norm(exact)
    job = site.ann.get(f"/jobs/{told['job']}").json()
    assert (job["kind"], job["status"], job["adapter"]) == ("merge", "succeeded", told["id"])
    assert not any(site.settings.work_dir.iterdir())


def test_a_recipe_is_answered_with_the_adapter_it_gave(site: Site, pair: list[str]) -> None:
    first = merge(site, (pair[0], 1), (pair[1], 3))
    again = merge(site, (pair[1], 1), (pair[0], 1), (pair[1], 2))  # the same sum, said in another way
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert merge(site, (pair[0], 1), (pair[1], 3.5)).json()["id"] != first.json()["id"]
    assert merge(site, (pair[0], 1), (pair[1], 3), dtype="fp16").json()["id"] != first.json()["id"]
    site.ann.delete(f"/adapters/{first.json()['id']}")
    anew = merge(site, (pair[0], 1), (pair[1], 3))
    assert (anew.status_code, anew.json()["digest"]) == (201, first.json()["digest"])
    assert anew.json()["id"] != first.json()["id"]


def test_other_methods_are_jobs_and_one_recipe_has_one(site: Site, pair: list[str], tmp_path: Path) -> None:
    asked: dict[str, Any] = {"method": "linear", "rank": 2}
    first = merge(site, (pair[0], 1), (pair[1], 1), **asked)
    again = merge(site, (pair[1], 1), (pair[0], 1), **asked)
    job = first.json()
    assert (first.status_code, again.status_code) == (202, 202)
    assert (job["object"], job["status"], job["id"]) == ("job", "queued", again.json()["id"])
    assert job["spec"]["adapters"][0] == {"adapter": pair[0], "weight": 1, "weights": {}}
    assert (job["spec"]["method"], job["spec"]["rank"], job["spec"]["dtype"]) == ("linear", 2, "fp32")
    in_use = site.ann.delete(f"/adapters/{pair[0]}")
    assert (in_use.status_code, in_use.json()["error"]["code"]) == (409, "in_use")
    made = site.succeed(tmp_path)
    known = merge(site, (pair[0], 1), (pair[1], 1), **asked)
    assert (known.status_code, known.json()["id"]) == (200, made)
    site.ann.delete(f"/adapters/{pair[0]}")
    assert site.ann.get(f"/adapters/{made}").json()["parents"][0]["adapter"] == pair[0]


def test_a_cancelled_recipe_can_be_asked_for_again(site: Site, pair: list[str]) -> None:
    first = merge(site, (pair[0], 1), method="linear", rank=1).json()["id"]
    site.claim()
    site.ann.post(f"/jobs/{first}/cancel")
    assert merge(site, (pair[0], 1), method="linear", rank=1).json()["id"] != first


def test_the_same_key_is_the_same_merge(site: Site, pair: list[str]) -> None:
    first = merge(site, (pair[0], 2), key="once")
    again = merge(site, (pair[0], 2), key="once")
    assert (first.status_code, again.status_code, again.json()["id"]) == (201, 200, first.json()["id"])
    assert again.headers["idempotent-replayed"] == "true"
    other = merge(site, (pair[0], 3), key="once")
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")


def test_one_recipe_asked_for_many_times_at_once_is_made_once(site: Site, pair: list[str]) -> None:
    start, answers = threading.Barrier(6), list[httpx2.Response]()

    def ask(client: TestClient) -> None:
        start.wait()
        body = {"adapters": [{"adapter": pair[0], "weight": 1.25}, {"adapter": pair[1]}]}
        answers.append(client.post("/adapters/merge", json=body))

    threads = [threading.Thread(target=ask, args=(site.client("ann"),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.status_code for answer in answers).count(201) == 1
    assert {answer.status_code for answer in answers} <= {200, 201, 202}
    (job,) = site.ann.get("/jobs?kind=merge").json()["data"]
    assert job["status"] == "succeeded"
    for answer in answers:
        told = answer.json()
        assert told["id"] == (job["id"] if told["object"] == "job" else job["adapter"])


def test_an_alias_that_moves_meanwhile_changes_nothing(
    site: Site, pair: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.ann.put("/adapters/aliases/live", json={"adapter": pair[0]})
    check = sources.check_headers

    def moved(*arguments: Any) -> None:
        site.ann.put("/adapters/aliases/live", json={"adapter": pair[1]})
        check(*arguments)

    monkeypatch.setattr(sources, "check_headers", moved)
    assert merge(site, ("live", 1)).json()["parents"] == [{"adapter": pair[0], "weight": 1}]


def test_the_order_of_patterns_is_part_of_the_request(site: Site, pair: list[str]) -> None:
    orders = [{"*": 0.5, "q_proj": 1}, {"q_proj": 1, "*": 0.5}]
    answers = [
        site.ann.post(
            "/adapters/merge",
            json={"adapters": [{"adapter": pair[0], "weights": weights}]},
            headers={"Idempotency-Key": "k"},
        )
        for weights in orders
    ]
    assert [answer.status_code for answer in answers] == [201, 422]
    assert answers[1].json()["error"]["code"] == "idempotency_mismatch"


def test_a_damaged_config_is_our_fault(sqlite_site: Site, tmp_path: Path) -> None:
    adapter = sqlite_site.adapter(tmp_path)
    (key,) = (key for key in sqlite_site.storage.keys("adapters") if key.endswith("adapter_config.json"))
    (sqlite_site.settings.data_dir / "objects" / key).write_bytes(b"{}")
    answer = merge(sqlite_site, (adapter, 1))
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "object_missing")


def test_a_large_stack_is_a_job(site: Site, pair: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    object.__setattr__(site.settings, "max_merge_in_request_bytes", 100)
    assert merge(site, (pair[0], 1), (pair[1], 1)).status_code == 202


def test_no_more_than_two_stacks_are_made_at_once(site: Site, pair: list[str]) -> None:
    assert merges._AT_ONCE.acquire(blocking=False)
    assert merges._AT_ONCE.acquire(blocking=False)
    try:
        assert merge(site, (pair[0], 1)).status_code == 202
    finally:
        merges._AT_ONCE.release()
        merges._AT_ONCE.release()


def test_weights_of_modules(site: Site, pair: list[str], tmp_path: Path) -> None:
    body = {"adapters": [{"adapter": pair[0], "weight": 0, "weights": {"q_proj": 1, "layers.1.*": -2}}]}
    answer = site.ann.post("/adapters/merge", json=body)
    assert answer.status_code == 201, answer.text
    part = deltas(download(site, pair[0], tmp_path / "part"))
    merged = deltas(download(site, answer.json()["id"], tmp_path / "merged"))
    weights = {"layers.0.self_attn.q_proj": 1, "layers.1.self_attn.q_proj": -2, "layers.1.self_attn.v_proj": -2}
    for name, delta in part.items():
        weight = weights.get(name.removeprefix("base_model.model.model."), 0)
        np.testing.assert_allclose(merged[name], weight * delta, rtol=1e-6, atol=1e-7)
    assert site.ann.get(f"/jobs/{answer.json()['job']}").json()["spec"]["adapters"][0]["weights"]["layers.1.*"] == -2


MERGES: list[tuple[Any, int, str | None]] = [
    ({}, 422, "adapters"),
    ({"adapters": []}, 422, "adapters"),
    ({"adapters": "adapter-1"}, 422, "adapters"),
    ({"adapters": [{"adapter": "adapter-1", "weight": "1"}]}, 422, "adapters[0].weight"),
    ({"adapters": [{"adapter": "adapter-1", "weight": 1e5}]}, 422, "adapters[0].weight"),
    ({"adapters": [{"adapter": "adapter-1", "weights": {"q_proj": 1e5}}]}, 422, "adapters[0].weights"),
    ({"adapters": [{"adapter": "adapter-1", "weights": {"(a+)+$": 1}}]}, 422, "adapters[0].weights"),
    ({"adapters": [{"adapter": "adapter-1", "path": "/etc"}]}, 422, "adapters[0].path"),
    ({"adapters": [{"adapter": "adapter-1"}] * 65}, 422, "adapters"),
    ({"adapters": [{"adapter": "a", "weights": {f"m{i}": 1 for i in range(600)}}] * 2}, 422, "adapters"),
    ({"adapters": [{"adapter": "adapter-1"}], "method": "average"}, 422, "method"),
    ({"adapters": [{"adapter": "adapter-1"}], "density": 0.5}, 422, "density"),
    ({"adapters": [{"adapter": "adapter-1"}], "method": "ties", "density": 2}, 422, "density"),
    ({"adapters": [{"adapter": "adapter-1"}], "method": "linear", "rank": 10**9}, 422, "rank"),
    ({"adapters": [{"adapter": "adapter-1"}], "output": "/etc"}, 422, "output"),
    ({"adapters": [{"adapter": "adapter-1"}], "name": "<b>"}, 422, "name"),
    ({"adapters": [{"adapter": "../x"}]}, 404, "adapters[0]"),
]


@pytest.mark.parametrize(("body", "status", "param"), MERGES)
def test_a_merge_that_cannot_be_is_refused_by_field(
    shared_site: Site, body: Any, status: int, param: str | None
) -> None:
    answer = shared_site.ann.post("/adapters/merge", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


# (the second adapter, fields of the request, what the message names)
UNFIT: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "other base": ({"base_digest": "c" * 64, "base_name": "other"}, {}, ("base", "adapter-")),
    "other shape": ({"size": 16}, {}, ("q_proj", "16", "32")),
    "layers called otherwise": ({"modules": ["transformer.h.0.attn.c_attn"], "base_digest": None}, {}, ("called",)),
    "ranks over the limit": ({"rank": 4096}, {}, ("4098", "4096")),
    "weights that cancel": ({}, {"weights": (0, 0)}, ("weight",)),
    "a pattern that names nothing": ({}, {"patterns": {"nope_proj": 1}}, ("nope_proj",)),
    "DoRA": ({"use_dora": True}, {}, ("dora",)),
    "a rank that is not the config's": ({"r": 7}, {}, ("rank",)),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_merged_is_told_from_headers(
    sqlite_site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    made, asked, words = UNFIT[case]
    pair = [
        sqlite_site.adapter(tmp_path, make_adapter(1)),
        sqlite_site.adapter(tmp_path, make_adapter(2, **({"rank": 2} | made))),
    ]
    read: list[int] = []
    storage_read = type(sqlite_site.storage).read

    def counted(storage: Any, key: str, start: int = 0, length: int | None = None) -> Any:
        for chunk in storage_read(storage, key, start, length):
            read.append(len(chunk))
            yield chunk

    monkeypatch.setattr(type(sqlite_site.storage), "read", counted)
    weights = asked.get("weights", (1, 1))
    named = [{"adapter": adapter, "weight": weight} for adapter, weight in zip(pair, weights, strict=True)]
    if "patterns" in asked:
        named[1]["weights"] = asked["patterns"]
    for method in ("stack", "linear"):
        answer = sqlite_site.ann.post("/adapters/merge", json={"adapters": named, "method": method})
        error = answer.json()["error"]
        assert (answer.status_code, error["category"]) == (422, "user"), answer.text
        assert all(word.lower() in error["message"].lower() for word in words), error["message"]
    assert sum(read) < 700_000
    assert sqlite_site.ann.get("/jobs?kind=merge").json()["data"] == []
    assert not any(sqlite_site.settings.work_dir.iterdir())


def test_values_that_are_not_finite_are_refused(sqlite_site: Site, tmp_path: Path) -> None:
    files = make_adapter(1)
    weights = bytearray(files["adapter_model.safetensors"])
    weights[-4:] = np.float32("nan").tobytes()
    broken = sqlite_site.adapter(tmp_path, files | {"adapter_model.safetensors": bytes(weights)})
    answer = merge(sqlite_site, (broken, 1), key="k")
    assert (answer.status_code, "proj" in answer.json()["error"]["message"]) == (422, True), answer.text
    (job,) = sqlite_site.ann.get("/jobs?kind=merge").json()["data"]
    assert (job["status"], job["error"]["category"], job["adapter"]) == ("failed", "user", None)
    assert merge(sqlite_site, (broken, 1), key="k").status_code == 422


def test_a_merge_across_base_models_is_refused(site: Site, pair: list[str]) -> None:
    rows.add_base_model(site.database, "other")
    with site.database.unit_of_work() as session:
        session.get_one(Adapter, pair[1]).base_model_id = "other"
    answer = merge(site, (pair[0], 1), (pair[1], 1))
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "adapters")
    assert pair[1] in answer.json()["error"]["message"]


def test_a_certificate_says_how_exact_a_merge_is(site: Site, pair: list[str]) -> None:
    made = merge(site, (pair[0], 1), (pair[1], 1)).json()
    answer = site.ann.get(f"/adapters/{made['id']}/certificate")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    told = json.loads(answer.content)
    assert told["totals"] == made["metrics"]["certificate"]
    assert site.ann.get(f"/adapters/{pair[0]}/certificate").status_code == 404
    assert site.bob.get(f"/adapters/{made['id']}/certificate").status_code == 404


def test_another_owners_adapter_is_like_none_at_all(site: Site, pair: list[str]) -> None:
    nobodys = "adapter-" + "0" * 32
    answers = [site.bob.post("/adapters/merge", json={"adapters": [{"adapter": a}]}) for a in (pair[0], nobodys)]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert answers[0].text.replace(pair[0], "") == answers[1].text.replace(nobodys, "")
    merge(site, (pair[0], 1.5))
    body = {"adapters": [{"adapter": pair[0], "weight": 1.5}]}  # known by its recipe, but not to bob
    assert site.bob.post("/adapters/merge", json=body).status_code == 404
