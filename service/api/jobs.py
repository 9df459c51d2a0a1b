"""/jobs"""

import csv
import io
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy.orm import Session

from service import adapters, events, jobs, schemas
from service.api.errors import documented
from service.api.event_stream import event, open_stream
from service.api.paging import page
from service.api.request import (
    After,
    Caller,
    IdempotencyHeader,
    Inside,
    JsonBody,
    Limit,
    body_schema,
    idempotency,
    parse,
)
from service.models import ACTIVE, TERMINAL, Job

router = APIRouter(prefix="/jobs", tags=["jobs"])
Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@router.post(
    "",
    status_code=201,
    summary="Train an adapter",
    responses=documented(400, 404, 409, 413, 415, 422),
    openapi_extra=body_schema(jobs.TrainingRequest, schemas.TRAINING_EXAMPLE),
)
def create_job(
    caller: Caller, parts: Inside, body: JsonBody, response: Response, key: IdempotencyHeader = None
) -> schemas.Job:
    """Queue a training. Once this has answered 201 the job is not lost, whatever is restarted."""
    request = parse(jobs.TrainingRequest, body)
    with parts.database.unit_of_work() as session:
        result = jobs.submit_training(session, caller.user_id, request, idempotency(body, key))
        return submitted(session, result, response)


@router.get("", summary="List jobs", responses=documented(422))
def list_jobs(
    caller: Caller,
    parts: Inside,
    after: After = None,
    limit: Limit = 20,
    kind: Literal["train", "merge"] | None = None,
    status: Status | None = None,
) -> schemas.Page[schemas.Job]:
    states = None if status is None else ACTIVE if status == "running" else (status,)
    with parts.database.reading() as session:
        rows, more = jobs.page(session, caller.user_id, after, limit, kind=kind, states=states)
        return page(schemas.Job, views(session, rows), more)


@router.get("/{job_id}", summary="Get a job", responses=documented(404))
def get_job(caller: Caller, parts: Inside, job_id: str) -> schemas.Job:
    with parts.database.reading() as session:
        return views(session, [jobs.get(session, caller.user_id, job_id)])[0]


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel a job", responses=documented(404, 409))
def cancel_job(caller: Caller, parts: Inside, job_id: str) -> schemas.Job:
    """A queued job ends at once, a running one between two steps; neither can succeed any more."""
    with parts.database.unit_of_work() as session:
        return views(session, [jobs.cancel(session, caller.user_id, job_id)])[0]


@router.get(
    "/{job_id}/events",
    summary="A job's events",
    response_model=schemas.Events,
    responses=documented(400, 404, 429) | {200: {"content": {"text/event-stream": {}}}, 204: {"description": "No more"}},
)
async def get_events(
    request: Request,
    caller: Caller,
    parts: Inside,
    job_id: str,
    after: Annotated[int, Query(ge=0, le=2**53, description="the number of the last event seen")] = 0,
    limit: Limit = 100,
    last_event_id: Annotated[str | None, Header(description="takes the place of `after` in an event stream")] = None,
) -> Response:
    """A page as JSON; or with `Accept: text/event-stream` all events, those to come too, until the job has ended."""
    return await open_stream(request, parts, caller.user_id, job_id, after, limit, last_event_id)
