"""Jobs as their owners see them: what is refused before it queues, and what one key makes once."""

import threading
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from lora_engine.config import LoraConfig
from service import jobs, leases
from service.db import Database
from service.errors import Conflict, Invalid, NotFound
from service.jobs import Idempotency, TrainingRequest
from service.leases import Fenced
from service.models import Adapter, Job, OutboxMessage, new_id
from tests.service import rows


@pytest.fixture
def owner(database: Database) -> str:
    rows.add_base_model(database)
    return rows.add_user(database)


def request(database: Database, owner: str, **fields: Any) -> TrainingRequest:
    return TrainingRequest(base_model=rows.BASE_MODEL, dataset=rows.add_dataset(database, owner), **fields)


def add_adapter(database: Database, owner: str, base_model_id: str = rows.BASE_MODEL) -> str:
    job_id = rows.add_job(database, owner, base_model_id=rows.add_base_model(database, base_model_id))
    with database.unit_of_work() as session:
        adapter = Adapter(
            id=new_id("adapter"), owner_id=owner, job_id=job_id, base_model_id=base_model_id, name="a", kind="train",
            epoch=1, prefix="p", files=[], digest="d" * 64, rank=4, metrics={},
        )  # fmt: skip
        session.add(adapter)
    return adapter.id


def test_a_job_is_queued_with_its_spec_and_announced(database: Database, owner: str) -> None:
    asked = request(database, owner, name="my job", lora=LoraConfig(rank=8))
    with database.unit_of_work() as session:
        job, created = jobs.submit_training(session, owner, asked)
    assert created
    with database.reading() as session:
        stored = jobs.get(session, owner, job.id)
        assert (stored.state, stored.name, stored.spec["lora"]["rank"]) == ("queued", "my job", 8)
        assert session.scalar(select(OutboxMessage.job_id)) == job.id


def test_what_cannot_be_is_refused_by_field(database: Database, owner: str) -> None:
    stranger = rows.add_user(database, "eve")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"base_model": "../etc"}, Invalid, "base_model"),
        ({"dataset": "dataset-0"}, NotFound, "dataset"),
        ({"dataset": rows.add_dataset(database, stranger)}, NotFound, "dataset"),
        ({"dataset": rows.add_dataset(database, owner, status="validating")}, Conflict, "dataset"),
        ({"validation_dataset": rows.add_dataset(database, stranger)}, NotFound, "validation_dataset"),
        ({"lora": LoraConfig(target_modules=["q_proj", "nose"])}, Invalid, "lora.target_modules"),
    ]
    for fields, kind, param in cases:
        values = {"base_model": rows.BASE_MODEL, "dataset": rows.add_dataset(database, owner)} | fields
        with pytest.raises(kind) as refused, database.unit_of_work() as session:
            jobs.submit_training(session, owner, TrainingRequest(**values))
        assert refused.value.param == param  # type: ignore[attr-defined]
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 0


@pytest.mark.parametrize("names", [["q_proj", "model.layers.1.self_attn.v_proj"], ["value"], ["layers.[0-1].*.q_proj"]])
def test_module_names_are_those_of_the_engine(database: Database, owner: str, names: list[str]) -> None:
    with database.unit_of_work() as session:
        jobs.submit_training(session, owner, request(database, owner, lora=LoraConfig(target_modules=names)))


def test_one_key_makes_one_job(database: Database, owner: str) -> None:
    asked, key = request(database, owner), Idempotency(key="k", body_sha256="1" * 64)
    made = []
    for _ in range(2):
        with database.unit_of_work() as session:
            made.append(jobs.submit_training(session, owner, asked, key))
    assert made[0][0].id == made[1][0].id
    assert [created for _, created in made] == [True, False]
    with pytest.raises(Invalid) as refused, database.unit_of_work() as session:
        jobs.submit_training(session, owner, asked, Idempotency(key="k", body_sha256="2" * 64))
    assert refused.value.code == "idempotency_mismatch"
    other = rows.add_user(database, "bob")
    with database.unit_of_work() as session:
        _, created = jobs.submit_training(session, other, request(database, other), key)
    assert created


def test_one_key_at_the_same_moment_makes_one_job(database: Database, owner: str) -> None:
    asked, key = request(database, owner), Idempotency(key="k", body_sha256="1" * 64)
    start, made = threading.Barrier(8), []

    def submit() -> None:
        start.wait()
        with database.unit_of_work() as session:
            made.append(jobs.submit_training(session, owner, asked, key)[0].id)

    threads = [threading.Thread(target=submit) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Job)) == 1


def test_pages_are_newest_first_and_the_owners_only(database: Database, owner: str) -> None:
    mine = [rows.add_job(database, owner) for _ in range(5)]
    rows.add_job(database)
    with database.reading() as session:
        first, more = jobs.page(session, owner, None, 3)
        rest, no_more = jobs.page(session, owner, first[-1].id, 3)
    assert [job.id for job in (*first, *rest)] == mine[::-1]
    assert (more, no_more) == (True, False)
    with database.reading() as session:
        assert jobs.page(session, owner, None, 9, kind="merge")[0] == []
        assert jobs.page(session, owner, None, 9, status="failed")[0] == []


def test_another_owners_job_is_not_there(database: Database, owner: str) -> None:
    theirs = rows.add_job(database)
    for job_id in (theirs, "job-0"):
        with pytest.raises(NotFound), database.reading() as session:
            jobs.get(session, owner, job_id)
        with pytest.raises(NotFound), database.unit_of_work() as session:
            jobs.cancel(session, owner, job_id)
    with database.reading() as session:
        assert session.get_one(Job, theirs).cancel_requested_at is None


def test_cancelling_a_queued_job_ends_it_and_once(database: Database, owner: str) -> None:
    job_id = rows.add_job(database, owner)
    with database.unit_of_work() as session:
        assert jobs.cancel(session, owner, job_id).state == "cancelled"
    with pytest.raises(Conflict, match="already been cancelled"), database.unit_of_work() as session:
        jobs.cancel(session, owner, job_id)


def test_cancel_racing_publish_has_one_winner(database: Database, owner: str) -> None:
    outcomes = set()
    for round_ in range(25):
        rows.add_job(database, owner)
        with database.unit_of_work() as session:
            claim = leases.claim(session, "w", f"cpu:{round_}", 60)
            assert claim is not None
            leases.start(session, claim)
        start, answers = threading.Barrier(2), dict[str, bool]()

        def cancel(session: Session, claim: leases.Claim = claim) -> None:
            jobs.cancel(session, owner, claim.job_id)

        def publish(session: Session, claim: leases.Claim = claim) -> None:
            result = leases.Result(prefix="p", files=[], digest="d", rank=1, metrics={})
            leases.succeed(session, claim, result)

        def attempt(act: Any, start: threading.Barrier = start, answers: dict[str, bool] = answers) -> None:
            start.wait()
            try:
                with database.unit_of_work() as session:
                    act(session)
                answers[act.__name__] = True
            except (Conflict, Fenced):
                answers[act.__name__] = False

        threads = [threading.Thread(target=attempt, args=(act,)) for act in (cancel, publish)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answers.values()) == [False, True]
        with database.reading() as session:
            state = session.get_one(Job, claim.job_id).state
            adapters = session.scalars(select(Adapter).where(Adapter.job_id == claim.job_id)).all()
        assert (state, len(adapters)) == (("succeeded", 1) if answers["publish"] else ("cancelling", 0))
        outcomes.add(state)
    assert outcomes <= {"succeeded", "cancelling"}
