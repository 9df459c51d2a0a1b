"""/adapters"""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from service import adapters, base_models, jobs, schemas
from service.api.download import StoredFile, send_archive, send_file
from service.api.errors import documented
from service.api.jobs import submitted
from service.api.request import (
    After,
    Caller,
    IdempotencyHeader,
    Inside,
    JsonBody,
    Limit,
    Parts,
    body_schema,
    idempotency,
    parse,
)
from service.errors import NotFound
from service.models import Adapter

router = APIRouter(prefix="/adapters", tags=["adapters"])
_MEDIA_TYPES = {".json": "application/json", ".md": "text/markdown; charset=utf-8"}


@router.post(
    "/merge",
    status_code=202,
    summary="Merge adapters",
    responses=documented(400, 404, 409, 413, 415, 422),
    openapi_extra=body_schema(jobs.MergeRequest, schemas.MERGE_EXAMPLE),
)
def merge_adapters(
    caller: Caller, parts: Inside, body: JsonBody, response: Response, key: IdempotencyHeader = None
) -> schemas.Job:
    """Queue a job that makes one adapter of several on the same base model; its result is an adapter like any other."""
    request = parse(jobs.MergeRequest, body)
    with parts.database.unit_of_work() as session:
        result = jobs.submit_merge(session, caller.user_id, request, idempotency(body, key))
        return submitted(session, result, response)


@router.get("", summary="List adapters", responses=documented(422))
def list_adapters(caller: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.Adapters:
    with parts.database.reading() as session:
        rows, more = adapters.page(session, caller.user_id, after, limit)
        return schemas.Adapters.of(_adapters(session, rows), more)


@router.get("/{adapter_id}", summary="Get an adapter", responses=documented(404))
def get_adapter(caller: Caller, parts: Inside, adapter_id: str) -> schemas.Adapter:
    with parts.database.reading() as session:
        return _adapters(session, [adapters.get(session, caller.user_id, adapter_id)])[0]


@router.delete("/{adapter_id}", summary="Delete an adapter", responses=documented(404, 409))
def delete_adapter(caller: Caller, parts: Inside, adapter_id: str) -> schemas.Deleted:
    """Refused while a merge that has not ended uses it. Adapters that were merged from it stay."""
    with parts.database.unit_of_work() as session:
        adapters.delete(session, caller.user_id, adapter_id)
    return schemas.Deleted(id=adapter_id, object="adapter")


@router.get("/{adapter_id}/files", summary="List an adapter's files", responses=documented(404))
def list_files(caller: Caller, parts: Inside, adapter_id: str) -> schemas.Files:
    with parts.database.reading() as session:
        return schemas.Files(data=adapters.get(session, caller.user_id, adapter_id).files)


@router.head("/{adapter_id}/files/{name:path}", include_in_schema=False)
@router.get(
    "/{adapter_id}/files/{name:path}",
    summary="Download one file of an adapter",
    response_class=Response,
    responses=documented(404, 416) | {200: {"content": {"application/octet-stream": {}}}},
)
def get_file(request: Request, caller: Caller, parts: Inside, adapter_id: str, name: str) -> Response:
    """Its ETag is its SHA-256. Ranges and conditional requests work as RFC 9110 has them."""
    _, files = _stored(parts, caller.user_id, adapter_id)
    for file in files:
        if file.name == name:
            suffix = name[name.rfind(".") :]
            return send_file(request, parts.storage, file, _MEDIA_TYPES.get(suffix, "application/octet-stream"))
    raise NotFound(f"{adapter_id} has no file {name[:80]!r}")


@router.head("/{adapter_id}/archive", include_in_schema=False)
@router.get(
    "/{adapter_id}/archive",
    summary="Download an adapter as one tar",
    response_class=Response,
    responses=documented(404) | {200: {"content": {"application/x-tar": {}}}},
)
def get_archive(request: Request, caller: Caller, parts: Inside, adapter_id: str) -> Response:
    """An uncompressed tar with one folder, made while it is sent; the same bytes every time."""
    adapter, files = _stored(parts, caller.user_id, adapter_id)
    return send_archive(request, parts.storage, adapter.id, files, adapter.digest)


def _stored(parts: Parts, owner_id: str, adapter_id: str) -> tuple[Adapter, list[StoredFile]]:
    with parts.database.reading() as session:
        row = adapters.get(session, owner_id, adapter_id)
    return row, [StoredFile(f["name"], f"{row.prefix}/{f['name']}", f["size"], f["sha256"]) for f in row.files]


def _adapters(session: Session, rows: Sequence[Adapter]) -> list[schemas.Adapter]:
    parents = adapters.parents(session, {row.job_id for row in rows})
    digests = base_models.digests(session, {row.base_model_id for row in rows})
    return [
        schemas.Adapter(
            id=row.id,
            name=row.name,
            kind=row.kind,  # type: ignore[arg-type]
            job=row.job_id,
            base_model=row.base_model_id,
            base_digest=digests[row.base_model_id],
            rank=row.rank,
            files=row.files,
            digest=row.digest,
            parents=[schemas.Parent(adapter=p.parent_id, weight=p.weight) for p in parents.get(row.job_id, [])],
            metrics=row.metrics,
            created_at=row.created_at,
        )
        for row in rows
    ]
