"""kill -9 of every process while a job runs: one adapter all the same, with the bytes of an undisturbed run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import servers
from tests.worker.embedded import Embedded

HOST, WORKER, API, BROKER = ("worker.host",), ("-m worker",), ("service.cli", "api"), ("valkey",)
# Long enough to be caught in the middle: some ten seconds on a quick machine.
LONG: dict[str, Any] = {"epochs": 120, "checkpoint_every": 20}


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def embedded(request: pytest.FixtureRequest, tiny_model: Path, examples: bytes) -> Iterator[Embedded]:
    url = "" if request.param == "sqlite" else request.getfixturevalue("module_postgres_url")
    embedded = Embedded(url)
    embedded.set_up(tiny_model, examples)
    yield embedded
    embedded.close()


@pytest.fixture(scope="module")
def undisturbed(embedded: Embedded) -> dict[str, Any]:
    """The adapter of a job that nothing happened to."""
    job = embedded.ended(embedded.submit(**LONG))
    assert job["status"] == "succeeded", job["error"]
    return dict(embedded.get(f"/adapters/{job['adapter']}"))


def catch(embedded: Embedded, job_id: str, attempt: int, step: int) -> int:
    """Stop the host in the middle of the attempt, so that nothing moves on meanwhile. Returns its pid."""
    embedded.until(
        job_id, lambda job: (job["attempt"], job["phase"]) == (attempt, "training") and bool(job["step"] >= step)
    )
    pid = embedded.pid(*HOST)
    os.kill(pid, signal.SIGSTOP)
    return pid


def kill(embedded: Embedded, *name: str) -> int:
    pid = embedded.pid(*name)
    os.kill(pid, signal.SIGKILL)
    servers.wait_until(lambda: embedded.find(*name) not in (pid, None))
    return pid


def test_a_job_survives_the_death_of_every_process(embedded: Embedded, undisturbed: dict[str, Any]) -> None:
    job_id = embedded.submit(**LONG)
    first_host = catch(embedded, job_id, attempt=1, step=25)
    killed = [kill(embedded, *BROKER), kill(embedded, *API), first_host]
    os.kill(first_host, signal.SIGKILL)
    second_host = catch(embedded, job_id, attempt=2, step=45)
    # The kernel ends a host whose worker is gone, even a stopped one.
    killed += [kill(embedded, *WORKER), second_host]
    servers.wait_until(lambda: not psutil.pid_exists(second_host))
    job = embedded.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 3), job["error"]
    adapters = [adapter for adapter in embedded.get("/adapters")["data"] if adapter["job"] == job_id]
    assert [adapter["digest"] for adapter in adapters] == [undisturbed["digest"]]
    assert adapters[0]["files"] == undisturbed["files"]
    # Every step is told once in the end, the plain base model as step 0, and no event is missing.
    assert [point["step"] for point in embedded.get(f"/jobs/{job_id}/metrics")["data"]] == list(range(721))
    numbers, last = [], 0
    while page := embedded.get(f"/jobs/{job_id}/events?limit=100&after={last}")["data"]:
        numbers += [event["seq"] for event in page]
        last = numbers[-1]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {embedded.pid(*name) for name in (HOST, WORKER, API, BROKER)}.isdisjoint(killed)


def test_an_accepted_job_survives_a_dead_broker(embedded: Embedded) -> None:
    os.kill(embedded.pid(*BROKER), signal.SIGKILL)
    job_id = embedded.submit(epochs=1)
    assert embedded.ended(job_id)["status"] == "succeeded"


def test_stopping_gives_the_job_back_and_starting_goes_on(embedded: Embedded, undisturbed: dict[str, Any]) -> None:
    job_id = embedded.submit(**LONG)
    embedded.until(job_id, lambda job: job["step"] >= 10)
    tree = embedded.tree()
    assert embedded.stop() == 0
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    with pytest.raises(httpx.ConnectError):
        embedded.client.get("/healthz")
    embedded.restart()
    job = embedded.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    told = [event for event in embedded.get(f"/jobs/{job_id}/events?limit=100")["data"] if event["type"] == "message"]
    assert not any(event["level"] == "warn" for event in told)
    assert embedded.get(f"/adapters/{job['adapter']}")["digest"] == undisturbed["digest"]
