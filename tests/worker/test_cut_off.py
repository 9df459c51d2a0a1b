"""A worker that does not reach its database for longer than its lease: PostgreSQL behind a proxy that goes silent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import make_url

from service.db import Database
from tests import servers
from tests.conftest import Failpoints
from tests.faults import history
from tests.faults.proxy import Proxy
from tests.worker.bench import Bench
from tests.worker.lone import LoneWorker

LORA = {"rank": 4, "dropout": 0.1}


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, examples: bytes, module_postgres_url: str
) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("bench"), tiny_model, examples, module_postgres_url)
    yield bench
    bench.close()


@pytest.fixture
def proxy(module_postgres_url: str) -> Iterator[Proxy]:
    folder = Path(str(make_url(module_postgres_url).query["host"]))
    with Proxy(folder / ".s.PGSQL.5432") as proxy:
        yield proxy


def through(proxy: Proxy, url: str) -> str:
    return make_url(url).set(host="127.0.0.1", port=proxy.port, query={}).render_as_string(hide_password=False)


def test_another_worker_takes_over_and_the_first_one_stops(bench: Bench, proxy: Proxy, points: Failpoints) -> None:
    """Its store stays in reach: what it uploads lies below its own epoch, and is removed."""
    undisturbed = bench.submit(lora=LORA, epochs=2)
    bench.run()
    job_id = bench.submit(lora=LORA, epochs=2)
    points.arm("worker.checkpoint_uploaded", "sleep", seconds=0.5)
    with LoneWorker(bench, points, DATABASE_URL=through(proxy, bench.settings.database_url)) as worker:
        worker.wait_for("worker.checkpoint_uploaded")
        proxy.hang()
        bench.reap(job_id)
        bench.rest()
        bench.run()
        job, adapter = bench.job(job_id), bench.adapter(job_id)
        assert (job.state, adapter.digest) == ("succeeded", bench.adapter(undisturbed).digest)
        proxy.heal()
        servers.wait_until(lambda: "fenced" in worker.log)
    after = bench.job(job_id)
    assert (after.state, after.epoch, after.event_seq) == (job.state, job.epoch, job.event_seq)
    history.check(bench.database, bench.storage, at_rest=False, checkpoint_every=3)


def test_a_worker_that_is_cut_off_for_too_long_stops(
    bench: Bench, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains on for a while, as nobody may be able to take its job, then keeps a checkpoint and ends the work."""
    monkeypatch.setattr("worker.progress._CUT_SECONDS", 2.0)
    monkeypatch.setattr("worker.run._RETRY_SECONDS", 0.1)
    job_id = bench.submit(lora=LORA, epochs=1000)
    direct, supervisor = bench.database, bench.supervisor
    supervisor._database = Database(through(proxy, bench.settings.database_url))

    hosts = []

    def cut() -> None:
        bench.until(job_id, lambda job: job.step > 2)
        hosts.append(bench.host)
        proxy.cut()

    bench.run_while(cut)
    supervisor._database.close()
    supervisor._database = direct
    assert not hosts[0].alive
    step = bench.job(job_id).step
    proxy.heal()
    with bench.database.unit_of_work() as session:
        bench.expire(session, job_id)
    bench.reap(job_id)
    job = bench.job(job_id)
    assert (job.state, job.lost_without_progress) == ("queued", 1)
    assert job.step == step
