"""Rows for tests of what works on rows: made directly, without HTTP, files or a device."""

import time
from typing import Any

from service.db import Database
from service.models import BaseModel, Dataset, Job, User, new_id

BASE_MODEL = "tiny"
MODULES = [
    {"name": f"model.layers.{layer}.self_attn.{name}", "inputs": 32, "outputs": 32, "head": False}
    for layer in range(2)
    for name in ("q_proj", "v_proj")
]


def add_user(database: Database, name: str = "ada") -> str:
    with database.unit_of_work() as session:
        user = User(id=new_id("user"), name=name)
        session.add(user)
    return user.id


def add_base_model(database: Database, base_model_id: str = BASE_MODEL, **fields: Any) -> str:
    with database.unit_of_work() as session:
        if session.get(BaseModel, base_model_id) is None:
            values: dict[str, Any] = {
                "source": base_model_id, "revision": None, "folder": "/nowhere", "digest": "b" * 64, "files": [],
                "architecture": "LlamaForCausalLM", "parameters": 1000, "context_length": 64, "modules": MODULES,
            }  # fmt: skip
            session.add(BaseModel(id=base_model_id, **values | fields))
    return base_model_id


def add_dataset(database: Database, owner_id: str, **fields: Any) -> str:
    with database.unit_of_work() as session:
        values = {"name": "examples", "status": "ready", "bytes": 10, "sha256": "c" * 64, "rows": 1}
        dataset = Dataset(id=new_id("dataset"), owner_id=owner_id, **values | fields)
        session.add(dataset)
    return dataset.id


def add_job(database: Database, owner_id: str | None = None, **fields: Any) -> str:
    """A queued job; ids made in one millisecond do not sort, hence the pause."""
    owner_id = owner_id or add_user(database, new_id("name"))
    base_model_id = add_base_model(database)
    time.sleep(0.002)
    with database.unit_of_work() as session:
        values = {"kind": "train", "name": "job", "spec": {}, "base_model_id": base_model_id}
        job = Job(id=new_id("job"), owner_id=owner_id, **values | fields)
        session.add(job)
    return job.id
