"""The wire contract of the native API: what goes out. What comes in are the inside's own dataclasses.

Every key is always present, null where there is nothing to say; times are unix seconds.
"""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel as Model
from pydantic import ConfigDict

_DATASET = {
    "id": "dataset-019a1c3e5f7a7c2e8d41a6f0c35b9e12",
    "object": "dataset",
    "name": "support answers",
    "status": "ready",
    "bytes": 184320,
    "rows": 412,
    "sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "created_at": 1793520000.25,
}
_JOB = {
    "id": "job-019a1c3f02d47b31b0a7c9e41d5f6a83",
    "object": "job",
    "kind": "train",
    "name": "support",
    "status": "running",
    "phase": "training",
    "base_model": "smollm2-135m-instruct",
    "dataset": _DATASET["id"],
    "validation_dataset": None,
    "spec": {
        "lora": {"rank": 16, "alpha": None, "dropout": 0.0, "target_modules": "all-linear", "use_rslora": False},
        "training": {"quantization": "nf4", "epochs": 3, "global_batch": 8, "learning_rate": 0.0002},
    },
    "attempt": 1,
    "step": 42,
    "total_steps": 156,
    "eta_seconds": 310.5,
    "adapter": None,
    "metrics": None,
    "error": None,
    "created_at": 1793520010.5,
    "started_at": 1793520012.0,
    "finished_at": None,
}
_ADAPTER = {
    "id": "adapter-019a1c4a77e57d0f9b12c4d8e6a5f301",
    "object": "adapter",
    "name": "support",
    "kind": "train",
    "job": _JOB["id"],
    "base_model": "smollm2-135m-instruct",
    "base_digest": "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae",
    "rank": 16,
    "files": [
        {
            "name": "adapter_model.safetensors",
            "size": 9807,
            "sha256": "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9",
        }
    ],
    "digest": "baa5a0964d3320fbc0c6a922140453c8513ea24ab8fd0577034804a967248096",
    "parents": [],
    "metrics": {
        "steps": 156,
        "train_loss": 0.61,
        "validation_loss_before": 2.31,
        "validation_loss_after": 0.77,
        "best_step": 120,
        "best_validation_loss": 0.74,
        "overfitting_epoch": 2.31,
        "stopped_early": False,
    },
    "created_at": 1793520400.0,
}
_BASE_MODEL = {
    "id": "smollm2-135m-instruct",
    "object": "base_model",
    "source": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac",
    "digest": _ADAPTER["base_digest"],
    "files": _ADAPTER["files"],
    "architecture": "LlamaForCausalLM",
    "parameters": 134515008,
    "context_length": 8192,
    "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
    "created_at": 1793510000.0,
}
_EVENT = {
    "seq": 7,
    "object": "job.event",
    "job": _JOB["id"],
    "type": "metrics",
    "level": "info",
    "message": "Step 42: loss 0.7312",
    "data": {
        "step": 42,
        "epoch": 0.81,
        "loss": 0.7312,
        "grad_norm": 0.42,
        "learning_rate": 0.00018,
        "tokens_per_second": 812.5,
        "limit_fraction": 0.61,
        "recompute_share": 0.0,
        "peak_bytes": 1073741824,
    },
    "created_at": 1793520100.0,
}

TRAINING_EXAMPLE: dict[str, Any] = {
    "base_model": "smollm2-135m-instruct",
    "dataset": _DATASET["id"],
    "name": "support",
    "lora": {"rank": 16, "target_modules": ["q_proj", "v_proj"]},
    "training": {"quantization": "nf4", "epochs": 3, "learning_rate": 0.0002},
}
MERGE_EXAMPLE: dict[str, Any] = {
    "adapters": [
        {"adapter": _ADAPTER["id"], "weight": 0.7},
        {"adapter": "adapter-019a1c4b11c27ae49d3a5b8f7c6e2d40", "weight": 0.3},
    ],
    "name": "support and style",
}
DATASET_EXAMPLE = (
    '{"messages": [{"role": "user", "content": "Where is my order?"}, '
    '{"role": "assistant", "content": "Let me look that up for you."}]}\n'
)


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

    model_config = _with(_DATASET)
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
    """A training or a merge. `spec` is what was asked for, with the defaults filled in.

    `adapter` is the result; a training that diverged keeps its last good one. `metrics` are that adapter's.
    """

    model_config = _with(_JOB)
    id: str
    object: Literal["job"] = "job"
    kind: Literal["train", "merge"]
    name: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
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
    metrics: dict[str, Any] | None
    error: JobError | None
    created_at: float
    started_at: float | None
    finished_at: float | None


class Event(Model):
    """One entry of a job's log; `seq` counts from 1 without gaps."""

    model_config = _with(_EVENT)
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

    model_config = _with({"object": "list", "data": [_EVENT["data"]]})
    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Parent(Model):
    """An adapter that a merge was made of, and its weight."""

    adapter: str
    weight: float


class Adapter(Model):
    """A job's result: standard PEFT files, each with its SHA-256. `digest` names the whole set of files."""

    model_config = _with(_ADAPTER)
    id: str
    object: Literal["adapter"] = "adapter"
    name: str
    kind: Literal["train", "merge"]
    job: str
    base_model: str
    base_digest: str
    rank: int
    files: list[File]
    digest: str
    parents: list[Parent]
    metrics: dict[str, Any]
    created_at: float


class BaseModel(Model):
    """An entry of the operator's catalogue. `target_modules` are the names a LoRA can be put on."""

    model_config = _with(_BASE_MODEL)
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
    """All files of an adapter."""

    object: Literal["list"] = "list"
    data: list[File]


class Deleted(Model):
    """Something that is gone."""

    model_config = _with({"id": _DATASET["id"], "object": "dataset", "deleted": True})
    id: str
    object: Literal["dataset", "adapter"]
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
