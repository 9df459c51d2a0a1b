"""What Prometheus is told, at an address of its own."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from service import leases
from service.db import Database, now
from service.leases import Fenced, Progress
from service.metrics import MetricsServer
from service.models import Job
from service.settings import Settings
from tests.servers import free_port
from tests.service.site import Site, open_site

Samples = dict[str, float]


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    bind = f"127.0.0.1:{free_port()}"
    with open_site(Settings(data_dir=tmp_path / "data", database_url=database_url, metrics_bind=bind)) as site:
        yield site


def scrape(site: Site) -> Samples:
    """By name and labels, as in `luthier_jobs{kind=train,state=queued}`."""
    with urllib.request.urlopen(f"http://{site.settings.metrics_bind}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            samples[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return samples


def grown(before: Samples, after: Samples, name: str) -> float:
    return after.get(name, 0) - before.get(name, 0)


def test_jobs_leases_and_the_queues_age(site: Site) -> None:
    waiting = site.train()
    site.train()
    with site.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == waiting).values(run_after=now() - 500, priority=5))
    claim = site.claim()
    point = {"step": 3, "seconds": 0.25, "tokens_per_second": 1000.5, "peak_bytes": 7_000_000, "loss": 2.0}
    with site.database.unit_of_work() as session:
        leases.renew(session, claim, 60, Progress(points=({"step": 2, "seconds": 9.0}, point)))
        session.execute(update(Job).where(Job.id == claim.job_id).values(device_slot="cuda:0"))
    told = scrape(site)
    assert told["luthier_database_up"] == 1
    assert told["luthier_jobs{kind=train,state=queued}"] == 1
    assert told["luthier_jobs{kind=train,state=running}"] == 1
    assert 499 < told["luthier_queue_age_seconds"] < 530
    assert (told["luthier_leases_held"], told["luthier_leases_overdue"]) == (1, 0)
    assert told["luthier_step_seconds{device=cuda:0}"] == 0.25
    assert told["luthier_tokens_per_second{device=cuda:0}"] == 1000.5
    assert told["luthier_peak_memory_bytes{device=cuda:0}"] == 7_000_000
    assert told["process_resident_memory_bytes"] > 10_000_000


def test_ends_fences_and_reaped_leases_are_counted(site: Site) -> None:
    before = scrape(site)
    site.train()
    claim = site.claim()
    with site.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == claim.job_id).values(lease_until=now() - 1))
    assert scrape(site)["luthier_leases_overdue"] == 1
    with site.database.unit_of_work() as session:
        leases.reap(session)
    with pytest.raises(Fenced), site.database.unit_of_work() as session:
        leases.renew(session, claim, 60)
    site.ann.post(f"/jobs/{claim.job_id}/cancel")
    after = scrape(site)
    assert grown(before, after, "luthier_leases_expired_total") == 1
    assert grown(before, after, "luthier_fences_total") == 1
    assert grown(before, after, "luthier_jobs_ended_total{kind=train,state=cancelled}") == 1


def test_requests_are_timed_by_route_and_clients_make_up_no_labels(site: Site) -> None:
    before = scrape(site)
    job_id = site.train()
    site.ann.get(f"/jobs/{job_id}")
    site.ann.request("BREW", "/jobs")
    for number in range(3):
        site.ann.get(f"/made-up-{number}")
    after = scrape(site)
    count = "luthier_http_response_seconds_count{method=%s,route=%s,status=%d}"
    assert grown(before, after, count % ("GET", "/jobs/{job_id}", 200)) == 1
    assert grown(before, after, count % ("GET", "none", 404)) == 3
    assert not any(word in name for name in after for word in ("made-up", "BREW", job_id, site.ids["ann"]))


def test_a_database_that_is_down_does_not_take_the_rest_along(tmp_path: Path) -> None:
    bind = f"127.0.0.1:{free_port()}"
    settings = Settings(data_dir=tmp_path, metrics_bind=bind)
    database = Database("postgresql+psycopg://nobody@127.0.0.1:1/x")
    server = MetricsServer(settings, database)
    server.start()
    with urllib.request.urlopen(f"http://{bind}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    server.stop()
    database.close()
    assert "luthier_database_up 0.0" in text
    assert "process_resident_memory_bytes" in text


def test_the_api_itself_tells_nobody(site: Site) -> None:
    assert site.ann.get("/metrics").status_code == site.client().get("/metrics").status_code == 404
