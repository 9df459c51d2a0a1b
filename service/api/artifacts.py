"""/artifacts: results that are no adapters, and their files."""

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from service import adapters, artifacts, schemas
from service.api.download import send_all, send_named
from service.api.errors import documented
from service.api.request import After, Caller, Inside, Limit, Parts
from service.models import Artifact

router = APIRouter(prefix="/artifacts", tags=["artifacts"])


@router.get("", summary="List artifacts", responses=documented(422))
def list_artifacts(
    caller: Caller,
    parts: Inside,
    after: After = None,
    limit: Limit = 20,
    kind: Annotated[schemas.ArtifactKind | None, Query(description="only those of one kind")] = None,
) -> schemas.Artifacts:
    with parts.database.reading() as session:
        rows, more = artifacts.page(session, caller.user_id, after, limit, kind=kind)
        return schemas.Artifacts.of(_artifacts(session, rows), more)


@router.get("/{artifact_id}", summary="Get an artifact", responses=documented(404))
def get_artifact(caller: Caller, parts: Inside, artifact_id: str) -> schemas.Artifact:
    with parts.database.reading() as session:
        return _artifacts(session, [artifacts.get(session, caller.user_id, artifact_id)])[0]


@router.delete("/{artifact_id}", summary="Delete an artifact", responses=documented(404))
def delete_artifact(caller: Caller, parts: Inside, artifact_id: str) -> schemas.Deleted:
    with parts.database.unit_of_work() as session:
        artifacts.delete(session, caller.user_id, artifact_id)
    return schemas.Deleted(id=artifact_id, object="artifact")


@router.get("/{artifact_id}/files", summary="List an artifact's files", responses=documented(404))
def list_files(caller: Caller, parts: Inside, artifact_id: str) -> schemas.Files:
    return schemas.Files(data=_get(parts, caller.user_id, artifact_id).files)


@router.head("/{artifact_id}/files/{name:path}", include_in_schema=False)
@router.get(
    "/{artifact_id}/files/{name:path}",
    summary="Download one file of an artifact",
    response_class=Response,
    responses=documented(404, 416) | {200: {"content": {"application/octet-stream": {}}}},
)
def get_file(request: Request, caller: Caller, parts: Inside, artifact_id: str, name: str) -> Response:
    """Its ETag is its SHA-256. Ranges and conditional requests work as RFC 9110 has them."""
    return send_named(request, parts.storage, _get(parts, caller.user_id, artifact_id), name)


@router.head("/{artifact_id}/archive", include_in_schema=False)
@router.get(
    "/{artifact_id}/archive",
    summary="Download an artifact as one tar",
    response_class=Response,
    responses=documented(404) | {200: {"content": {"application/x-tar": {}}}},
)
def get_archive(request: Request, caller: Caller, parts: Inside, artifact_id: str) -> Response:
    """An uncompressed tar with one folder, made while it is sent; the same bytes every time."""
    return send_all(request, parts.storage, _get(parts, caller.user_id, artifact_id))


def _get(parts: Parts, owner_id: str, artifact_id: str) -> Artifact:
    with parts.database.reading() as session:
        return artifacts.get(session, owner_id, artifact_id)


def _artifacts(session: Session, rows: Sequence[Artifact]) -> list[schemas.Artifact]:
    parents = adapters.parents(session, {row.job_id for row in rows})
    return [
        schemas.Artifact(
            id=row.id,
            name=row.name,
            kind=row.kind,  # type: ignore[arg-type]
            job=row.job_id,
            base_model=row.base_model_id,
            files=row.files,
            digest=row.digest,
            parents=[schemas.Parent(adapter=p.parent_id, weight=p.weight) for p in parents.get(row.job_id, [])],
            metrics=row.metrics,
            created_at=row.created_at,
        )
        for row in rows
    ]
