"""kill -9 of every process while a job runs: one adapter all the same, with the bytes of an undisturbed run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.worker.embedded import Embedded

HOST, WORKER, API, BROKER = ("worker.host",), ("-m worker",), ("service.cli", "api"), ("valkey",)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def embedded(request: pytest.FixtureRequest, tiny_model: Path, examples: bytes) -> Iterator[Embedded]:
    url = "" if request.param == "sqlite" else request.getfixturevalue("module_postgres_url")
    embedded = Embedded(url)
    embedded.set_up(tiny_model, examples)
    yield embedded
    embedded.close()


def test_a_job_survives_the_death_of_every_process(embedded: Embedded) -> None:
    # Slow enough that all four deaths fall into the job, in the middle of its steps.
    training: dict[str, Any] = {"epochs": 30, "checkpoint_every": 20}
    undisturbed = embedded.ended(embedded.submit(**training))
    assert undisturbed["status"] == "succeeded", undisturbed["error"]
    job_id = embedded.submit(**training)
    killed = []
    for attempt, step, name in ((1, 25, BROKER), (1, 45, API), (1, 65, HOST), (2, 85, WORKER)):

        def due(job: dict[str, Any], attempt: int = attempt, step: int = step) -> bool:
            return (job["attempt"], job["phase"]) == (attempt, "training") and bool(job["step"] >= step)

        embedded.until(job_id, due)
        pid = embedded.pid(*name)
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
        killed.append(pid)
    job = embedded.ended(job_id)
    assert job["status"] == "succeeded", job["error"]
    assert job["attempt"] == 3
    adapters = embedded.get("/adapters")["data"]
    (mine,) = [adapter for adapter in adapters if adapter["job"] == job_id]
    (reference,) = [adapter for adapter in adapters if adapter["job"] == undisturbed["id"]]
    assert mine["digest"] == reference["digest"]
    assert mine["files"] == reference["files"]
    events = embedded.get(f"/jobs/{job_id}/events?limit=100")["data"]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    # The host that lost its worker is gone too, and everything that was killed runs again.
    assert not any(psutil.pid_exists(pid) for pid in killed)
    assert {embedded.pid(*name) for name in (HOST, WORKER, API, BROKER)}.isdisjoint(killed)


def test_an_accepted_job_survives_a_dead_broker(embedded: Embedded) -> None:
    os.kill(embedded.pid(*BROKER), signal.SIGKILL)
    job_id = embedded.submit(epochs=1)
    assert embedded.ended(job_id)["status"] == "succeeded"


def test_stopping_gives_the_job_back_and_starting_goes_on(embedded: Embedded) -> None:
    reference = embedded.ended(embedded.submit(epochs=30))
    job_id = embedded.submit(epochs=30)
    embedded.until(job_id, lambda job: job["step"] >= 10)
    tree = embedded.tree()
    assert embedded.stop() == 0
    assert psutil.wait_procs(tree, timeout=5)[1] == []
    with pytest.raises(httpx.ConnectError):
        embedded.client.get("/healthz")
    embedded.restart()
    job = embedded.ended(job_id)
    assert (job["status"], job["attempt"]) == ("succeeded", 2)
    events = embedded.get(f"/jobs/{job_id}/events?limit=100")["data"]
    assert any("Given back" in event["message"] for event in events)
    assert not any(event["level"] == "warn" for event in events)
    digests = {embedded.get(f"/adapters/{adapter}")["digest"] for adapter in (job["adapter"], reference["adapter"])}
    assert len(digests) == 1
