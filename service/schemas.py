"""The wire contract of the native API: what goes out. What comes in are the inside's own dataclasses.

Every key is always present, null where there is nothing to say; times are unix seconds.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel as Model
from pydantic import ConfigDict

from service import schema_examples as shown

AdapterKind = Literal["train", "merge", "search", "ingest", "extract"]
ArtifactKind = Literal["export", "analyze", "verify"]
JobKind = Literal[AdapterKind, ArtifactKind]


def _with(example: dict[str, Any]) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [example]})


class Error(Model):
    """Why a request was refused: `code` is stable, `category` says whose fault it is, `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str
    category: Literal["user", "platform", "capacity"]


class ErrorBody(Model):
    """The one shape of every error on every route."""

    model_config = _with(
        {
            "error": {
                "message": "there is no dataset 'dataset-1'",
                "type": "invalid_request_error",
                "param": None,
                "code": "not_found",
                "category": "user",
            }
        }
    )
    error: Error


class File(Model):
    """A file with its length in bytes and its SHA-256, in hexadecimal."""

    name: str
    size: int
    sha256: str


class Dataset(Model):
    """An uploaded JSONL file; jobs can use it once its status is ready."""

    model_config = _with(shown.DATASET)
    id: str
    object: Literal["dataset"] = "dataset"
    name: str
    status: Literal["validating", "ready"]
    bytes: int
    rows: int | None
    sha256: str
    created_at: float


class JobError(Model):
    """Why a job failed."""

    code: str
    category: str
    message: str


class Job(Model):
    """A piece of work. `spec` is what was asked for, with the defaults filled in.

    `adapter` or `artifact` is the result; a training that diverged keeps its last good adapter. `metrics` are the
    result's. `step` of `total_steps` tells how far it is: steps of a training, modules or bytes of other work.
    """

    model_config = _with(shown.JOB)
    id: str
    object: Literal["job"] = "job"
    kind: JobKind
    name: str
    status: Literal["queued", "running", "pausing", "paused", "succeeded", "failed", "cancelled"]
    phase: str | None
    base_model: str
    dataset: str | None
    validation_dataset: str | None
    spec: dict[str, Any]
    attempt: int
    step: int
    total_steps: int | None
    eta_seconds: float | None
    adapter: str | None
    artifact: str | None
    metrics: dict[str, Any] | None
    error: JobError | None
    created_at: float
    started_at: float | None
    finished_at: float | None


class Event(Model):
    """One entry of a job's log; `seq` counts from 1 without gaps."""

    model_config = _with(shown.EVENT)
    seq: int
    object: Literal["job.event"] = "job.event"
    job: str
    type: Literal["message", "metrics"]
    level: Literal["info", "warn", "error"]
    message: str
    data: dict[str, Any]
    created_at: float


class Metrics(Model):
    """A job's measurements, one point per step; that of step 0 is the plain base model's validation loss."""

    model_config = _with({"object": "list", "data": [shown.EVENT["data"]]})
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Parent(Model):
    """An adapter that this one was made of, and its weight."""

    adapter: str
    weight: float


class Adapter(Model):
    """A job's result: standard PEFT files, each with its SHA-256. `digest` names the whole set of files."""

    model_config = _with(shown.ADAPTER)
    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    kind: AdapterKind
    job: str
    base_model: str
    base_digest: str
    rank: int
    files: list[File]
    digest: str
    parents: list[Parent]
    metrics: dict[str, Any]
    created_at: float


class Alias(Model):
    """A name that stands for an adapter wherever its id is asked for."""

    model_config = _with({"alias": "support-live", "object": "adapter.alias", "adapter": shown.ADAPTER["id"]})
    alias: str
    object: Literal["adapter.alias"] = "adapter.alias"
    adapter: str


class Aliases(Model):
    """All aliases of the owner, by name."""

    object: Literal["list"] = "list"
    data: list[Alias]


class Artifact(Model):
    """A job's result that is no adapter: the files of an export, of an analysis or of a verification."""

    model_config = _with(shown.ARTIFACT)
    id: str
    object: Literal["artifact"] = "artifact"
    name: str
    kind: ArtifactKind
    job: str
    base_model: str
    files: list[File]
    digest: str
    parents: list[Parent]
    metrics: dict[str, Any]
    created_at: float


class BaseModel(Model):
    """An entry of the operator's catalogue. `target_modules` are the names a LoRA can be put on."""

    model_config = _with(shown.BASE_MODEL)
    id: str
    object: Literal["base_model"] = "base_model"
    source: str
    revision: str | None
    digest: str
    files: list[File]
    architecture: str
    parameters: int
    context_length: int | None
    target_modules: list[str]
    created_at: float


class Page(Model):
    """A page, newest first. The next one: `after` = this one's `last_id`, for as long as `has_more`."""

    object: Literal["list"] = "list"
    data: list[Any]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, data: Sequence[Any], has_more: bool) -> Self:
        first, last = (data[0].id, data[-1].id) if data else (None, None)
        return cls(data=list(data), has_more=has_more, first_id=first, last_id=last)


class Datasets(Page):
    data: list[Dataset]


class Jobs(Page):
    data: list[Job]


class Adapters(Page):
    data: list[Adapter]


class Artifacts(Page):
    data: list[Artifact]


class BaseModels(Page):
    data: list[BaseModel]


class Events(Model):
    """A page of a job's log, oldest first. The next one: `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[Event]
    has_more: bool
    first_id: int | None
    last_id: int | None


class Files(Model):
    """All files of a result."""

    object: Literal["list"] = "list"
    data: list[File]


class Webhook(Model):
    """A URL that is told when jobs end."""

    model_config = _with(shown.WEBHOOK)
    id: str
    object: Literal["webhook"] = "webhook"
    name: str
    url: str
    event_types: list[str]
    enabled: bool
    created_at: float


class WebhookWithSecret(Webhook):
    """A new webhook, with the secret that verifies its messages: shown this once."""

    model_config = _with(shown.WEBHOOK | {"secret": "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oDZ5gGd3mFQjI="})
    secret: str


class Webhooks(Page):
    data: list[Webhook]


class Delivery(Model):
    """A message for a webhook: `body` as it is sent, and what came of the last attempt."""

    model_config = _with(shown.DELIVERY)
    id: str
    object: Literal["webhook.delivery"] = "webhook.delivery"
    webhook: str
    job: str
    event_type: str
    body: str
    state: Literal["pending", "delivered", "dead"]
    attempts: int
    next_attempt_at: float | None
    last_status: int | None
    last_error: str | None
    created_at: float
    delivered_at: float | None


class Deliveries(Page):
    data: list[Delivery]


class Deleted(Model):
    """Something that is gone."""

    model_config = _with({"id": shown.DATASET["id"], "object": "dataset", "deleted": True})
    id: str
    object: Literal["dataset", "adapter", "adapter.alias", "artifact", "webhook", "api_key"]
    deleted: Literal[True] = True


class Alive(Model):
    """The process answers."""

    model_config = _with({"status": "ok"})
    status: Literal["ok"] = "ok"


class Readiness(Model):
    """What this process depends on. Degraded: jobs are accepted, and start a little later."""

    model_config = _with(
        {"status": "degraded", "parts": {"database": "ok", "storage": "ok", "broker": "does not answer"}}
    )
    status: Literal["ready", "degraded", "unavailable"]
    parts: dict[str, str]
