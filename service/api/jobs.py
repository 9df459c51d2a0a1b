"""/jobs"""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import anyio
from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy.orm import Session

from lora_engine import curves
from service import adapters, artifacts, events, jobs, schema_examples, schemas
from service.api.errors import documented
from service.api.event_stream import event, open_stream, resume_after
from service.api.record import append_within
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
from service.models import TERMINAL, Adapter, Artifact, Job

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.post(
    "",
    status_code=201,
    response_model=schemas.Job,
    summary="Train an adapter",
    responses=documented(400, 404, 409, 413, 415, 422),
    openapi_extra=body_schema(jobs.TrainingRequest, schema_examples.TRAINING),
)
def create_job(http: Request, caller: Caller, parts: Inside, body: JsonBody, key: IdempotencyHeader = None) -> Response:
    """Queue a training. Once this has answered 201 the job is not lost, whatever is restarted."""
    request = parse(jobs.TrainingRequest, body)
    with append_within(http) as record, parts.database.unit_of_work() as session:
        job, created = jobs.submit_training(session, caller.user_id, request, idempotency(body, key))
        told = job_objects(session, [job])[0]
        record(session, 201, job.id)
    return _json(told, 201, {} if created else {"Idempotent-Replayed": "true"})


@router.get("", summary="List jobs", responses=documented(422))
def list_jobs(
    caller: Caller,
    parts: Inside,
    after: After = None,
    limit: Limit = 20,
    kind: schemas.JobKind | None = None,
    status: jobs.Status | None = None,
) -> schemas.Jobs:
    with parts.database.reading() as session:
        rows, more = jobs.page(session, caller.user_id, after, limit, kind=kind, status=status)
        return schemas.Jobs.of(job_objects(session, rows), more)


@router.get("/{job_id}", response_model=schemas.Job, summary="Get a job", responses=documented(404))
def get_job(caller: Caller, parts: Inside, job_id: str) -> Response:
    with parts.database.reading() as session:
        return _json(_job(*jobs.with_result(session, caller.user_id, job_id)))


@router.post("/{job_id}/cancel", status_code=202, summary="Cancel a job", responses=documented(404, 409))
def cancel_job(caller: Caller, parts: Inside, job_id: str) -> schemas.Job:
    """A queued or paused job ends at once, a running one between two steps; none can succeed any more."""
    with parts.database.unit_of_work() as session:
        return job_objects(session, [jobs.cancel(session, caller.user_id, job_id)])[0]


@router.post("/{job_id}/pause", status_code=202, summary="Pause a job", responses=documented(404, 409))
def pause_job(caller: Caller, parts: Inside, job_id: str) -> schemas.Job:
    """A queued job rests at once; a training makes a checkpoint first and goes on from there once it is resumed.

    Other work begins again when it is resumed. A job that is about to end may end all the same.
    """
    with parts.database.unit_of_work() as session:
        return job_objects(session, [jobs.pause(session, caller.user_id, job_id)])[0]


@router.post("/{job_id}/resume", status_code=202, summary="Resume a job", responses=documented(404, 409))
def resume_job(caller: Caller, parts: Inside, job_id: str) -> schemas.Job:
    """A paused job goes back into the queue; nothing changes for one that is not paused."""
    with parts.database.unit_of_work() as session:
        return job_objects(session, [jobs.resume(session, caller.user_id, job_id)])[0]


@router.get(
    "/{job_id}/events",
    summary="A job's events",
    response_model=schemas.Events,
    responses=documented(400, 404, 429)
    | {200: {"content": {"text/event-stream": {}}}, 204: {"description": "The job has ended and all was seen"}},
)
async def get_events(
    request: Request,
    caller: Caller,
    parts: Inside,
    job_id: str,
    after: Annotated[int, Query(ge=0, le=2**53, description="the number of the last event seen")] = 0,
    limit: Limit = 100,
    last_event_id: Annotated[str | None, Header(description="takes the place of `after` in an event stream")] = None,
) -> schemas.Events | Response:
    """A page as JSON; or with `Accept: text/event-stream` all events, those to come too, until the job has ended."""
    if "text/event-stream" in request.headers.get("accept", ""):
        return await open_stream(parts, caller.user_id, job_id, resume_after(last_event_id, after))
    return await anyio.to_thread.run_sync(_events, parts, caller.user_id, job_id, after, limit)


@router.get(
    "/{job_id}/metrics",
    summary="A job's metrics",
    response_model=schemas.Metrics,
    responses=documented(404, 422) | {200: {"content": {"text/csv": {}}}},
)
def get_metrics(
    caller: Caller,
    parts: Inside,
    job_id: str,
    format: Annotated[Literal["json", "csv"], Query(description="of the answer")] = "json",  # noqa: A002 - the wire's word
) -> schemas.Metrics | Response:
    """Losses, gradient norm, learning rate, throughput and memory by step; step 0 is the plain base model.

    Steps that were repeated after a loss of the worker count once. Of very long jobs not every step is told.
    """
    with parts.database.reading() as session:
        jobs.get(session, caller.user_id, job_id)
        points = events.metrics(session, job_id)
    if format == "json":
        return schemas.Metrics(data=points)
    headers = {"Content-Disposition": f'attachment; filename="{job_id}.csv"'}
    return Response(_csv(points), headers=headers, media_type="text/csv; charset=utf-8")


@router.get(
    "/{job_id}/curves.svg",
    summary="A job's curves",
    response_class=Response,
    responses=documented(404) | {200: {"content": {"image/svg+xml": {}}}},
)
def get_curves(caller: Caller, parts: Inside, job_id: str) -> Response:
    """One figure, also while the job runs: training and validation loss, best step, overfitting, learning rate."""
    with parts.database.reading() as session:
        jobs.get(session, caller.user_id, job_id)
        figure = curves.render(events.history(session, job_id))
    return Response(figure, headers={"Cache-Control": "no-cache"}, media_type="image/svg+xml")


def submitted(session: Session, result: tuple[Job, bool], response: Response) -> schemas.Job:
    """The answer to a submission; a header marks the one that was given before."""
    job, created = result
    if not created:
        response.headers["Idempotent-Replayed"] = "true"
    session.refresh(job)
    return job_objects(session, [job])[0]


def job_objects(session: Session, rows: Sequence[Job]) -> list[schemas.Job]:
    """The rows as the wire has them."""
    # Only what has ended can have left something, and its kind says which of the two.
    ended = [row for row in rows if row.state in TERMINAL]
    of_artifacts = {row.id for row in ended if row.kind in get_args(schemas.ArtifactKind)}
    of_adapters = {row.id for row in ended} - of_artifacts
    made = adapters.of_jobs(session, of_adapters) if of_adapters else {}
    left = artifacts.of_jobs(session, of_artifacts) if of_artifacts else {}
    return [_job(row, made.get(row.id), left.get(row.id)) for row in rows]


def _job(row: Job, adapter: Adapter | None, artifact: Artifact | None) -> schemas.Job:
    result = adapter or artifact
    error = None
    if row.error_code is not None:
        error = schemas.JobError(
            code=row.error_code, category=row.error_category or "platform", message=row.error_message or ""
        )
    return schemas.Job(
        id=row.id,
        kind=row.kind,  # type: ignore[arg-type]
        name=row.name,
        status=jobs.status(row),
        phase=row.phase,
        base_model=row.base_model_id,
        dataset=row.dataset_id,
        validation_dataset=row.validation_dataset_id,
        spec=row.spec,
        attempt=row.attempt,
        step=row.step,
        total_steps=row.total_steps,
        eta_seconds=row.eta_seconds,
        adapter=adapter.id if adapter is not None and adapter.deleted_at is None else None,
        artifact=artifact.id if artifact is not None and artifact.deleted_at is None else None,
        metrics=result.metrics if result is not None else None,
        error=error,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
    )


def _json(told: schemas.Job, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Of routes that are asked often: made once, in the thread of the route, and not checked by another one."""
    return Response(told.model_dump_json(), status, headers, "application/json")


def _events(parts: Parts, owner_id: str, job_id: str, after: int, limit: int) -> schemas.Events:
    with parts.database.reading() as session:
        jobs.get(session, owner_id, job_id)
        rows = events.after(session, job_id, after, limit + 1)
    data = [event(row) for row in rows[:limit]]
    first, last = (data[0].seq, data[-1].seq) if data else (None, None)
    return schemas.Events(data=data, has_more=len(rows) > limit, first_id=first, last_id=last)


def _csv(points: Sequence[dict[str, Any]]) -> str:
    columns = dict.fromkeys(["step", *(name for point in points for name in point)])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()
