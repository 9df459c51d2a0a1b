"""A worker is killed, or away for longer than its lease, wherever that hurts: one result, as if nothing had been."""

from collections.abc import Iterator

import pytest

from service import adapters, jobs
from service.sweep import purge_deleted, purge_leftovers
from tests import servers
from tests.conftest import Failpoints
from tests.faults import history
from tests.worker.bench import Bench
from tests.worker.lone import LoneWorker
from worker.workspace import remove_abandoned

EVERY = 3
LORA = {"rank": 4, "dropout": 0.1}
long = pytest.mark.long


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> str:
    """The digest of an adapter that nothing happened to."""
    job_id = bench.submit(lora=LORA, epochs=2, checkpoint_every=EVERY)
    bench.run()
    return bench.adapter(job_id).digest


@pytest.fixture(autouse=True)
def _history(bench: Bench, undisturbed: str) -> Iterator[None]:
    """After every test: the invariants, and no object that nothing refers to."""
    yield
    purge_leftovers(bench.database, bench.storage, 0.0)
    history.check(bench.database, bench.storage, at_rest=False, checkpoint_every=EVERY, collected=True)
    assert list(bench.settings.work_dir.glob("job-*")) == []


def go_on(bench: Bench, job_id: str) -> None:
    """What is left of the job, by another worker, which removes first what the lost one has left behind."""
    remove_abandoned(bench.settings.work_dir)
    bench.rest()
    bench.run()
    assert bench.job(job_id).state == "succeeded"


def submit(bench: Bench) -> str:
    return bench.submit(lora=LORA, epochs=2, checkpoint_every=EVERY)


@pytest.mark.parametrize(
    ("point", "at"),
    [
        ("worker.claimed", 1),
        pytest.param("worker.ordered", 1, marks=long),
        pytest.param("storage.fetching", 1, marks=long),
        pytest.param("storage.before_rename", 2, marks=long),  # the second file of a checkpoint
        ("storage.between_files", 5),  # of the second checkpoint
        pytest.param("worker.checkpoint_uploaded", 2, marks=long),
        pytest.param("worker.checkpoint_recorded", 1, marks=long),
        ("worker.before_publish", 1),
    ],
)
def test_a_killed_worker(bench: Bench, points: Failpoints, undisturbed: str, point: str, at: int) -> None:
    job_id = submit(bench)
    points.arm(point, "kill", at=at)
    with LoneWorker(bench, points) as worker:
        worker.wait_for(point)
        assert worker.process.wait(10) == -9
    bench.reap(job_id)
    assert bench.job(job_id).lost_without_progress == 1
    go_on(bench, job_id)
    assert bench.adapter(job_id).digest == undisturbed
    assert bench.job(job_id).attempt == 2


@pytest.mark.parametrize(
    ("point", "at"),
    [
        pytest.param("host.loading", 1, marks=long),
        pytest.param("host.step", 5, marks=long),
        ("checkpoint.writing", 2),
        pytest.param("folder.before_rename", 1, marks=long),
        pytest.param("folder.after_rename", 2, marks=long),
        pytest.param("host.finished", 1, marks=long),
    ],
)
def test_a_worker_that_is_killed_while_its_host_computes(
    bench: Bench, points: Failpoints, undisturbed: str, point: str, at: int
) -> None:
    """The host, even one that is stopped, goes with it, and with it the hold on the device."""
    job_id = submit(bench)
    points.arm(point, "stop", at=at)
    with LoneWorker(bench, points) as worker:
        worker.wait_for(point)
        host = worker.host
        assert host is not None
        worker.kill()
        assert not host.is_running()
    bench.reap(job_id)
    go_on(bench, job_id)
    assert bench.adapter(job_id).digest == undisturbed


def test_a_worker_that_is_killed_after_the_end_has_ended_the_job(
    bench: Bench, points: Failpoints, undisturbed: str
) -> None:
    job_id = submit(bench)
    points.arm("worker.after_publish", "kill")
    with LoneWorker(bench, points) as worker:
        worker.wait_for("worker.after_publish")
    job = bench.job(job_id)
    assert (job.state, job.attempt, bench.adapter(job_id).digest) == ("succeeded", 1, undisturbed)
    remove_abandoned(bench.settings.work_dir)


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("worker.claimed", marks=long),
        pytest.param("worker.ordered", marks=long),
        pytest.param("worker.checkpoint_uploaded", marks=long),
        pytest.param("worker.checkpoint_recorded", marks=long),
        "worker.before_publish",
    ],
)
def test_a_worker_that_was_away_changes_nothing_any_more(
    bench: Bench, points: Failpoints, undisturbed: str, point: str
) -> None:
    """Stopped past its lease, it comes back when another one has done the job."""
    job_id = submit(bench)
    points.arm(point, "sleep", seconds=2)
    with LoneWorker(bench, points) as worker:
        worker.wait_for(point)
        worker.stop()
        bench.reap(job_id)
        bench.rest()
        bench.run()
        job, adapter = bench.job(job_id), bench.adapter(job_id)
        assert (job.state, adapter.digest, adapter.epoch) == ("succeeded", undisturbed, job.epoch)
        stored = sorted(bench.storage.keys(adapter.prefix))
        told = len(bench.messages(job_id))
        worker.go_on()
        servers.wait_until(lambda: "fenced" in worker.log)
        host = worker.host
    assert host is None or not host.is_running()
    after = bench.job(job_id)
    assert (after.state, after.epoch, after.event_seq) == (job.state, job.epoch, job.event_seq)
    assert (sorted(bench.storage.keys(adapter.prefix)), len(bench.messages(job_id))) == (stored, told)


@pytest.mark.parametrize("back", [False, pytest.param(True, marks=long)], ids=["dead", "away"])
def test_a_cancel_does_not_need_the_worker(bench: Bench, points: Failpoints, back: bool) -> None:
    job_id = submit(bench)
    points.arm("worker.checkpoint_recorded", "sleep", seconds=2)
    with LoneWorker(bench, points) as worker:
        worker.wait_for("worker.checkpoint_recorded")
        if back:
            worker.stop()
        else:
            worker.kill()
        with bench.database.unit_of_work() as session:
            assert jobs.cancel(session, bench.owner, job_id).state == "cancelling"
        bench.reap(job_id)
        assert bench.job(job_id).state == "cancelled"
        if back:
            worker.go_on()
            servers.wait_until(lambda: "fenced" in worker.log)
    assert bench.job(job_id).state == "cancelled"
    assert bench.adapters(job_id) == 0
    remove_abandoned(bench.settings.work_dir)


@pytest.mark.parametrize("point", ["folder.before_rename", pytest.param("worker.before_publish", marks=long)])
def test_a_merge_begins_anew(bench: Bench, points: Failpoints, undisturbed: str, point: str) -> None:
    source = submit(bench)
    bench.run()
    adapter = bench.adapter(source)
    recipe = ((adapter.id, 0.5), (adapter.id, 0.25))
    made = bench.merge(*recipe)
    bench.run()
    expected = bench.adapter(made)
    with bench.database.unit_of_work() as session:  # or the same recipe would be answered with what it gave
        adapters.delete(session, bench.owner, expected.id)
    purge_deleted(bench.database, bench.storage)
    job_id = bench.merge(*recipe)
    points.arm(point, "stop")
    with LoneWorker(bench, points) as worker:
        worker.wait_for(point)
        worker.kill()
    bench.reap(job_id)
    go_on(bench, job_id)
    assert (bench.adapter(job_id).digest, bench.job(job_id).attempt) == (expected.digest, 2)
