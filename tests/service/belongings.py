"""What one user has, one of each kind, and how every operation is called with it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from service.models import (
    Adapter,
    AdapterAlias,
    ApiKey,
    Artifact,
    AuditEntry,
    Dataset,
    Erasure,
    Job,
    JobEvent,
    Webhook,
    WebhookDelivery,
    new_id,
)
from service.storage import put_folder
from tests.service import rows
from tests.service.adapter_files import make_adapter
from tests.service.site import LINE, Site

Ids = dict[str, str]


def belongings(site: Site, owner_id: str, folder: Any) -> Ids:
    """Rows and files of one user; returns an id of each kind, by the name that path parameters have for it."""
    ids = {
        name: new_id(name.removesuffix("_id"))
        for name in ("dataset_id", "job_id", "adapter_id", "artifact_id", "key_id", "webhook_id", "delivery_id",
                     "erasure_id")
    }  # fmt: skip
    ids |= {"user_id": owner_id, "alias": new_id("alias-of"), "name": "adapter_config.json"}
    ids |= {"second_adapter_id": new_id("adapter"), "audit_id": new_id("audit")}
    own: dict[str, Any] = {"owner_id": owner_id}
    result = {**own, "base_model_id": rows.BASE_MODEL, "name": "r", "epoch": 1, "digest": "d" * 64, "metrics": {}}
    job = {**own, "kind": "train", "name": "j", "spec": {}, "base_model_id": rows.BASE_MODEL}
    ended = {**job, "state": "succeeded", "finished_at": 1.0}
    jobs = {name: new_id("job") for name in ("trained", "trained_too", "exported", "told")}
    stored = _store(site, ids, folder)
    with site.database.unit_of_work() as session:
        session.add(Dataset(id=ids["dataset_id"], name="d", status="ready", rows=1, **own, **stored["dataset"]))
        session.add(Job(id=ids["job_id"], event_seq=1, **job))
        session.add_all(Job(id=id_, **ended) for id_ in jobs.values())
        session.flush()
        session.add(JobEvent(job_id=ids["job_id"], seq=1, epoch=0, type="message", level="info", message="m", data={}))
        for name, job_id in (("adapter_id", jobs["trained"]), ("second_adapter_id", jobs["trained_too"])):
            files = stored[name]
            session.add(Adapter(id=ids[name], job_id=job_id, kind="train", rank=2, **result, **files))
        session.add(
            Artifact(id=ids["artifact_id"], job_id=jobs["exported"], kind="export", **result, **stored["artifact_id"])
        )
        session.add(ApiKey(id=ids["key_id"], user_id=owner_id, sha256=new_id("hash"), hint="luthier_0000"))
        session.add(
            Webhook(id=ids["webhook_id"], name="w", url="https://example.com", event_types=[], secret="s", **own)
        )
        session.add(
            Erasure(id=ids["erasure_id"], kind="dataset", subject_id="dataset-0", receipt={}, finished_at=1, **own)
        )
        told = {"request_id": "r", "address": "a", "action": "POST /x", "status": 200}
        session.add(AuditEntry(id=ids["audit_id"], user_id=owner_id, **told))
        session.flush()
        session.add(AdapterAlias(alias=ids["alias"], adapter_id=ids["adapter_id"], **own))
        delivery = {"webhook_id": ids["webhook_id"], "job_id": jobs["told"], "event_type": "job.failed", "body": "{}"}
        session.add(WebhookDelivery(id=ids["delivery_id"], state="dead", **delivery, **own))
    return ids


def _store(site: Site, ids: Ids, folder: Any) -> dict[str, dict[str, Any]]:
    """Files of everything that has some: the same bytes for every owner."""
    source = folder / new_id("files")
    source.mkdir()
    (source / "data.jsonl").write_bytes(LINE)
    file = put_folder(site.storage, f"datasets/{ids['dataset_id']}", source)[0]
    stored: dict[str, dict[str, Any]] = {"dataset": {"bytes": file["size"], "sha256": file["sha256"]}}
    for seed, name in enumerate(("adapter_id", "second_adapter_id", "artifact_id")):
        source, prefix = folder / name, f"adapters/{new_id('job')}/e1"
        if not source.exists():
            source.mkdir()
            for path, content in make_adapter(seed).items():
                (source / path).write_bytes(content)
        stored[name] = {"prefix": prefix, "files": put_folder(site.storage, prefix, source)}
    return stored


@dataclass(frozen=True)
class Call:
    """How an operation is called. `body` makes its JSON of one's belongings; `refers` has the fields that hold ids."""

    body: Callable[[Ids], dict[str, Any]] | None = None
    refers: dict[str, str] = field(default_factory=dict)
    operators: bool = False
    content: bytes | None = None


def _adapters(ids: Ids) -> list[dict[str, Any]]:
    return [{"adapter": ids["adapter_id"]}, {"adapter": ids["second_adapter_id"], "weight": 0.5}]


_PLAIN = Call()
_OPERATORS = Call(operators=True)
_ADAPTERS = {"adapters.adapter": "adapter_id"}
# Every operation of the documentation that asks for a key.
CALLS: dict[str, Call] = {
    "GET /datasets": _PLAIN,
    "POST /datasets": Call(content=LINE),
    "GET /datasets/{dataset_id}": _PLAIN,
    "GET /datasets/{dataset_id}/content": _PLAIN,
    "POST /datasets/{dataset_id}/erase": _PLAIN,
    "DELETE /datasets/{dataset_id}": _PLAIN,
    "GET /jobs": _PLAIN,
    "POST /jobs": Call(
        lambda ids: {"base_model": rows.BASE_MODEL, "dataset": ids["dataset_id"],
                     "validation_dataset": ids["dataset_id"], "lora": {"target_modules": ["q_proj"]}},
        {"dataset": "dataset_id", "validation_dataset": "dataset_id"},
    ),
    "GET /jobs/{job_id}": _PLAIN,
    "GET /jobs/{job_id}/events": _PLAIN,
    "GET /jobs/{job_id}/metrics": _PLAIN,
    "GET /jobs/{job_id}/curves.svg": _PLAIN,
    "POST /jobs/{job_id}/pause": _PLAIN,
    "POST /jobs/{job_id}/resume": _PLAIN,
    "POST /jobs/{job_id}/cancel": _PLAIN,
    "GET /adapters": _PLAIN,
    "POST /adapters": Call(content=b""),
    "POST /adapters/merge": Call(lambda ids: {"adapters": _adapters(ids)}, _ADAPTERS),
    "POST /adapters/analyze": Call(lambda ids: {"adapters": _adapters(ids)}, _ADAPTERS),
    "POST /adapters/search-weights": Call(
        lambda ids: {"adapters": [ids["adapter_id"], ids["second_adapter_id"]], "dataset": ids["dataset_id"]},
        {"adapters": "adapter_id", "dataset": "dataset_id"},
    ),
    "POST /adapters/extract": Call(lambda _: {"base_model": rows.BASE_MODEL, "tuned_model": "tuned", "rank": 2}),
    "GET /adapters/{adapter_id}": _PLAIN,
    "GET /adapters/{adapter_id}/files": _PLAIN,
    "GET /adapters/{adapter_id}/files/{name}": _PLAIN,
    "GET /adapters/{adapter_id}/archive": _PLAIN,
    "GET /adapters/{adapter_id}/certificate": _PLAIN,
    "POST /adapters/{adapter_id}/export": Call(
        lambda ids: {"format": "peft", "others": [{"adapter": ids["second_adapter_id"]}]},
        {"others.adapter": "second_adapter_id"},
    ),
    "POST /adapters/{adapter_id}/verify": _PLAIN,
    "DELETE /adapters/{adapter_id}": _PLAIN,
    "GET /adapters/aliases": _PLAIN,
    "PUT /adapters/aliases/{alias}": Call(lambda ids: {"adapter": ids["adapter_id"]}, {"adapter": "adapter_id"}),
    "DELETE /adapters/aliases/{alias}": _PLAIN,
    "GET /artifacts": _PLAIN,
    "GET /artifacts/{artifact_id}": _PLAIN,
    "GET /artifacts/{artifact_id}/files": _PLAIN,
    "GET /artifacts/{artifact_id}/files/{name}": _PLAIN,
    "GET /artifacts/{artifact_id}/archive": _PLAIN,
    "DELETE /artifacts/{artifact_id}": _PLAIN,
    "GET /base-models": _PLAIN,
    "GET /base-models/{base_model_id}": _PLAIN,
    "GET /webhooks": _PLAIN,
    "POST /webhooks": Call(lambda _: {"url": "https://93.184.215.14/hook", "event_types": ["job.failed"], "name": "w"}),
    "GET /webhooks/{webhook_id}": _PLAIN,
    "PATCH /webhooks/{webhook_id}": Call(lambda _: {"name": "renamed"}),
    "GET /webhooks/{webhook_id}/deliveries": _PLAIN,
    "GET /webhooks/{webhook_id}/deliveries/{delivery_id}": _PLAIN,
    "POST /webhooks/{webhook_id}/deliveries/{delivery_id}/resend": _PLAIN,
    "DELETE /webhooks/{webhook_id}": _PLAIN,
    "GET /keys": _PLAIN,
    "POST /keys": Call(lambda _: {"scope": "read"}),
    "POST /keys/{key_id}/rotate": Call(lambda _: {}),
    "DELETE /keys/{key_id}": _PLAIN,
    "GET /erasures": _PLAIN,
    "GET /erasures/{erasure_id}": _PLAIN,
    "GET /audit": _PLAIN,
    "GET /users": _OPERATORS,
    "POST /users": Call(lambda _: {"name": "carol"}, operators=True),
    "GET /users/{user_id}": _OPERATORS,
    "PUT /users/{user_id}/limits": Call(lambda _: {"running_jobs": 1}, operators=True),
    "DELETE /users/{user_id}": _OPERATORS,
}  # fmt: skip
