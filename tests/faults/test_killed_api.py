"""The API killed at every point of a request: nothing that was promised is lost, nothing is done twice (F1 to F4)."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
import redis
from sqlalchemy import func, select, update

from lora_engine.adapter_header import digest
from service import datasets, leases, sweep
from service.db import now
from service.models import Adapter, Dataset, Job, OutboxMessage
from service.storage import put_folder
from tests.conftest import postgres_database
from tests.faults import history
from tests.faults.api import Api
from tests.servers import Valkey, wait_until
from tests.service import rows
from tests.service.adapter_files import make_adapter
from tests.service.site import LINE


@pytest.fixture(scope="module")
def broker() -> Iterator[Valkey]:
    valkey = Valkey()
    yield valkey
    valkey.close()


@pytest.fixture(scope="module")
def running(postgres_server: str, postgres_template: str, broker: Valkey) -> Iterator[Api]:
    with postgres_database(postgres_server, postgres_template) as url:
        api = Api(url, broker.url, MAX_UPLOAD_BYTES=str(8 << 20))
        yield api
        api.close()


@pytest.fixture
def api(running: Api) -> Api:
    running.start()
    return running


def jobs(api: Api) -> int:
    with api.database.reading() as session:
        return session.scalar(select(func.count()).select_from(Job)) or 0


def unsent(api: Api) -> int:
    with api.database.reading() as session:
        return session.scalar(select(func.count()).select_from(OutboxMessage)) or 0


def messages(broker: Valkey) -> int:
    with redis.Redis(unix_socket_path=str(broker.socket)) as client:
        return int(client.llen("luthier"))  # type: ignore[arg-type]


def upload(api: Api) -> None:
    api.cut_off("POST", "/datasets", content=LINE * 50_000, headers={"content-type": "application/jsonl"})


def test_f1_killed_while_it_receives_an_upload(api: Api) -> None:
    api.points.arm("upload.receiving", at=3)
    upload(api)
    with api.database.reading() as session:
        assert session.scalars(select(Dataset.id)).all() == []
    (left,) = api.uploads_in_flight()
    datasets.sweep_abandoned(api.database, api.storage, api.settings)
    assert left.exists(), "it could be another process's upload"
    long_ago = time.time() - datasets.ABANDONED_SECONDS - 1
    os.utime(left, (long_ago, long_ago))
    datasets.sweep_abandoned(api.database, api.storage, api.settings)
    assert not left.exists()
    api.start()
    assert api.upload().status_code == 201


@pytest.mark.parametrize("point", ["dataset.before_object", "storage.before_rename", "dataset.after_object"])
def test_f1_killed_while_it_stores_an_upload(api: Api, point: str) -> None:
    api.points.arm(point)
    upload(api)
    with api.database.reading() as session:
        row = session.scalars(select(Dataset).where(Dataset.status == "validating")).one()
    api.start()
    body = {"base_model": rows.BASE_MODEL, "dataset": row.id}
    assert api.client.post("/jobs", json=body).status_code == 409, "nobody trains on what was never stored"
    assert api.client.get(f"/datasets/{row.id}/content").status_code == 409
    with api.database.unit_of_work() as session:
        session.execute(update(Dataset).where(Dataset.id == row.id).values(created_at=now() - 3601))
    datasets.sweep_abandoned(api.database, api.storage, api.settings)
    assert api.client.get(f"/datasets/{row.id}").status_code == 404
    folder = api.settings.data_dir / "objects" / "datasets" / row.id
    assert not folder.exists(), "also what was written beside its place"
    for path in api.uploads_in_flight():
        path.unlink()


def test_f1_a_client_that_goes_away_leaves_nothing(api: Api) -> None:
    head = (
        f"POST /datasets HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\nContent-Type: application/jsonl\r\n"
    )
    for ending in (b"", LINE):
        with socket.create_connection(("127.0.0.1", api.port)) as client:
            client.sendall(f"{head}Content-Length: 5000000\r\n\r\n".encode() + LINE * 1000 + ending)
            wait_until(lambda: len(api.uploads_in_flight()) == 1)
        wait_until(lambda: api.uploads_in_flight() == [])


def test_f2_killed_before_the_commit_nothing_exists_and_the_same_key_makes_one(api: Api) -> None:
    dataset_id, before = api.dataset(), jobs(api)
    api.points.arm("submit.before_commit")
    body = {"base_model": rows.BASE_MODEL, "dataset": dataset_id}
    api.cut_off("POST", "/jobs", json=body, headers={"Idempotency-Key": "f2"})
    assert jobs(api) == before
    api.start()
    answers = [api.submit(dataset_id, "f2") for _ in range(2)]
    assert [answer.status_code for answer in answers] == [201, 201]
    assert jobs(api) == before + 1
    history.check(api.database, keys={"f2": answers[0].json()["id"]}, at_rest=False)


def test_f3_killed_after_the_commit_the_same_key_answers_with_the_job(api: Api) -> None:
    dataset_id, before = api.dataset(), jobs(api)
    api.points.arm("commit.before_wake")
    body = {"base_model": rows.BASE_MODEL, "dataset": dataset_id}
    api.cut_off("POST", "/jobs", json=body, headers={"Idempotency-Key": "f3"})
    assert jobs(api) == before + 1
    api.start()
    answer = api.submit(dataset_id, "f3")
    assert (answer.status_code, answer.headers["idempotent-replayed"]) == (201, "true")
    assert jobs(api) == before + 1
    history.check(api.database, keys={"f3": answer.json()["id"]}, at_rest=False)


@pytest.mark.parametrize(("point", "sent_before"), [("relay.before_send", 0), ("relay.after_send", 1)])
def test_f4_killed_on_the_way_to_the_broker_it_sends_when_it_is_back(
    api: Api, broker: Valkey, point: str, sent_before: int
) -> None:
    dataset_id = api.dataset()
    wait_until(lambda: unsent(api) == 0)
    before = messages(broker)
    api.points.arm(point)
    with suppress(httpx.TransportError):  # the relay is another thread: the answer may have come first, or not
        api.submit(dataset_id, point)
    assert api.died()
    assert (unsent(api), messages(broker)) == (1, before + sent_before)
    api.start()
    wait_until(lambda: unsent(api) == 0)
    assert messages(broker) == before + sent_before + 1, "the second time does no harm"
    answer = api.submit(dataset_id, point)
    assert answer.headers["idempotent-replayed"] == "true"


@pytest.mark.parametrize(("point", "published"), [("stack.before_publish", 0), ("stack.after_publish", 1)])
def test_killed_while_it_stacks_within_the_request(api: Api, tmp_path: Path, point: str, published: int) -> None:
    sources = [add_adapter(api, tmp_path / name) for name in ("a", "b")]
    weight = 0.25 if published else 0.75  # another recipe each
    body = {"adapters": [{"adapter": source, "weight": weight} for source in sources]}
    api.points.arm(point)
    api.cut_off("POST", "/adapters/merge", json=body, headers={"Idempotency-Key": point})
    with api.database.reading() as session:
        job = session.scalars(select(Job).where(Job.kind == "merge").order_by(Job.id.desc())).first()
        assert job is not None
        made = session.scalars(select(Adapter.id).where(Adapter.job_id == job.id)).all()
    assert (job.state, len(made)) == ("succeeded" if published else "running", published)
    with api.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job.id, Job.state == "running").values(lease_until=now() - 1))
    api.start()
    with api.database.unit_of_work() as session:
        leases.reap(session)
    answer = api.client.post("/adapters/merge", json=body, headers={"Idempotency-Key": point})
    assert answer.is_success, answer.text
    with api.database.reading() as session:
        assert session.get_one(Job, job.id, populate_existing=True).state == ("succeeded" if published else "queued")
    history.check(api.database, api.storage, keys={point: job.id}, at_rest=False)


def add_adapter(api: Api, folder: Path) -> str:
    """A trained one, made by the hand of a worker."""
    job_id = rows.add_job(api.database, api.owner_id, priority=-1)
    with api.database.unit_of_work() as session:
        claim = leases.claim(session, "w", job_id, 60)
        assert claim is not None
        leases.start(session, claim)
    folder.mkdir()
    for name, content in make_adapter().items():
        (folder / name).write_bytes(content)
    prefix = leases.result_prefix(claim, "adapter")
    files = put_folder(api.storage, prefix, folder)
    result = leases.Result(prefix=prefix, files=files, digest=digest(folder), rank=8, metrics={})
    with api.database.unit_of_work() as session:
        leases.succeed(session, claim, result)
    return result.id


def test_the_sweep_goes_on_where_another_was_killed(api: Api) -> None:
    """Objects are deleted before the row says so: the next sweep deletes what is left, and then says so."""
    dataset_id = api.dataset()
    job_id = api.submit(dataset_id, "purge").json()["id"]
    with api.database.unit_of_work() as session:
        session.execute(update(Job).where(Job.id == job_id).values(priority=-1))
    with api.database.unit_of_work() as session:
        claim = leases.claim(session, "w", "slot", 60)
        assert claim is not None
        leases.start(session, claim)
        prefix = leases.result_prefix(claim, "adapter")
        result = leases.Result(prefix=prefix, files=[], digest="d", rank=1, metrics={})
        leases.succeed(session, claim, result)
    assert api.client.delete(f"/adapters/{result.id}").is_success
    assert api.process is not None
    api.process.kill()
    api.points.arm("sweep.objects_deleted")
    api.process.wait()
    api.start()
    assert api.died()
    with api.database.reading() as session:
        assert session.get_one(Adapter, result.id).purged_at is None
    sweep.purge_deleted(api.database, api.storage)
    with api.database.reading() as session:
        assert session.get_one(Adapter, result.id).purged_at is not None


def test_f34_the_reaper_is_killed_and_another_reaps(api: Api) -> None:
    job_id = rows.add_job(api.database, api.owner_id, priority=-1)
    with api.database.unit_of_work() as session:
        assert leases.claim(session, "w", "lost", 60)
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))
    assert api.process is not None
    api.process.kill()
    api.process.wait()
    api.points.arm("sweep.before_reap_commit")
    # A process that has just started reaps nothing for one lease.
    api.environment |= {f"LUTHIER_{name}_SECONDS": "1" for name in ("LEASE", "SWEEP")} | {
        "LUTHIER_HEARTBEAT_SECONDS": "0.5"
    }
    api.start()
    assert api.died()
    with api.database.reading() as session:
        assert session.get_one(Job, job_id).state == "claimed", "all or nothing"
    api.start()
    wait_until(lambda: state(api, job_id) == "queued")
    history.check(api.database, at_rest=False)


def state(api: Api, job_id: str) -> str:
    with api.database.reading() as session:
        return session.get_one(Job, job_id).state
