"""POST /adapters/merge"""

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from service import merges, schema_examples, schemas
from service.api.adapters import adapter_objects
from service.api.errors import documented
from service.api.jobs import job_objects
from service.api.request import Caller, IdempotencyHeader, Inside, JsonBody, body_schema, idempotency, parse

router = APIRouter(prefix="/adapters", tags=["adapters"])
_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"model": schemas.Adapter, "description": "This merge was made before: its adapter"},
    201: {"model": schemas.Adapter, "description": "Made at once: a stack of a few megabytes"},
    202: {"model": schemas.Job, "description": "Queued, or on its way since an earlier request: its job"},
}


@router.post(
    "/merge",
    status_code=202,
    summary="Merge adapters",
    responses=_ANSWERS | documented(400, 404, 409, 413, 415, 422, 507),
    openapi_extra=body_schema(merges.MergeRequest, schema_examples.MERGE),
)
def merge_adapters(caller: Caller, parts: Inside, body: JsonBody, key: IdempotencyHeader = None) -> Response:
    """Make one adapter of several on the same base model; it is an adapter like any other, with a certificate that
    says how far it is from the exact weighted sum. What cannot be merged is refused before a tensor is read."""
    request = parse(merges.MergeRequest, body)
    known = idempotency(body, key)
    answer = merges.merge(parts.database, parts.storage, parts.settings, caller.user_id, request, known)
    headers = {} if answer.new else {"Idempotent-Replayed": "true"}
    with parts.database.reading() as session:
        if answer.adapter is None:
            return JSONResponse(job_objects(session, [answer.job])[0].model_dump(), 202, headers)
        told = adapter_objects(session, [answer.adapter])[0].model_dump()
    return JSONResponse(told, 201 if answer.new else 200, headers)
