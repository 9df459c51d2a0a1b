"""/adapters: results, their files and their certificates."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response
from sqlalchemy.orm import Session

from service import adapters, base_models, schemas
from service.api.download import send_all, send_named
from service.api.errors import documented
from service.api.request import After, Caller, Inside, Limit, Parts
from service.models import Adapter

router = APIRouter(prefix="/adapters", tags=["adapters"])


@router.get("", summary="List adapters", responses=documented(422))
def list_adapters(caller: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.Adapters:
    with parts.database.reading() as session:
        rows, more = adapters.page(session, caller.user_id, after, limit)
        return schemas.Adapters.of(adapter_objects(session, rows), more)


@router.get("/{adapter_id}", summary="Get an adapter", responses=documented(404))
def get_adapter(caller: Caller, parts: Inside, adapter_id: str) -> schemas.Adapter:
    with parts.database.reading() as session:
        return adapter_objects(session, [adapters.get(session, caller.user_id, adapter_id)])[0]


@router.delete("/{adapter_id}", summary="Delete an adapter", responses=documented(404, 409))
def delete_adapter(caller: Caller, parts: Inside, adapter_id: str) -> schemas.Deleted:
    """Refused while a job that has not ended uses it. What was made from it stays; its aliases go."""
    with parts.database.unit_of_work() as session:
        deleted = adapters.delete(session, caller.user_id, adapter_id)
    return schemas.Deleted(id=deleted, object="adapter")


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
    return send_named(request, parts.storage, _get(parts, caller.user_id, adapter_id), name)


@router.head("/{adapter_id}/archive", include_in_schema=False)
@router.get(
    "/{adapter_id}/archive",
    summary="Download an adapter as one tar",
    response_class=Response,
    responses=documented(404) | {200: {"content": {"application/x-tar": {}}}},
)
def get_archive(request: Request, caller: Caller, parts: Inside, adapter_id: str) -> Response:
    """An uncompressed tar with one folder, made while it is sent; the same bytes every time."""
    return send_all(request, parts.storage, _get(parts, caller.user_id, adapter_id))


@router.get(
    "/{adapter_id}/certificate",
    summary="An adapter's certificate",
    response_class=Response,
    responses=documented(404) | {200: {"content": {"application/json": {}}}},
)
def get_certificate(request: Request, caller: Caller, parts: Inside, adapter_id: str) -> Response:
    """How far a merge is from the exact weighted sum, or what was changed when an adapter was taken in: by module and
    in all, with the rounding of the type and the ranks before and after. 404 for what was only trained."""
    row = _get(parts, caller.user_id, adapter_id)
    name = "ingest.json" if row.kind == "ingest" else "certificate.json"
    return send_named(request, parts.storage, row, name)


def _get(parts: Parts, owner_id: str, adapter_id: str) -> Adapter:
    with parts.database.reading() as session:
        return adapters.get(session, owner_id, adapter_id)


def adapter_objects(session: Session, rows: Sequence[Adapter]) -> list[schemas.Adapter]:
    """The rows as the wire has them."""
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
