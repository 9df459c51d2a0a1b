"""What goes wrong in the host, or with what it computes on, while its worker is well. Real hosts, real faults."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sqlalchemy import update

from lora_engine import checkpoint, failpoints
from service import jobs
from service.leases import Claim
from service.models import Checkpoint
from tests import servers
from tests.conftest import Failpoints
from tests.faults import history
from tests.worker.bench import Bench
from worker import workspace

LORA = {"rank": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Failpoints in every host of this module, so that none has to be started for one test alone."""
    folder = tmp_path_factory.mktemp("failpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, str(folder))
        yield folder


@pytest.fixture(autouse=True)
def points(armed: Path, monkeypatch: pytest.MonkeyPatch) -> Failpoints:
    monkeypatch.setenv(failpoints.VARIABLE, str(armed))  # which every test begins without
    return Failpoints(armed)


@pytest.fixture(scope="module")
def kernel_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "kern.log"
    path.touch()
    return path


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, examples: bytes, kernel_log: Path, armed: Path
) -> Iterator[Bench]:
    """A worker that is quick to take a host for one that hangs, and reads of GPU faults in a file."""
    settings = {"kernel_log": kernel_log, "stall_seconds": 2, "min_free_bytes": 0}
    bench = Bench(tmp_path_factory.mktemp("bench"), tiny_model, examples, **settings)
    yield bench
    history.check(bench.database, bench.storage, at_rest=False, checkpoint_every=3)
    bench.close()


@pytest.fixture(scope="module")
def undisturbed(bench: Bench) -> str:
    job_id = bench.submit(lora=LORA, epochs=2)
    bench.run()
    return bench.adapter(job_id).digest


def test_a_host_that_is_stopped_is_given_up(bench: Bench, undisturbed: str, points: Failpoints) -> None:
    """Only the child: the lease is kept all the while."""
    job_id = bench.submit(lora=LORA, epochs=2)
    points.arm("host.step", "stop", at=4)
    bench.run()
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.lost_without_progress) == ("queued", 1, 1)
    assert any("made no progress for" in message for message in bench.messages(job_id))
    bench.rest()
    bench.run()
    assert bench.adapter(job_id).digest == undisturbed


def test_a_host_that_hangs_says_where(bench: Bench, capfd: pytest.CaptureFixture[str], points: Failpoints) -> None:
    if bench.supervisor._host is not None:
        bench.host.kill()  # the next one writes its log to where this test reads
    job_id = bench.submit(lora=LORA, epochs=1)
    points.arm("host.step", "sleep", at=2)
    bench.run()
    assert bench.job(job_id).lost_without_progress == 1
    told = capfd.readouterr().err
    assert "Current thread" in told or "Thread 0x" in told
    assert "in _make_steps" in told
    bench.rest()
    bench.run()
    assert bench.job(job_id).state == "succeeded"


@pytest.mark.parametrize(("number", "remedy"), [(79, "drain"), (95, "reset")])
def test_a_gpu_that_fails_gets_no_more_jobs(
    bench: Bench, undisturbed: str, kernel_log: Path, number: int, remedy: str
) -> None:
    job_id = bench.submit(lora=LORA, epochs=2)

    def fail() -> None:
        bench.until(job_id, lambda job: job.state == "running" and len(bench.checkpoints(job_id)) > 0)
        with kernel_log.open("a") as file:
            file.write(f"NVRM: Xid (PCI:0000:3b:00): {number}, pid=1, name=python, Broken\n")

    bench.run_while(fail)
    job = bench.job(job_id)
    assert (job.state, job.attempt, job.lost_without_progress) == ("queued", 1, 0)
    assert any(f"the GPU reported Xid {number}" in message for message in bench.messages(job_id))
    bench.rest()
    bench.run()
    assert bench.job(job_id).attempt == 1
    quarantine = bench.supervisor._quarantine
    assert remedy in str(quarantine.reason)
    quarantine.path.unlink()  # somebody has reset it
    bench.run()
    assert bench.adapter(job_id).digest == undisturbed


def test_what_a_program_may_have_done_to_the_gpu_counts(bench: Bench, kernel_log: Path) -> None:
    job_id = bench.submit(lora=LORA, epochs=1000)

    def fail() -> None:
        bench.until(job_id, lambda job: job.step > 2)
        with kernel_log.open("a") as file:
            file.write("NVRM: Xid (PCI:0000:3b:00): 31, pid=1, name=python, MMU Fault\n")
        os.kill(bench.host.pid, signal.SIGABRT)

    bench.run_while(fail)
    assert bench.supervisor._quarantine.reason is None
    assert any("the GPU reported Xid 31" in message for message in bench.messages(job_id))
    with bench.database.unit_of_work() as session:
        jobs.cancel(session, bench.owner, job_id)


def test_a_job_that_kills_its_process_every_time_fails_and_blocks_nobody(bench: Bench) -> None:
    poison = bench.submit(epochs=1000, checkpoint_every=1000)
    for loss in (1, 2, 3):

        def kill() -> None:
            bench.until(poison, lambda job: job.step >= 2)
            os.kill(bench.host.pid, signal.SIGKILL)
            bench.until(poison, lambda job: job.state != "running")

        bench.rest()
        bench.run_while(kill)
        assert bench.job(poison).state == ("failed" if loss == 3 else "queued")
        assert bench.job(poison).step >= 2
        if loss == 1:  # while the first waits for its next attempt, the second is served
            other = bench.submit(epochs=1)
            bench.supervisor._failures, bench.supervisor._pause_until = 0, 0.0
            bench.run()
            assert bench.job(other).state == "succeeded"
    job = bench.job(poison)
    assert (job.attempt, job.error_code, job.error_category) == (3, "process_died", "platform")
    assert "gave up after 3 attempts without progress" in str(job.error_message)


def test_weights_that_turn_out_not_to_be_finite(bench: Bench, tmp_path: Path) -> None:
    """Found in the middle of a job, in its checkpoint: it ends, is not tried again, and leaves what was good."""
    job_id = bench.submit(lora=LORA, epochs=1000)

    def kill() -> None:
        servers.wait_until(lambda: len(bench.checkpoints(job_id)) > 0)
        os.kill(bench.host.pid, signal.SIGKILL)

    bench.run_while(kill)
    newest = bench.checkpoints(job_id)[-1]
    workspace.fetch_checkpoint(bench.storage, newest, tmp_path / "stored")
    tensors, state = checkpoint.load(tmp_path / "stored")
    tensors["parameters"][5] = torch.nan
    poisoned = checkpoint.save(tmp_path, newest.step, tensors, state)
    claim = Claim(job_id, bench.owner, "train", newest.epoch, 1)
    _, manifest = workspace.put_checkpoint(bench.storage, claim, newest.step, poisoned)
    with bench.database.unit_of_work() as session:
        rows = update(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step == newest.step)
        session.execute(rows.values(manifest_sha256=manifest))
    bench.rest()
    bench.run()
    job, adapter = bench.job(job_id), bench.adapter(job_id)
    assert (job.state, job.error_code, job.error_category, job.attempt) == ("failed", "diverged", "user", 2)
    assert "lower the learning rate" in str(job.error_message)
    left = load_file(bench.download(adapter, tmp_path / "left") / "adapter_model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in left.values())


@pytest.mark.parametrize("point", ["checkpoint.writing", "folder.before_rename"])
def test_a_full_disk_costs_steps_and_not_the_job(
    bench: Bench, undisturbed: str, points: Failpoints, point: str
) -> None:
    job_id = bench.submit(lora=LORA, epochs=2)
    points.arm(point, "raise", at=2, error="ENOSPC")
    bench.run()
    job = bench.job(job_id)
    assert (job.state, job.lost_without_progress, len(bench.checkpoints(job_id))) == ("queued", 0, 1)
    assert any("disk is full" in message for message in bench.messages(job_id))
    bench.rest()
    bench.run()
    assert bench.adapter(job_id).digest == undisturbed


def test_a_disk_that_is_full_at_every_attempt_ends_the_job(bench: Bench, points: Failpoints) -> None:
    """Whatever was computed before the first checkpoint, five times, was for nothing: so it would go on."""
    job_id = bench.submit(lora=LORA, epochs=2)
    for loss in range(1, 6):
        points.arm("checkpoint.writing", "raise", at=1, error="ENOSPC")
        bench.rest()
        bench.run()
        assert bench.job(job_id).state == ("failed" if loss == 5 else "queued")
    job = bench.job(job_id)
    assert (job.error_code, job.error_category, job.attempt) == ("disk_full", "capacity", 5)
    assert "gave up after 5 attempts without a newer checkpoint; the last one: the worker's disk" in str(
        job.error_message
    )


def test_a_disk_that_fails_records_no_checkpoint(bench: Bench, undisturbed: str, points: Failpoints) -> None:
    job_id = bench.submit(lora=LORA, epochs=2)
    points.arm("folder.before_rename", "raise", at=2, error="EIO")
    bench.run()
    assert [checkpoint.step for checkpoint in bench.checkpoints(job_id)] == [3]
    bench.rest()
    bench.run()
    assert bench.adapter(job_id).digest == undisturbed


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Callable[[int], None]]:
    """A file system of its own; what is yielded gives it another size."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("only root mounts")

    def resize(kilobytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(folder)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_of_any_size_costs_time_and_never_the_job(
    tmp_path: Path, bench: Bench, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work folder lies on a disk that grows from attempt to attempt: each gets further, none loses a checkpoint."""
    monkeypatch.setattr("worker.run._FULL_DISKS", 100)  # it grows in small steps
    small = Bench(tmp_path, bench.model, bench.examples, min_free_bytes=0)
    job_id = small.submit(lora=LORA, epochs=2)
    stored, reasons = 0, set()
    try:
        with small_disk(small.settings.work_dir, 4) as grow:
            for kilobytes in range(4, 4000, 120):
                grow(kilobytes)
                small.rest()
                small.run()
                job, stored_before = small.job(job_id), stored
                stored = len(small.checkpoints(job_id))
                assert stored >= stored_before
                if job.state == "succeeded":
                    break
                assert (job.state, job.lost_without_progress) == ("queued", 0)
                reasons.add(small.messages(job_id)[-1])
        assert small.adapter(job_id).digest == undisturbed
        assert any("MiB free and needs" in reason for reason in reasons)
        assert any("disk is full" in reason for reason in reasons)
        history.check(small.database, small.storage, at_rest=False)
    finally:
        small.close()
