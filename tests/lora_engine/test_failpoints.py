"""The failpoints: each is where the list says, each does what it is told, and none is without a test."""

import ast
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_engine import failpoints
from lora_engine.failpoints import POINTS, InjectedFault
from tests.conftest import Failpoints

ROOT = Path(__file__).parents[2]


def reached() -> Iterator[tuple[str, str]]:
    """(name, file) of every call of `failpoints.reach` in the product."""
    for package in ("lora_engine", "service", "worker"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_bytes())):
                match node:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id="failpoints"), attr="reach"), args=[argument]):
                        assert isinstance(argument, ast.Constant), f"{path}:{node.lineno}: a name, and not a variable"
                        yield str(argument.value), path.relative_to(ROOT).as_posix()


def test_every_point_is_reached_in_the_one_place_that_the_list_names() -> None:
    assert sorted(reached()) == sorted(POINTS.items())


def test_no_point_is_without_a_test() -> None:
    """A name that a test outside of this file spells: it arms the point, and says what has to follow."""
    texts = [path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert [name for name in POINTS if not any(f'"{name}"' in text for text in texts)] == []


def test_a_point_that_is_off_costs_next_to_nothing() -> None:
    """Far below a microsecond, where the quickest of what lies around them takes a hundred."""
    began = time.perf_counter()
    for _ in range(100_000):
        failpoints.reach("host.step")
    assert time.perf_counter() - began < 0.5


def test_only_points_that_there_are_can_be_armed(points: Failpoints) -> None:
    with pytest.raises(KeyError):
        points.arm("host.stepp")


def test_a_point_acts_once_and_the_others_never(points: Failpoints) -> None:
    points.arm("host.step", "raise")
    failpoints.reach("host.loading")
    with pytest.raises(InjectedFault, match=r"host\.step"):
        failpoints.reach("host.step")
    assert not points.is_armed("host.step")
    failpoints.reach("host.step")


def test_a_point_acts_the_how_manieth_time_it_is_told_and_from_then_on(points: Failpoints) -> None:
    points.arm("host.step", "raise", at=3, always=True, error="ENOSPC")
    failpoints.reach("host.step")
    failpoints.reach("host.step")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            failpoints.reach("host.step")


def test_a_point_waits(points: Failpoints) -> None:
    points.arm("host.step", "sleep", seconds=0.05)
    began = time.monotonic()
    failpoints.reach("host.step")
    assert time.monotonic() - began >= 0.05


def test_another_process_is_killed_or_stopped(points: Failpoints) -> None:
    program = "from lora_engine import failpoints; failpoints.reach('host.step')"
    points.arm("host.step")
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    points.arm("host.step", "stop")
    stopped = subprocess.Popen([sys.executable, "-c", program])
    while points.is_armed("host.step"):
        time.sleep(0.01)
    with pytest.raises(subprocess.TimeoutExpired):
        stopped.wait(0.2)
    stopped.send_signal(signal.SIGCONT)
    assert stopped.wait(10) == 0
