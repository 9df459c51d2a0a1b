"""The wire contract of keys, users, erasures and the audit log: what goes out."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel as Model
from pydantic import ConfigDict

from service.schemas import Page
from service.users import Scope

_USER_ID, _KEY_ID = "user-019a1c3c0f1e7d2ab4c5d6e7f8091a2b", "key-019a1c3c0f2b7c11a2b3c4d5e6f70819"
_DATASET_ID = "dataset-019a1c3e5b7a7c1e9f0b2d4c6a8e1f35"
_KEY: dict[str, Any] = {
    "id": _KEY_ID, "object": "api_key", "hint": "luthier_Xy3k", "scope": "write", "created_at": 1793520000.25,
    "expires_at": 1801296000.25, "last_used_at": 1793520060.5,
}  # fmt: skip
_LIMITS: dict[str, Any] = {"unfinished_jobs": 100, "running_jobs": 2, "stored_bytes": None}


def _with(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class ApiKey(Model):
    """A live key, without its secret: `hint` is how it begins. `last_used_at` is exact to a minute."""

    model_config = _with(_KEY)
    id: str
    object: Literal["api_key"] = "api_key"
    hint: str
    scope: Scope
    created_at: float
    expires_at: float | None
    last_used_at: float | None


class NewApiKey(ApiKey):
    """A new key with its secret, which is shown this once."""

    model_config = _with({**_KEY, "last_used_at": None, "key": "luthier_Xy3kPmO0…"})
    key: str


class ApiKeys(Model):
    """All live keys of the caller, newest first."""

    object: Literal["list"] = "list"
    data: Sequence[ApiKey]


class Limits(Model):
    """Null: that of the operator's settings. `running_jobs` 0: any number."""

    model_config = _with(_LIMITS)
    unfinished_jobs: int | None
    running_jobs: int | None
    stored_bytes: int | None


class Usage(Model):
    """What counts against the limits."""

    model_config = _with({"unfinished_jobs": 3, "running_jobs": 1, "stored_bytes": 52428800})
    unfinished_jobs: int
    running_jobs: int
    stored_bytes: int


class User(Model):
    """Somebody with data of their own. `deleting`: until a worker has let go of their last job."""

    model_config = _with(
        {
            "id": _USER_ID, "object": "user", "name": "ann", "created_at": 1793520000.25, "deleting": False,
            "limits": _LIMITS, "usage": {"unfinished_jobs": 3, "running_jobs": 1, "stored_bytes": 52428800},
        }
    )  # fmt: skip
    id: str
    object: Literal["user"] = "user"
    name: str
    created_at: float
    deleting: bool
    limits: Limits
    usage: Usage


class NewUser(User):
    """A new user, with a first key that is shown this once."""

    key: NewApiKey


class Users(Page):
    data: list[User]


class Erasure(Model):
    """The deletion of a user, or of a dataset with all that was made of it.

    `finished_at` is null while a worker still holds a job of theirs. Then `receipt` has the ids of what is gone and
    counts of the rest: rows by kind, and objects of the store.
    """

    model_config = _with(
        {
            "id": "erasure-019a1c5d0b3f7a54b1c2d3e4f5061728", "object": "erasure", "kind": "dataset",
            "subject": _DATASET_ID, "created_at": 1793530000.25, "finished_at": 1793530000.75,
            "receipt": {
                "datasets": [_DATASET_ID], "jobs": [], "adapters": [], "artifacts": [], "objects": 1, "events": 0,
                "checkpoints": 0, "parents": 0, "idempotency_keys": 0, "messages": 0, "deliveries": 0,
            },
        }
    )  # fmt: skip
    id: str
    object: Literal["erasure"] = "erasure"
    kind: Literal["user", "dataset"]
    subject: str
    created_at: float
    finished_at: float | None
    receipt: dict[str, Any]


class Erasures(Page):
    data: list[Erasure]


class AuditEntry(Model):
    """One request that changed something, or was refused for who made it."""

    model_config = _with(
        {
            "id": "audit-019a1c5e1c407b65a2d3e4f506172839", "object": "audit_entry", "created_at": 1793530000.25,
            "request": "request-019a1c5e1c3f7c76b3e4f50617283940", "user": _USER_ID, "key": _KEY_ID,
            "address": "192.0.2.7", "action": "DELETE /datasets/{dataset_id}", "target": _DATASET_ID, "status": 200,
        }
    )  # fmt: skip
    id: str
    object: Literal["audit_entry"] = "audit_entry"
    created_at: float
    request: str
    user: str | None
    key: str | None
    address: str
    action: str
    target: str | None
    status: int


class AuditEntries(Page):
    data: list[AuditEntry]
