"""Work on adapters from claim to end, with the real host and the real engine; and what ends it early."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import SafetensorError
from sqlalchemy import update

from lora_engine import base_files
from lora_engine.fields import from_mapping
from lora_engine.ingest_config import IngestConfig
from service import adapter_jobs, adapter_uploads
from service.adapter_jobs import AnalyzeRequest, ExportRequest, ExtractRequest, SearchRequest
from service.adapter_uploads import Foreign
from service.adapters import parents as parents_of
from service.db import now
from service.models import Adapter, Job
from service.sources import Source
from tests.service.adapter_files import deltas
from tests.tiny_model import make_tiny_model
from tests.worker.bench import Bench
from worker import host, merging
from worker.channel import News
from worker.telling import Stopped, teller
from worker.warm_base import WarmBase


@pytest.fixture(scope="module")
def pair(bench: Bench) -> list[Adapter]:
    """Two trained adapters of different ranks and modules."""
    submitted = [
        bench.submit(lora={"rank": 4}, epochs=1),
        bench.submit(lora={"rank": 2, "target_modules": ["q_proj"], "use_rslora": True}, seed=3, epochs=1),
    ]
    bench.run()
    return [bench.adapter(job_id) for job_id in submitted]


def test_a_compressed_merge_tells_its_progress_and_its_error(bench: Bench, pair: list[Adapter]) -> None:
    job_id = bench.merge((pair[0].id, 0.75), (pair[1].id, -1.5), method="linear", rank=3)
    bench.run()
    job, made = bench.job(job_id), bench.adapter(job_id)
    assert (job.state, made.kind, made.rank) == ("succeeded", "merge", 3)
    assert job.step == job.total_steps == made.metrics["modules"]
    assert 0 < made.metrics["certificate"]["frobenius"] < 1
    assert made.metrics["recipe_digest"] == job.recipe_digest
    parents = {parent["digest"]: parent["weight"] for parent in bench.lineage(made)["parents"]}
    assert parents == {pair[0].digest: 0.75, pair[1].digest: -1.5}
    assert {"certificate.json", "lineage.json"} <= {file["name"] for file in made.files}


def test_a_nonlinear_merge(bench: Bench, pair: list[Adapter]) -> None:
    job_id = bench.merge((pair[0].id, 1), (pair[1].id, 1), method="ties", density=0.5)
    bench.run()
    assert bench.job(job_id).state == "succeeded", bench.messages(job_id)


def test_a_certificate_holds_when_it_is_computed_again(bench: Bench, pair: list[Adapter], tmp_path: Path) -> None:
    merged = bench.merge((pair[0].id, 1), (pair[1].id, 2), method="linear", rank=2)
    bench.run()
    job_id = bench.adapter_job(adapter_jobs.submit_verification, bench.adapter(merged).id)
    bench.run()
    artifact = bench.artifact(job_id)
    report = json.loads((bench.download(artifact, tmp_path / "files") / "verification.json").read_bytes())
    assert (artifact.kind, artifact.metrics, report["verified"]) == ("verify", report, True)


def test_an_export_is_an_artifact_of_its_adapters(bench: Bench, pair: list[Adapter], tmp_path: Path) -> None:
    request = ExportRequest(format="merged", dtype="fp32", weight=0.5, name="whole")
    job_id = bench.adapter_job(adapter_jobs.submit_export, pair[0].id, request)
    bench.run()
    job, artifact = bench.job(job_id), bench.artifact(job_id)
    assert (job.state, artifact.kind, artifact.name) == ("succeeded", "export", "whole"), bench.messages(job_id)
    assert job.step == job.total_steps
    folder = bench.download(artifact, tmp_path / "model")
    assert (folder / "config.json").exists()
    assert list(folder.glob("model*.safetensors"))
    assert artifact.digest == base_files.digest_of(artifact.files)
    assert artifact.metrics["format"] == "merged"


def test_adapters_go_into_a_model_by_a_nonlinear_method(bench: Bench, pair: list[Adapter]) -> None:
    body = {"format": "merged", "dtype": "fp32", "others": [{"adapter": pair[1].id}]}
    request = from_mapping(ExportRequest, body | {"merge": {"method": "ties", "density": 0.5}})
    job_id = bench.adapter_job(adapter_jobs.submit_export, pair[0].id, request)
    bench.run()
    assert bench.job(job_id).state == "succeeded", bench.messages(job_id)


def test_an_export_that_cannot_be_fails_with_the_reason(bench: Bench, pair: list[Adapter]) -> None:
    request = ExportRequest(format="merged", dtype="bf16", max_gap=1e-9)
    job_id = bench.adapter_job(adapter_jobs.submit_export, pair[0].id, request)
    bench.run()
    job = bench.job(job_id)
    assert (job.state, job.error_category) == ("failed", "user"), bench.messages(job_id)
    assert "at most 1e-09 is allowed" in str(job.error_message)


def test_a_search_leaves_the_stack_and_the_table(bench: Bench, pair: list[Adapter]) -> None:
    request = SearchRequest(
        adapters=[adapter.id for adapter in pair], dataset=bench.dataset, steps=2, sequence_length=128, global_batch=4
    )
    job_id = bench.adapter_job(adapter_jobs.submit_search, request)
    bench.run()
    job = bench.job(job_id)
    assert job.state == "succeeded", bench.messages(job_id)
    made = bench.adapter(job_id)
    assert (made.kind, made.rank) == ("search", 6)
    assert {row["name"] for row in made.metrics["table"]} >= {"single", "found"}
    assert "weight_search.json" in {file["name"] for file in made.files}
    found = {parent["digest"]: parent["weight"] for parent in bench.lineage(made)["parents"]}
    with bench.database.reading() as session:
        recorded = {parent.parent_id: parent.weight for parent in parents_of(session, [job_id])[job_id]}
    assert recorded == {adapter.id: found.get(adapter.digest, 0.0) for adapter in pair}


def test_an_analysis_is_a_report_with_pictures(bench: Bench, pair: list[Adapter], tmp_path: Path) -> None:
    asked = [Source(adapter=adapter.id, weight=weight) for adapter, weight in zip(pair, (1, -1), strict=True)]
    job_id = bench.adapter_job(adapter_jobs.submit_analysis, AnalyzeRequest(adapters=asked))
    bench.run()
    assert bench.job(job_id).state == "succeeded", bench.messages(job_id)
    folder = bench.download(bench.artifact(job_id), tmp_path / "report")
    report = json.loads((folder / "report.json").read_bytes())
    assert pair[0].id in json.dumps(report)
    assert {path.suffix for path in folder.iterdir()} >= {".json", ".png", ".svg"}


def test_an_adapter_is_extracted_from_an_export(bench: Bench, pair: list[Adapter], tmp_path: Path) -> None:
    export = bench.adapter_job(
        adapter_jobs.submit_export, pair[0].id, ExportRequest(format="merged", dtype="fp32", weight=1.0)
    )
    bench.run()
    folder = bench.download(bench.artifact(export), tmp_path / "tuned")
    bench.add_base_model("tuned", folder)
    request = ExtractRequest(base_model="tiny", tuned_model="tuned", rank=4)
    job_id = bench.adapter_job(adapter_jobs.submit_extraction, request)
    bench.run()
    assert bench.job(job_id).state == "succeeded", bench.messages(job_id)
    before = deltas(bench.download(pair[0], tmp_path / "before"))
    after = deltas(bench.download(bench.adapter(job_id), tmp_path / "after"))
    assert set(after) == set(before)
    for name, delta in before.items():
        assert abs(after[name] - delta).max() < 1e-5 * abs(delta).max() + 1e-6


class _Channel:
    """A host's end of the channel that nobody listens to; `stop` is given after so many messages."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.sent: list[News] = []
        self._stop_after = stop_after

    @property
    def stop(self) -> str | None:
        return "abandon" if self._stop_after is not None and len(self.sent) >= self._stop_after else None

    def send(self, event: str, **data: Any) -> None:
        self.sent.append(News(event, data))


def merge_order(bench: Bench, pair: list[Adapter], folder: Path) -> dict[str, Any]:
    paths = [bench.download(adapter, folder / adapter.id) for adapter in pair]
    adapters = [{"path": str(path), "weight": 1.0} for path in paths]
    return {"spec": {"adapters": adapters, "output": str(folder / "result"), "method": "linear", "rank": 2}}


@pytest.mark.parametrize("stop_after", [1, 2])
def test_a_cancel_half_way_leaves_nothing(
    bench: Bench, pair: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr("worker.telling._SECONDS", 0.0)
    order, channel = merge_order(bench, pair, tmp_path), _Channel(stop_after)
    warm = WarmBase("cpu", 0)
    host._carry_out(News("merge", order), channel, warm)  # type: ignore[arg-type]
    assert [news.event for news in channel.sent][-1] == "stopped"
    assert {path.name for path in tmp_path.iterdir()} == {adapter.id for adapter in pair}
    again = _Channel()
    merging.merge(order, warm, again)  # type: ignore[arg-type]
    assert [news.event for news in again.sent][-1] == "finished"


def test_what_is_told_is_not_told_too_often() -> None:
    channel = _Channel()
    tell = teller(channel)  # type: ignore[arg-type]
    for done in range(1, 1001):
        tell(done, 1000)
    assert len(channel.sent) < 10
    assert channel.sent[-1].data == {"step": 1000, "total_steps": 1000}
    stopped = teller(_Channel(stop_after=0))  # type: ignore[arg-type]
    with pytest.raises(Stopped):
        stopped(1, 2)


def test_a_full_disk_fails_the_job_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for verb, event in (("export", "failed"), ("train", "interrupted")):
        monkeypatch.setitem(host._VERBS, verb, full)
        channel = _Channel()
        host._carry_out(News(verb, {}), channel, WarmBase("cpu", 0))  # type: ignore[arg-type]
        assert [news.event for news in channel.sent] == [event]
    assert channel.sent[0].data["code"] == "disk_full"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.EIO, "Input/output error"), "io_error"),
        (PermissionError(errno.EACCES, "Permission denied"), "file_unusable"),
        (SafetensorError("header too large"), "file_unusable"),
        (SafetensorError("Error while serializing: I/O error: Input/output error (os error 5)"), "io_error"),
    ],
)
def test_a_file_that_fails_interrupts(monkeypatch: pytest.MonkeyPatch, error: Exception, code: str) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(host._VERBS, "merge", fail)
    channel = _Channel()
    host._carry_out(News("merge", {}), channel, WarmBase("cpu", 0))  # type: ignore[arg-type]
    assert (channel.sent[0].event, channel.sent[0].data["code"]) == ("interrupted", code)


def test_a_base_model_that_is_not_on_this_worker_is_named(tmp_path: Path) -> None:
    channel = _Channel()
    base = {"id": "tiny", "folder": str(tmp_path / "gone"), "digest": "x"}
    order = {"spec": {"base_model": base["folder"], "adapters": [{"path": "x"}], "output": "out"}, "base": base}
    host._carry_out(News("export", order), channel, WarmBase("cpu", 0))  # type: ignore[arg-type]
    told = channel.sent[-1]
    assert (told.event, told.data["code"]) == ("interrupted", "base_model_unusable")
    assert "the folder of base model tiny cannot be read on this worker: No such file" in told.data["message"]


@pytest.mark.parametrize("error", [numpy.linalg.LinAlgError("SVD did not converge"), torch.linalg.LinAlgError("no")])
def test_numbers_beyond_computing_fail_the_job(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setitem(host._VERBS, "merge", fail)
    channel = _Channel()
    host._carry_out(News("merge", {}), channel, WarmBase("cpu", 0))  # type: ignore[arg-type]
    assert (channel.sent[0].event, channel.sent[0].data["category"]) == ("failed", "user")


def test_one_job_that_keeps_failing_does_not_stop_the_worker(bench: Bench) -> None:
    for _ in range(5):
        bench.supervisor._heed("job-1", False)
    assert (bench.supervisor._failures, bench.supervisor._pause_until) == (1, 0.0)
    bench.supervisor._heed("job-2", True)
    assert bench.supervisor._failures == 0


def test_an_altered_base_model_is_not_exported(bench: Bench, pair: list[Adapter], tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", seed=5)
    pinned = base_files.digest(model)
    (model / "generation_config.json").write_text("{}")
    channel = _Channel()
    order = {"spec": {"base_model": str(model), "adapters": [{"path": "x"}], "output": str(tmp_path / "out")}}
    order["base"] = {"id": "tiny", "folder": str(model), "digest": pinned}
    host._carry_out(News("export", order), channel, WarmBase("cpu", 0))  # type: ignore[arg-type]
    assert (channel.sent[-1].event, channel.sent[-1].data["code"]) == ("interrupted", "base_model_unusable")
    shutil.rmtree(model)


def test_an_adapter_from_elsewhere_becomes_one_of_ours(bench: Bench, pair: list[Adapter], tmp_path: Path) -> None:
    folder = bench.download(pair[1], tmp_path / "foreign")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    # The same numbers, said otherwise: rsLoRA divides by the root of the rank.
    config |= {"use_rslora": True, "lora_alpha": config["lora_alpha"] / config["r"] ** 0.5}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with adapter_uploads.Upload(bench.settings, tmp_path / "received") as upload:
        for field, name in (("config", "adapter_config.json"), ("weights", "adapter_model.safetensors")):
            upload.takers[field]((folder / name).read_bytes())
        plan, files = upload.finish(IngestConfig(), archived=False)
    foreign = Foreign(tmp_path / "received", files, plan, "tiny", "from elsewhere", IngestConfig())
    job, created = adapter_uploads.submit(bench.database, bench.storage, bench.owner, foreign)
    assert created
    bench.run()
    assert bench.job(job.id).state == "succeeded", bench.messages(job.id)
    made = bench.adapter(job.id)
    assert (made.kind, made.name, made.rank) == ("ingest", "from elsewhere", 2)
    assert "ingest.json" in {file["name"] for file in made.files}
    before, after = deltas(bench.download(pair[1], tmp_path / "b")), deltas(bench.download(made, tmp_path / "a"))
    for name, delta in before.items():
        assert abs(after[name] - delta).max() <= 1e-6 * abs(delta).max()
    mixed = bench.merge((made.id, 1.0), (pair[0].id, 1.0))  # it is an adapter like any other
    bench.run()
    assert bench.job(mixed).state == "succeeded", bench.messages(mixed)


def test_a_killed_export_starts_anew(bench: Bench, pair: list[Adapter]) -> None:
    job_id = bench.adapter_job(adapter_jobs.submit_export, pair[0].id, ExportRequest(format="merged", dtype="fp16"))

    def kill() -> None:
        bench.until(job_id, lambda job: job.state == "running")
        process = bench.supervisor._host
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        bench.until(job_id, lambda job: job.state == "queued")

    bench.run_while(kill)
    assert (bench.job(job_id).lost_without_progress, list(bench.storage.keys(f"artifacts/{job_id}"))) == (1, [])
    assert list(bench.settings.work_dir.glob("job-*")) == []
    with bench.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
    bench.run()
    assert (bench.job(job_id).state, bench.job(job_id).attempt) == ("succeeded", 2)
    assert bench.artifact(job_id).epoch == 3
