"""Exports and searches that a base model, a format or the stack's width rules out: 422 at the request, from headers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from service import leases
from service.models import Adapter, BaseModel
from service.storage import put_folder
from tests.service import rows
from tests.service.adapter_files import NAMES, make_adapter
from tests.service.site import FILES, Site

HEAD = {"name": "lm_head", "inputs": 32, "outputs": 32, "head": True}
LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
TOKENIZER = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "normalizer": None, "pre_tokenizer": BYTES}
MERGED = "gguf-merged"


@pytest.fixture
def based(sqlite_site: Site, tmp_path: Path) -> Site:
    """The base model has a folder with its config and tokenizer, and an output head."""
    describe(sqlite_site, tmp_path)
    return sqlite_site


def describe(site: Site, tmp_path: Path, config: Any = LLAMA, tokenizer: Any = TOKENIZER) -> None:
    folder = tmp_path / f"base-{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, value in (("config", config), ("tokenizer", tokenizer), ("tokenizer_config", settings)):
        (folder / f"{name}.json").write_text(json.dumps(value))
    with site.database.unit_of_work() as session:
        row = session.get_one(BaseModel, rows.BASE_MODEL)
        row.folder, row.modules = str(folder), [*rows.MODULES, HEAD]


def trained_on(files: dict[str, bytes], quantization: str) -> dict[str, bytes]:
    lineage = json.loads(files["lineage.json"]) | {"training": {"quantization": quantization}}
    return files | {"lineage.json": json.dumps(lineage).encode()}


def assert_refused(site: Site, answer: httpx2.Response, param: str | None, words: Sequence[str]) -> None:
    error = answer.json().get("error") or {}
    assert (answer.status_code, error.get("category"), error.get("param")) == (422, "user", param), answer.text
    assert all(word in error["message"] for word in words), error["message"]
    assert all(job["kind"] == "train" for job in site.ann.get("/jobs").json()["data"])
    assert not any(site.settings.work_dir.iterdir())


@pytest.mark.parametrize("layout", ["peft", "peft-portable", "merged", "gguf", MERGED, "mlx"])
def test_what_fits_is_queued(based: Site, tmp_path: Path, layout: str) -> None:
    adapter = based.adapter(tmp_path)
    assert based.ann.post(f"/adapters/{adapter}/export", json={"format": layout}).status_code == 202


WINDOWS = {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}
KINDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "a kind without names": ("gguf", {"model_type": "gpt2"}, ("gpt2", "Export it merged")),
    "a kind without names, whole": (MERGED, {"model_type": "mixtral"}, ("mixtral", "Export it merged")),
    "only as an adapter": (MERGED, {"model_type": "gemma2"}, ("gemma2", "export it merged")),
    "windows": (MERGED, WINDOWS, ("sliding window", "gguf")),
    "mistral's window": (MERGED, {"model_type": "mistral"}, ("sliding window",)),
    "rotary": (MERGED, {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}, ("yarn", "export it merged")),
    "some rotary": (MERGED, {**LLAMA, "rope_parameters": {"partial_rotary_factor": 0.5}}, ("rotary",)),
    "layers without": (MERGED, {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 1]}, ("every fourth layer",)),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_model_that_the_format_does_not_know(based: Site, tmp_path: Path, case: str) -> None:
    layout, config, words = KINDS[case]
    adapter = based.adapter(tmp_path)
    describe(based, tmp_path, config)
    answer = based.ann.post(f"/adapters/{adapter}/export", json={"format": layout})
    assert_refused(based, answer, "format", words)
    assert based.ann.post(f"/adapters/{adapter}/export", json={"format": "merged"}).status_code == 202


TOKENIZERS: dict[str, tuple[dict[str, Any], str]] = {
    "Unigram": ({"model": {"type": "Unigram"}}, "of the kind Unigram"),
    "BPE over characters": ({"model": {"type": "BPE", "byte_fallback": True}}, "BPE over characters"),
    "another way to split": ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
    "a normalizer": ({"normalizer": {"type": "Lowercase"}}, "splits texts by"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_llama_cpp_does_not_share(based: Site, tmp_path: Path, case: str) -> None:
    change, word = TOKENIZERS[case]
    adapter = based.adapter(tmp_path)
    describe(based, tmp_path, tokenizer=TOKENIZER | change)
    answer = based.ann.post(f"/adapters/{adapter}/export", json={"format": MERGED})
    assert_refused(based, answer, "format", (word, "export it merged"))
    assert based.ann.post(f"/adapters/{adapter}/export", json={"format": "gguf"}).status_code == 202


# (format, the adapter, field, what the message names)
UNFIT: dict[str, tuple[str, dict[str, Any], str | None, tuple[str, ...]]] = {
    "a tied head as gguf": ("gguf", {"modules": ["lm_head"]}, "format", ("lm_head", "export it as gguf-merged")),
    "a head as mlx": ("mlx", {"modules": ["lm_head"]}, "format", ("lm_head", "export it merged")),
    "a layer that is not there": ("gguf", {"modules": ["model.layers.9.mlp.up_proj"]}, None, ("layers.9", "use the")),
    "another shape": ("mlx", {"size": 16}, None, ("q_proj", "(16, 16)", "(32, 32)")),
    "another base": ("peft", {"base_digest": "c" * 64}, None, ("another base model", "c" * 64)),
    "DoRA": ("gguf", {"use_dora": True}, None, ("use_dora",)),
    "ranks": ("mlx", {"rank": 4097}, "adapters", ("4097", "4096", "compress")),
}


@pytest.mark.parametrize("case", UNFIT)
def test_an_adapter_that_the_format_has_no_place_for(based: Site, tmp_path: Path, case: str) -> None:
    layout, made, param, words = UNFIT[case]
    adapter = based.adapter(tmp_path, make_adapter(1, **made))
    answer = based.ann.post(f"/adapters/{adapter}/export", json={"format": layout})
    assert_refused(based, answer, param, words)


def test_an_export_on_which_weights_is_to_be_said(based: Site, tmp_path: Path) -> None:
    pair = [based.adapter(tmp_path, trained_on(make_adapter(seed), kind)) for seed, kind in ((1, "nf4"), (2, "int8"))]
    body = {"format": "merged", "others": [{"adapter": pair[1]}]}
    assert_refused(based, based.ann.post(f"/adapters/{pair[0]}/export", json=body), "base", ("int8, nf4", "say which"))
    assert based.ann.post(f"/adapters/{pair[0]}/export", json={**body, "base": "nf4"}).status_code == 202


def test_a_base_that_this_process_cannot_read_is_left_to_the_job(sqlite_site: Site, tmp_path: Path) -> None:
    adapter = sqlite_site.adapter(tmp_path)
    for layout in ("gguf", MERGED, "mlx"):
        assert sqlite_site.ann.post(f"/adapters/{adapter}/export", json={"format": layout}).status_code == 202


def search(site: Site, *adapters: str) -> httpx2.Response:
    dataset = rows.add_dataset(site.database, site.ids["ann"])
    return site.ann.post("/adapters/search-weights", json={"adapters": adapters, "dataset": dataset})


def test_a_search_over_the_ranks_that_it_takes(based: Site, tmp_path: Path) -> None:
    wide, wider, narrow = (based.adapter(tmp_path, make_adapter(rank, rank=rank)) for rank in (500, 525, 524))
    assert_refused(based, search(based, wide, wider), "adapters", ("1025", "1024", wider, "compress"))
    assert search(based, wide, narrow).status_code == 202


SEARCHES: dict[str, tuple[dict[str, Any], str]] = {
    "a layer that is not there": ({"modules": [*NAMES, "model.layers.9.mlp.up_proj"]}, "layers.9"),
    "another shape": ({"size": 16}, "16 × 16"),
    "a tied head": ({"modules": ["lm_head"]}, "merge without a search"),
    "another base": ({"base_digest": "c" * 64}, "another base model"),
}


@pytest.mark.parametrize("case", SEARCHES)
def test_a_search_that_cannot_run_on_its_base_model(based: Site, tmp_path: Path, case: str) -> None:
    made, word = SEARCHES[case]
    adapter = based.adapter(tmp_path, make_adapter(1, **made))
    assert_refused(based, search(based, adapter), "adapters", (adapter, word))


def test_a_searchs_adapter_tells_the_weights_that_were_found(site: Site, tmp_path: Path) -> None:
    pair = [site.adapter(tmp_path, make_adapter(seed)) for seed in (1, 2)]
    queued = search(site, *pair).json()["id"]
    claim = site.claim()
    assert (claim.job_id, claim.kind) == (queued, "search")
    digests = [site.ann.get(f"/adapters/{adapter}").json()["digest"] for adapter in pair]
    (tmp_path / "made").mkdir()
    for name, content in FILES.items():
        (tmp_path / "made" / name).write_bytes(content)
    prefix = leases.result_prefix(claim, "adapter")
    files = put_folder(site.storage, prefix, tmp_path / "made")
    parents = [{"digest": digest, "weight": weight} for digest, weight in zip(digests, (0.75, -0.125), strict=True)]
    result = leases.Result(prefix=prefix, files=files, digest="d" * 64, rank=4, metrics={"parents": parents})
    with site.database.unit_of_work() as session:
        leases.succeed(session, claim, result)
    told = site.ann.get(f"/adapters/{result.id}").json()
    assert told["parents"] == [{"adapter": pair[0], "weight": 0.75}, {"adapter": pair[1], "weight": -0.125}]


def test_bytes_for_less_than_one_rank(based: Site, tmp_path: Path) -> None:
    adapter = based.adapter(tmp_path)

    def ask(count: int, **fields: Any) -> httpx2.Response:
        body = {"adapters": [{"adapter": adapter}], "method": "linear", "max_bytes": count, **fields}
        return based.ann.post("/adapters/merge", json=body)

    refused = ask(100)
    assert_refused(based, refused, "max_bytes", ("not one rank of one module",))
    least = int(refused.json()["error"]["message"].rsplit(" ", 1)[1])
    assert least > (32 + 32) * 4
    assert_refused(based, ask(least - 1), "max_bytes", (str(least),))
    assert_refused(based, ask(least - 1, method="ties"), "max_bytes", (str(least),))
    assert ask(least).status_code == 202


def test_other_base_models_are_told_at_every_door(based: Site, tmp_path: Path) -> None:
    rows.add_base_model(based.database, "other")
    first = based.adapter(tmp_path)
    other = based.adapter(tmp_path, make_adapter(2))
    with based.database.unit_of_work() as session:
        session.get_one(Adapter, other).base_model_id = "other"
    named = [{"adapter": first}, {"adapter": other}]
    words = (first, other, "choose adapters of one base model")
    for path in ("merge", "analyze"):
        assert_refused(based, based.ann.post(f"/adapters/{path}", json={"adapters": named}), "adapters", words)
    assert_refused(based, search(based, first, other), "adapters", words)
    answer = based.ann.post(f"/adapters/{first}/export", json={"others": named[1:]})
    assert_refused(based, answer, "others", words)
