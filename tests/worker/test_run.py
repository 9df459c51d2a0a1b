"""Attempts from claim to end, with the real host, the real engine and a tiny base model."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy import update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from service import jobs, leases
from service.db import now
from service.errors import Unavailable
from service.models import Dataset, Job
from tests.tiny_model import make_tiny_model
from tests.worker.bench import Bench
from worker.workspace import remove_abandoned


@pytest.fixture(autouse=True)
def _rested(bench: Bench) -> None:
    """The tests share a worker; what one of them broke is not to make the next one wait."""
    bench.supervisor._failures, bench.supervisor._pause_until = 0, 0.0


def test_a_job_becomes_a_verified_adapter(bench: Bench, tmp_path: Path) -> None:
    job_id = bench.submit(epochs=1)
    bench.run()
    job, adapter = bench.job(job_id), bench.adapter(job_id)
    assert (job.state, job.step, job.total_steps, job.attempt) == ("succeeded", 6, 6, 1)
    points = bench.metrics(job_id)
    assert [point["step"] for point in points] == [0, 1, 2, 3, 4, 5, 6]
    assert points[0] == {"step": 0, "epoch": 0.0, "validation_loss": adapter.metrics["validation_loss_before"]}
    assert {"loss", "grad_norm", "learning_rate", "tokens_per_second", "peak_bytes"} <= set(points[1])
    assert "skipped" not in points[1]
    assert adapter.metrics["validation_loss_after"] < adapter.metrics["validation_loss_before"]
    folder = bench.download(adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_bytes())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 4, "tiny")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert list(bench.settings.work_dir.glob("job-*")) == []


def test_the_same_job_gives_the_same_bytes_on_the_warm_base(bench: Bench) -> None:
    first, second = bench.submit(lora={"rank": 4, "dropout": 0.1}), bench.submit(lora={"rank": 4, "dropout": 0.1})
    bench.run()
    assert bench.adapter(first).digest == bench.adapter(second).digest
    other = bench.submit(lora={"rank": 4, "dropout": 0.1}, seed=1)
    bench.run()
    assert bench.adapter(other).digest != bench.adapter(first).digest


def test_a_killed_process_costs_no_more_than_the_steps_since_the_checkpoint(bench: Bench) -> None:
    undisturbed = bench.submit(epochs=8, lora={"rank": 4, "dropout": 0.1})
    bench.run()
    job_id = bench.submit(epochs=8, lora={"rank": 4, "dropout": 0.1})

    def kill() -> None:
        bench.until(job_id, lambda job: job.step >= 7 and len(bench.checkpoints(job_id)) > 0)
        host = bench.supervisor._host
        assert host is not None
        os.kill(host.pid, signal.SIGKILL)
        bench.until(job_id, lambda job: job.state == "queued")

    bench.run_while(kill)
    queued = bench.job(job_id)
    assert (queued.lost_without_progress, queued.epoch) == (1, 2)
    assert any("killed" in message for message in bench.messages(job_id))
    with bench.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
    bench.run()
    assert bench.job(job_id).state == "succeeded"
    assert bench.adapters(job_id) == 1
    assert bench.adapter(job_id).digest == bench.adapter(undisturbed).digest


def test_a_damaged_checkpoint_is_noticed_and_the_older_one_used(bench: Bench) -> None:
    undisturbed = bench.submit(epochs=8)
    bench.run()
    job_id = bench.submit(epochs=8)

    def kill() -> None:
        bench.until(job_id, lambda job: job.state == "running" and len(bench.checkpoints(job_id)) == 2)
        host = bench.supervisor._host
        assert host is not None
        os.kill(host.pid, signal.SIGKILL)
        bench.until(job_id, lambda job: job.state == "queued")

    bench.run_while(kill)
    newest = bench.checkpoints(job_id)[-1]
    path = Path(bench.settings.data_dir) / "objects" / newest.prefix / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with bench.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
    first_step = len(bench.metrics(job_id))
    bench.run()
    assert bench.job(job_id).state == "succeeded"
    assert bench.metrics(job_id)[first_step]["step"] == newest.step - 3 + 1
    assert bench.adapter(job_id).digest == bench.adapter(undisturbed).digest


def test_a_cancel_stops_between_two_steps(bench: Bench) -> None:
    job_id = bench.submit(epochs=1000)

    def cancel() -> None:
        bench.until(job_id, lambda job: job.step > 2)
        with bench.database.unit_of_work() as session:
            jobs.cancel(session, bench.owner, job_id)

    bench.run_while(cancel)
    assert bench.job(job_id).state == "cancelled"
    assert bench.adapters(job_id) == 0
    # The host is warm still: the next job finds it as it was.
    host = bench.supervisor._host
    assert host is not None
    assert host.alive


def test_a_fenced_attempt_leaves_no_trace(bench: Bench) -> None:
    job_id = bench.submit(epochs=1000)

    def fence() -> None:
        bench.until(job_id, lambda job: job.step > 2)
        with bench.database.unit_of_work() as session:
            session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
            assert leases.reap(session) == [job_id]
            # Out of reach of this worker, so that it ends.
            session.execute(update(Job).where(Job.id == job_id).values(run_after=now() + 3600))

    bench.run_while(fence)
    job = bench.job(job_id)
    assert (job.state, job.epoch) == ("queued", 2)
    assert bench.adapters(job_id) == 0
    with bench.database.unit_of_work() as session:
        jobs.cancel(session, bench.owner, job_id)


def test_a_stack_is_an_adapter_with_its_parents(bench: Bench, tmp_path: Path) -> None:
    first = bench.submit(lora={"rank": 4})
    second = bench.submit(lora={"rank": 2, "target_modules": ["q_proj"], "use_rslora": True}, seed=3)
    bench.run()
    sources = [bench.adapter(first), bench.adapter(second)]
    merged = bench.merge((sources[0].id, 0.75), (sources[1].id, -1.5))
    bench.run()
    result = bench.adapter(merged)
    assert (bench.job(merged).state, result.kind, result.rank) == ("succeeded", "merge", 6)
    parents = {parent["digest"]: parent["weight"] for parent in bench.lineage(result)["parents"]}
    assert parents == {sources[0].digest: 0.75, sources[1].digest: -1.5}
    folder = bench.download(result, tmp_path / "merged")
    assert json.loads((folder / "adapter_config.json").read_bytes())["r"] == 6


def test_altered_base_files_are_refused(bench: Bench, tmp_path: Path) -> None:
    altered = make_tiny_model(tmp_path / "model", seed=1)
    bench.add_base_model("altered", altered)
    config = json.loads((altered / "config.json").read_bytes())
    (altered / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    job_id = bench.submit()
    with bench.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(base_model_id="altered"))
    for _ in range(3):  # another worker might have the right files
        with bench.database.unit_of_work() as session:
            session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
        bench.supervisor._pause_until = 0.0
        bench.run()
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.error_category) == ("failed", "base_model_unusable", "platform")
    assert "pinned" in str(job.error_message)


def test_a_failure_says_what_the_owner_can_do(bench: Bench) -> None:
    job_id = bench.submit(sequence_length=8)
    bench.run()
    job = bench.job(job_id)
    assert (job.state, job.error_code, job.error_category) == ("failed", "invalid_dataset", "user")
    assert "sequence_length" in str(job.error_message)
    assert bench.adapters(job_id) == 0


def test_a_damaged_dataset_is_not_trained_on(bench: Bench) -> None:
    dataset_id = bench.upload(bench.examples)
    with bench.database.unit_of_work() as session:
        session.execute(update(Dataset).where(Dataset.id == dataset_id).values(sha256="0" * 64))
    job_id = bench.submit(dataset=dataset_id)
    bench.run()
    job = bench.job(job_id)
    assert (job.state, job.lost_without_progress) == ("queued", 1)
    assert any("damaged" in message for message in bench.messages(job_id))
    with bench.database.unit_of_work() as session:
        jobs.cancel(session, bench.owner, job_id)


def test_folders_of_dead_workers_are_removed(bench: Bench) -> None:
    dead = bench.settings.work_dir / "job-0-e1"
    dead.mkdir()
    (dead / ".lock").touch()
    (dead / "big").write_bytes(bytes(1000))
    assert remove_abandoned(bench.settings.work_dir) == ["job-0-e1"]
    assert not dead.exists()


def test_a_worker_that_keeps_failing_takes_no_more_jobs(bench: Bench, tmp_path: Path) -> None:
    gone = make_tiny_model(tmp_path / "model", seed=2)
    bench.add_base_model("gone", gone)
    shutil.rmtree(gone)
    broken = [bench.submit() for _ in range(3)]
    with bench.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id.in_(broken)).values(base_model_id="gone"))
    bench.run()
    waiting = bench.submit()
    bench.run()
    assert bench.job(waiting).attempt == 0
    bench.supervisor._failures, bench.supervisor._pause_until = 0, 0.0
    with bench.database.unit_of_work() as session:
        for job_id in broken:
            jobs.cancel(session, bench.owner, job_id)
    bench.run()
    assert bench.job(waiting).state == "succeeded"


def test_an_outage_of_the_store_is_not_held_against_the_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit()

    def down(*_: object) -> None:
        raise Unavailable("the object store does not answer")

    for attempt in (1, 2, 3, 4):
        with bench.database.unit_of_work() as session:
            session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
        bench.supervisor._pause_until = 0.0
        with monkeypatch.context() as outage:
            outage.setattr(bench.storage, "put_file", down)
            bench.run()
        job = bench.job(job_id)
        assert (job.state, job.attempt, job.lost_without_progress) == ("queued", attempt, 0)
    with monkeypatch.context() as outage:  # and a store that is known to be away costs no attempt at all
        outage.setattr(bench.storage, "check", down)
        bench.run()
    with bench.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now()))
    bench.supervisor._failures, bench.supervisor._pause_until = 0, 0.0
    bench.run()
    assert (bench.job(job_id).state, bench.job(job_id).attempt) == ("succeeded", 5)


def test_a_database_that_is_away_for_a_moment_costs_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = bench.submit()
    failures = iter((True, True, False))
    succeed = leases.succeed

    def away(session: Session, claim: leases.Claim, result: leases.Result) -> None:
        if next(failures, False):
            raise OperationalError("UPDATE", {}, Exception("the server closed the connection"))
        succeed(session, claim, result)

    monkeypatch.setattr("worker.run._RETRY_SECONDS", 0.01)
    monkeypatch.setattr(leases, "succeed", away)
    bench.run()
    assert (bench.job(job_id).state, bench.job(job_id).attempt, bench.adapters(job_id)) == ("succeeded", 1, 1)


def test_a_checkpoint_that_the_engine_refuses_costs_steps_and_not_the_job(bench: Bench) -> None:
    undisturbed = bench.submit(epochs=8)
    bench.run()
    job_id = bench.submit(epochs=8, seed=1)

    def kill() -> None:
        bench.until(job_id, lambda job: job.state == "running" and len(bench.checkpoints(job_id)) == 2)
        host = bench.supervisor._host
        assert host is not None
        os.kill(host.pid, signal.SIGKILL)
        bench.until(job_id, lambda job: job.state == "queued")

    bench.run_while(kill)
    with bench.database.unit_of_work() as session:
        spec = session.get_one(Job, undisturbed).spec
        session.execute(update(Job).where(Job.id == job_id).values(run_after=now(), spec=spec))
    bench.run()
    assert any("Starting over" in message for message in bench.messages(job_id))
    assert bench.adapter(job_id).digest == bench.adapter(undisturbed).digest
