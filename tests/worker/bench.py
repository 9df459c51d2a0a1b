"""A worker without Celery: a supervisor and its host, and what a test wants from them."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import make_url, select, update
from sqlalchemy.orm import Session

import migrations
from lora_engine.base_files import file_list
from lora_engine.config import from_mapping
from service import base_models, datasets, jobs, leases, merges
from service.db import Database, now
from service.jobs import TrainingRequest
from service.merges import MergeRequest
from service.models import Adapter, Artifact, Checkpoint, Job, JobEvent
from service.settings import Settings
from service.storage import open_storage
from tests.service import rows
from worker.child import Host
from worker.supervisor import Supervisor

QUICK: dict[str, Any] = {"global_batch": 8, "sequence_length": 128, "checkpoint_every": 3, "learning_rate": 0.01}
# The tiny model has half as many key and value heads as queries.
MODULES = [module | {"outputs": 16 if str(module["name"]).endswith("v_proj") else 32} for module in rows.MODULES]
DESCRIPTION = {"architecture": "LlamaForCausalLM", "parameters": 1, "context_length": 256, "modules": MODULES}


class Bench:
    """One owner, one base model, one dataset; `run` drives every queued job to an end in this thread."""

    def __init__(self, folder: Path, model: Path, examples: bytes, url: str | None = None, **settings: Any) -> None:
        usual = {
            "data_dir": folder / "data", "database_url": url or "", "threads": 1, "device": "cpu",
            "poll_seconds": 3600, "heartbeat_seconds": 0.2, "lease_seconds": 30, "cancel_grace_seconds": 10,
            "max_merge_in_request_bytes": 0,
        }  # fmt: skip
        self.settings = Settings(**usual | settings)
        self.settings.data_dir.mkdir()
        migrations.upgrade(self.settings.database_url)
        self.database = Database(self.settings.database_url)
        self.storage = open_storage(self.settings.storage_url)
        self.supervisor = Supervisor(self.settings, self.database, self.storage)
        self.owner = rows.add_user(self.database)
        self.model, self.examples = model, examples
        self.add_base_model("tiny", model)
        self.dataset = self.upload(examples)

    def close(self) -> None:
        self.supervisor.stop()
        self.database.close()

    def add_base_model(self, base_model_id: str, folder: Path, **fields: Any) -> None:
        with self.database.unit_of_work() as session:
            values = {"source": base_model_id, "revision": None, "files": file_list(folder)}
            base_models.add(session, base_model_id, folder=folder, description=DESCRIPTION, **values | fields)

    def upload(self, content: bytes) -> str:
        with datasets.Upload(self.settings) as upload:
            upload.write(content)
            return datasets.add(self.database, self.storage, self.owner, "examples", upload.finish()).id

    def submit(self, lora: dict[str, Any] | None = None, dataset: str | None = None, **training: Any) -> str:
        body = {"base_model": "tiny", "dataset": dataset or self.dataset, "lora": lora or {"rank": 4}}
        request = from_mapping(TrainingRequest, body | {"training": QUICK | training})
        with self.database.unit_of_work() as session:
            return jobs.submit_training(session, self.owner, request)[0].id

    def merge(self, *sources: tuple[str, float], **fields: Any) -> str:
        """The job of a merge that is left to the worker."""
        body = {"adapters": [{"adapter": adapter, "weight": weight} for adapter, weight in sources], **fields}
        request = from_mapping(MergeRequest, body)
        return merges.merge(self.database, self.storage, self.settings, self.owner, request).job.id

    def adapter_job(self, submit: Callable[..., tuple[Job, bool]], *arguments: Any) -> str:
        """One of `adapter_jobs`, queued."""
        with self.database.unit_of_work() as session:
            return submit(session, self.owner, *arguments)[0].id

    def artifact(self, job_id: str) -> Artifact:
        with self.database.reading() as session:
            return session.scalars(select(Artifact).where(Artifact.job_id == job_id)).one()

    def run(self) -> None:
        self.supervisor.work()

    def rest(self) -> None:
        """What failed here before is not to make the next job wait, nor the next attempt at this one."""
        self.supervisor._failures, self.supervisor._pause_until = 0, 0.0
        with self.database.unit_of_work() as session:
            session.execute(update(Job).where(Job.state == "queued").values(run_after=now()))

    def expire(self, session: Session, job_id: str) -> None:
        """End the lease of a worker that is gone, without waiting for it."""
        session.execute(update(Job).where(Job.id == job_id).values(lease_until=now() - 1))

    def reap(self, job_id: str) -> None:
        """Wait until the lease has run out, and take the job from its worker."""
        deadline = time.monotonic() + 30
        while True:
            with self.database.unit_of_work() as session:
                if job_id in leases.reap(session):
                    return
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def is_writable(self) -> bool:
        """Whether nobody holds the lock on writing, where there is only one."""
        with sqlite3.connect(make_url(self.settings.database_url).database or "", timeout=0.1) as connection:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                return False
        return True

    @property
    def host(self) -> Host:
        """The child process of this worker."""
        assert self.supervisor._host is not None
        return self.supervisor._host

    def run_while(self, act: Callable[[], object]) -> None:
        """Work in another thread, and `act` meanwhile."""
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            act()
        finally:
            thread.join()

    def job(self, job_id: str) -> Job:
        with self.database.reading() as session:
            return session.get_one(Job, job_id)

    def until(self, job_id: str, ready: Callable[[Job], bool], seconds: float = 60) -> Job:
        deadline = time.monotonic() + seconds
        while not ready(job := self.job(job_id)):
            assert time.monotonic() < deadline, f"{job.state} at step {job.step}"
            time.sleep(0.02)
        return job

    def adapter(self, job_id: str) -> Adapter:
        with self.database.reading() as session:
            return session.scalars(select(Adapter).where(Adapter.job_id == job_id)).one()

    def adapters(self, job_id: str) -> int:
        with self.database.reading() as session:
            return len(session.scalars(select(Adapter).where(Adapter.job_id == job_id)).all())

    def checkpoints(self, job_id: str) -> list[Checkpoint]:
        with self.database.reading() as session:
            rows = select(Checkpoint).where(Checkpoint.job_id == job_id).order_by(Checkpoint.step)
            return list(session.scalars(rows))

    def messages(self, job_id: str) -> list[str]:
        with self.database.reading() as session:
            rows = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == "message")
            return [event.message for event in session.scalars(rows.order_by(JobEvent.seq))]

    def metrics(self, job_id: str) -> list[dict[str, Any]]:
        with self.database.reading() as session:
            rows = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
            return list(session.scalars(rows.order_by(JobEvent.seq)))

    def download(self, adapter: Adapter | Artifact, folder: Path) -> Path:
        folder.mkdir(parents=True)
        for file in adapter.files:
            (folder / file["name"]).write_bytes(b"".join(self.storage.read(f"{adapter.prefix}/{file['name']}")))
        return folder

    def lineage(self, adapter: Adapter) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(b"".join(self.storage.read(f"{adapter.prefix}/lineage.json")))
        return content
