"""What runs away in a confined process ends that process, and nothing else."""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_engine.confined import Confined, Exceeded
from lora_engine.errors import AdapterError, DataError

MB = 1 << 20


# The functions that the children call.


def double(value: Any) -> Any:
    return [value, value]


def refuse(name: str) -> None:
    raise {"data": DataError("no row", line=7), "adapter": AdapterError("no rank")}[name]


def loop(_: Any) -> None:
    while True:
        pass


def stall(_: Any) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(60)


def wait(seconds: float) -> None:
    time.sleep(seconds)


def grow(megabytes: int) -> int:
    return len(bytearray(megabytes * MB))


def boast(megabytes: int) -> str:
    return "x" * (megabytes * MB)


def die(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tire(_: Any, calls: list[None] = []) -> int:  # noqa: B006 - as long as the process
    """Ends the process that it has been called in before."""
    if calls:
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(None)
    return os.getpid()


def die_of(what: str) -> int:
    if what == "this":
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def reach(what: str) -> str:
    try:
        if what == "file":
            Path("/etc/passwd").read_bytes()
        elif what == "write":
            os.write(os.open("/dev/shm/luthier-test", os.O_CREAT | os.O_WRONLY), b"x")
        else:
            socket.create_connection(("127.0.0.1", 9))
    except OSError as error:
        return os.strerror(error.errno or 0)
    return "reached"


def environment(_: Any) -> dict[str, str]:
    sys.stdout.write("to nobody\n")
    sys.stdout.flush()
    return dict(os.environ)


def confined(function: Any, megabytes: int = 64, seconds: float = 20) -> Confined:
    return Confined(f"{__name__}:{function.__name__}", memory_bytes=megabytes * MB, seconds=seconds)


def test_values_go_there_and_back_in_one_process() -> None:
    with confined(double) as child:
        for value in ({"a": [1, 2.5, None, "é\ud800"]}, "x" * (3 * MB)):
            assert child.call(value) == [value, value]


@pytest.mark.parametrize("kind", [DataError, AdapterError])
def test_what_is_refused_there_is_refused_here(kind: type[Exception]) -> None:
    with confined(refuse) as child:
        with pytest.raises(kind) as caught:
            child.call("data" if kind is DataError else "adapter")
        assert caught.value.facts == ({"line": 7} if kind is DataError else {})  # type: ignore[attr-defined]
        with pytest.raises(DataError):  # the process goes on
            child.call("data")


@pytest.mark.parametrize("function", [loop, stall, die], ids=["a loop", "a sleep that stops the clock", "a death"])
def test_what_does_not_end_is_ended(function: Any) -> None:
    with confined(function, seconds=0.2) as child:
        began = time.monotonic()
        with pytest.raises(Exceeded, match=r"0\.2 s or 64 MB"):
            child.call(None)
        assert time.monotonic() - began < 15


def test_a_process_that_died_while_idle_is_nobodys_fault() -> None:
    with confined(die_of) as child:
        process = psutil.Process(child.call("nothing"))
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert child.call("nothing") != process.pid
        with pytest.raises(Exceeded):  # but this is
            child.call("this")


def test_a_call_that_ends_a_used_process_is_made_again_in_a_fresh_one() -> None:
    with confined(tire) as child:
        assert len({child.call(None) for _ in range(3)}) == 3


def test_a_call_that_takes_too_long_is_not_made_again() -> None:
    with confined(wait, seconds=1) as child:
        child.call(0)
        began = time.monotonic()
        with pytest.raises(Exceeded):
            child.call(60)
        assert time.monotonic() - began < 1.9


def test_memory_has_an_end() -> None:
    with confined(grow) as child:
        assert child.call(20) == 20 * MB
        with pytest.raises(Exceeded):
            child.call(100)
        assert child.call(20) == 20 * MB  # of another process


def test_an_answer_has_an_end() -> None:
    with confined(boast, megabytes=1000, seconds=10) as child:
        assert len(child.call(1)) == MB
        with pytest.raises(Exceeded):
            child.call(65)


@pytest.mark.parametrize("what", ["file", "write", "socket"])
def test_it_opens_nothing(what: str) -> None:
    with confined(reach) as child:
        assert child.call(what) == "Too many open files"


def test_it_has_none_of_its_parents_secrets(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LUTHIER_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with confined(environment) as child:
        assert "secret" not in str(child.call(None))
    assert "to nobody" not in capfd.readouterr().out


def test_it_ends_with_its_parents_pipe() -> None:
    child = confined(double)
    child.call(1)
    (process,) = [each for each in psutil.Process().children() if f"{__name__}:double" in each.cmdline()]
    child.close()
    assert not process.is_running()
