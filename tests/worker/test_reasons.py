"""Each way in which an attempt ends without its job: the code, the words, and whom it is held against."""

import errno
from pathlib import Path

import pytest

from service.errors import NoSpace, NotFound, TimedOut, Unavailable
from service.storage import ObjectDamaged, ObjectMissing
from worker import memory, reasons
from worker.child import HostDied
from worker.device_faults import DeviceFault, Remedy
from worker.reasons import Interrupted


@pytest.mark.parametrize(
    ("error", "code", "counted", "words"),
    [
        (HostDied(-9), "process_died", True, "was killed"),
        (HostDied(-11), "process_died", True, "signal 11"),
        (HostDied(3), "process_died", True, "exit status 3"),
        (Interrupted("base_model_unusable", "torn"), "base_model_unusable", True, "torn"),
        (Interrupted("stalled", "no progress"), "stalled", True, "no progress"),
        (Interrupted("disk_full", "full"), "disk_full", False, "full"),
        (ObjectMissing("a"), "storage_damaged", True, "missing or damaged"),
        (ObjectDamaged("a"), "storage_damaged", True, "missing or damaged"),
        (Unavailable("the store is away"), "storage_unavailable", False, "away"),
        (NoSpace("no room"), "disk_full", False, "no room"),
        (OSError(errno.ENOSPC, "No space"), "disk_full", False, "disk is full"),
        (OSError(errno.EIO, "Input/output error"), "io_error", False, "Input/output error"),
        (OSError(errno.ESTALE, "Stale file handle"), "io_error", False, "Stale"),
        (TimeoutError("timed out"), "io_error", False, "timed out"),
        (ConnectionResetError("reset by peer"), "io_error", False, "reset by peer"),
        (Interrupted("io_error", "Input/output error"), "io_error", False, "Input/output error"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "file_unusable", True, "No such file"),
        (PermissionError(errno.EACCES, "Permission denied"), "file_unusable", True, "Permission denied"),
        (Interrupted("file_unusable", "No such file"), "file_unusable", True, "No such file"),
        (TimedOut("no answer"), "storage_unavailable", False, "no answer"),
        (NotFound("no such adapter"), "not_found", True, "no such adapter"),
        (KeyError("x"), "internal_error", True, "KeyError"),
    ],
)
def test_reasons(error: Exception, code: str, counted: bool, words: str) -> None:
    why = reasons.of(error, None, out_of_memory=False)
    assert (why.code, why.counted) == (code, counted)
    assert words in why.message


def test_the_kernel_has_ended_it_for_lack_of_memory() -> None:
    why = reasons.of(HostDied(-9), None, out_of_memory=True)
    assert (why.code, why.counted) == ("out_of_memory", True)
    assert "lower sequence_length" in why.message
    # Somebody else's process was ended, this one died of something else.
    assert reasons.of(HostDied(-11), None, out_of_memory=True).code == "process_died"


@pytest.mark.parametrize(("remedy", "counted"), [("restart", True), ("reset", False), ("drain", False)])
def test_a_fault_of_the_gpu_is_not_the_jobs_unless_a_program_may_have_caused_it(remedy: Remedy, counted: bool) -> None:
    fault = DeviceFault("0000:3b:00", 31, "MMU fault", remedy)
    for error in (HostDied(1), Interrupted("internal_error", "CUDA error")):
        why = reasons.of(error, fault, out_of_memory=False)
        assert (why.code, why.counted, why.message) == ("device_fault", counted, "the GPU reported Xid 31 (MMU fault)")
    assert reasons.of(Unavailable("away"), fault, out_of_memory=False).code == "storage_unavailable"


@pytest.mark.parametrize(
    ("cgroup", "file"),
    [
        ("0::/luthier\n", "luthier/memory.events"),
        ("0::/\n", "memory.events"),
        ("7:cpu:/x\n4:memory:/luthier\n0::/\n", "memory/luthier/memory.oom_control"),
    ],
)
def test_where_the_kernel_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, file: str) -> None:
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroups")
    assert memory.oom_kills() == 0  # nobody counts
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "vmstat").write_text("nr_free_pages 5\noom_kill 9\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    assert memory.oom_kills() == 9
    counter = tmp_path / "cgroups" / file
    counter.parent.mkdir(parents=True, exist_ok=True)
    counter.write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    assert memory.oom_kills() == 2
