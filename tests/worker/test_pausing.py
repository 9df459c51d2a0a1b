"""Pause, resume and cancel of a job at work: nothing lost, nothing counted, the same bytes."""

from collections.abc import Callable

import pytest
from sqlalchemy import update

from service import jobs, preemption
from service.db import now
from service.models import Job
from tests.worker.bench import Bench
from worker.progress import Reporter

DROPOUT = {"rank": 4, "dropout": 0.1}


def change(bench: Bench, verb: Callable[..., Job], job_id: str) -> Job:
    with bench.database.unit_of_work() as session:
        return verb(session, bench.owner, job_id)


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> str:
    """The digest of the adapter of a job that nothing happened to."""
    job_id = bench.submit(epochs=8, lora=DROPOUT)
    bench.run()
    return bench.adapter(job_id).digest


def test_a_paused_training_rests_and_goes_on_to_the_same_bytes(bench: Bench, undisturbed: str) -> None:
    job_id = bench.submit(epochs=8, lora=DROPOUT)

    def pause() -> None:
        bench.until(job_id, lambda job: job.step >= 7)
        change(bench, jobs.pause, job_id)
        bench.until(job_id, lambda job: job.state == "paused")

    bench.run_while(pause)
    paused = bench.job(job_id)
    assert bench.checkpoints(job_id)[-1].step >= 7  # it made one for the pause
    assert (paused.attempt, paused.lost_without_progress) == (1, 0)
    bench.run()
    assert bench.job(job_id).state == "paused"
    change(bench, jobs.resume, job_id)
    bench.run()
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.lost_without_progress) == ("succeeded", 2, 0)
    assert [point["step"] for point in bench.metrics(job_id)] == list(range(job.step + 1))  # no step was made twice
    assert bench.adapter(job_id).digest == undisturbed


def test_a_training_that_gave_way_goes_on_afterwards_to_the_same_bytes(bench: Bench, undisturbed: str) -> None:
    job_id, urgent = bench.submit(epochs=8, lora=DROPOUT), ""

    def preempt() -> None:
        nonlocal urgent
        bench.until(job_id, lambda job: job.step >= 7)
        urgent = bench.submit(epochs=1)
        with bench.database.unit_of_work() as session:
            jobs.prioritise(session, urgent, -1)
            session.execute(update(Job).where(Job.id == urgent).values(run_after=now() - 100))
        with bench.database.unit_of_work() as session:
            assert preemption.preempt(session, 30) == job_id
        bench.until(job_id, lambda job: job.state == "succeeded")

    bench.run_while(preempt)
    job, first = bench.job(job_id), bench.job(urgent)
    assert (job.attempt, job.preemptions, job.lost_without_progress) == (2, 1, 0)
    assert first.finished_at is not None
    assert job.finished_at is not None
    assert first.finished_at < job.finished_at
    assert bench.adapter(job_id).digest == undisturbed


PHASES = ["fetching files", "loading base model", "preparing examples", "training", "writing adapter", "publishing"]


@pytest.mark.parametrize("phase", PHASES)
def test_a_cancel_in_any_phase_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    """The cancel is accepted just as the attempt tells of the phase."""
    job_id, reached = bench.submit(), []
    tell = Reporter.tell

    def cancelling(reporter: Reporter, **progress: object) -> None:
        if progress.get("phase") == phase and not reached:
            reached.append(phase)
            change(bench, jobs.cancel, job_id)
        tell(reporter, **progress)

    monkeypatch.setattr(Reporter, "tell", cancelling)
    if phase == "loading base model" and bench.supervisor._host is not None:
        bench.supervisor._host.kill()  # a warm one has nothing to load
    bench.run()
    assert reached == [phase]
    assert (bench.job(job_id).state, bench.adapters(job_id)) == ("cancelled", 0)
    assert list(bench.settings.work_dir.glob("job-*")) == []


def test_a_merge_that_was_paused_begins_again(bench: Bench, undisturbed: str) -> None:
    first, second = bench.submit(), bench.submit(seed=3)
    bench.run()
    merged = bench.merge((bench.adapter(first).id, 0.5), (bench.adapter(second).id, 0.5))
    change(bench, jobs.pause, merged)
    bench.run()
    assert bench.job(merged).state == "paused"
    change(bench, jobs.resume, merged)
    bench.run()
    assert (bench.job(merged).state, bench.adapter(merged).rank) == ("succeeded", 8)
