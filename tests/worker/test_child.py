"""The handle on the host, against a real child process that misbehaves."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from worker import child
from worker.child import Host, HostDied

SCRIPT = """
import os, sys, time
print('{"kind": "ready", "data": {}}', flush=True)
print("a library says hello", flush=True)
print('{"kind": "step", "data": {"step": 1', end="", flush=True)
if sys.argv[1:] == ["wait"]:
    time.sleep(60)
os._exit(3)
"""


@pytest.fixture
def popen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of the script that stands in for the host."""
    arguments: list[str] = []

    class Scripted(subprocess.Popen[str]):
        def __init__(self, _command: list[str], **options: object) -> None:
            super().__init__([sys.executable, "-c", SCRIPT, *arguments], **options)  # type: ignore[call-overload]

    monkeypatch.setattr(child.subprocess, "Popen", Scripted)
    monkeypatch.setattr(Scripted, "__class_getitem__", classmethod(lambda cls, _: cls), raising=False)
    return arguments


def test_lines_that_are_no_messages_are_passed_over_and_death_is_told(popen: list[str]) -> None:
    host = Host("cpu", 1)
    news = host.next_news(30)
    assert news is not None
    assert news.event == "ready"
    for _ in range(2):
        with pytest.raises(HostDied) as died:
            host.next_news(30)
        assert died.value.code == 3
    with pytest.raises(HostDied):
        host.order("train")


def test_a_host_outlives_the_thread_that_asked_for_it(popen: list[str]) -> None:
    popen.append("wait")
    hosts: list[Host] = []
    thread = threading.Thread(target=lambda: hosts.append(Host("cpu", 1)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert hosts[0].alive
    hosts[0].kill()
    assert not hosts[0].alive


def test_the_host_gets_no_credentials(monkeypatch: pytest.MonkeyPatch, popen: list[str]) -> None:
    popen.append("wait")
    for name in ("LUTHIER_DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "HUGGING_FACE_HUB_TOKEN", "DATABASE_URL"):
        monkeypatch.setenv(name, "canary-secret")
    host = Host("cpu", 1)
    environment = Path(f"/proc/{host.pid}/environ").read_bytes()
    host.kill()
    assert b"PATH=" in environment
    assert b"canary-secret" not in environment


def test_a_host_ends_when_nobody_can_give_it_orders_any_more() -> None:
    """Where the kernel does not see to it, the end of its stdin does."""
    program = "import time; from worker.channel import HostChannel; HostChannel(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(5) == 1
