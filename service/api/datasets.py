"""/datasets"""

from typing import Annotated

import anyio
from fastapi import APIRouter, Query, Request, Response

from service import datasets, schema_examples, schemas
from service.api.download import StoredFile, send_file
from service.api.errors import documented
from service.api.form import MAX_OWN_BYTES, Form, receive
from service.api.request import After, Caller, Inside, Limit, Parts, media_type
from service.errors import Conflict, Invalid, UnsupportedMedia
from service.models import Dataset

router = APIRouter(prefix="/datasets", tags=["datasets"])
_RAW_TYPES = ("application/jsonl", "application/x-ndjson", "application/x-jsonlines", "application/octet-stream",
              "application/json", "text/plain")  # fmt: skip
_FILE = {"type": "string", "format": "binary", "description": "one JSON object per line"}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": _FILE, "name": {"type": "string", "maxLength": 100}},
                },
                "example": {"file": schema_examples.DATASET_LINE, "name": "support answers"},
            },
            "application/jsonl": {"schema": {"type": "string"}, "example": schema_examples.DATASET_LINE},
        },
    }
}


@router.post(
    "",
    status_code=201,
    summary="Upload a dataset",
    responses=documented(400, 408, 413, 415, 422, 507),
    openapi_extra=_BODY,
)
async def create_dataset(
    request: Request,
    caller: Caller,
    parts: Inside,
    name: Annotated[str | None, Query(description="of the dataset, when the body is the file itself")] = None,
) -> schemas.Dataset:
    """A form with the field `file`, or the file itself as the body. Each line is checked while it arrives: the first
    that is no example is answered with its number, and nothing is kept."""
    with datasets.Upload(parts.settings) as upload:
        name = await _receive(request, parts, upload, name)
        received = await anyio.to_thread.run_sync(upload.finish)
        row = await anyio.to_thread.run_sync(
            datasets.add, parts.database, parts.storage, caller.user_id, datasets.check_name(name), received
        )
    return _dataset(row)


async def _receive(request: Request, parts: Parts, upload: datasets.Upload, name: str | None) -> str:
    """Take the whole body; returns the dataset's name."""
    if media_type(request) != "multipart/form-data":
        if media_type(request) not in _RAW_TYPES:
            message = "send a form with the field `file`, or the file with 'Content-Type: application/jsonl'"
            raise UnsupportedMedia(message)
        name = datasets.check_name("dataset" if name is None else name)
        await receive(request, upload.write, parts.settings.max_upload_bytes)
        return name
    form = Form(request.headers["content-type"], ("name",), {"file": upload.write})
    await receive(request, form.write, parts.settings.max_upload_bytes + MAX_OWN_BYTES)
    form.finish()
    if "file" not in form.seen:
        raise Invalid("file: is missing; send the JSONL file as the form's field `file`", param="file")
    if (given := form.text("name")) is not None:
        return given
    return form.filename if datasets.NAME.fullmatch(form.filename) else name or "dataset"


@router.get("", summary="List datasets", responses=documented(422))
def list_datasets(caller: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.Datasets:
    with parts.database.reading() as session:
        rows, more = datasets.page(session, caller.user_id, after, limit)
        return schemas.Datasets.of([_dataset(row) for row in rows], more)


@router.get("/{dataset_id}", summary="Get a dataset", responses=documented(404))
def get_dataset(caller: Caller, parts: Inside, dataset_id: str) -> schemas.Dataset:
    with parts.database.reading() as session:
        return _dataset(datasets.get(session, caller.user_id, dataset_id))


@router.delete("/{dataset_id}", summary="Delete a dataset", responses=documented(404, 409))
def delete_dataset(caller: Caller, parts: Inside, dataset_id: str) -> schemas.Deleted:
    """Refused while a job that has not ended uses it. Adapters that were made from it stay."""
    with parts.database.unit_of_work() as session:
        datasets.delete(session, caller.user_id, dataset_id)
    return schemas.Deleted(id=dataset_id, object="dataset")


@router.head("/{dataset_id}/content", include_in_schema=False)
@router.get(
    "/{dataset_id}/content",
    summary="Download a dataset",
    response_class=Response,
    responses=documented(404, 409, 416) | {200: {"content": {"application/jsonl": {}}}},
)
def get_content(request: Request, caller: Caller, parts: Inside, dataset_id: str) -> Response:
    """The very bytes that were uploaded; with ranges and conditional requests."""
    with parts.database.reading() as session:
        row = datasets.get(session, caller.user_id, dataset_id)
    if row.status != "ready":
        raise Conflict("the dataset is still being stored; try again in a moment")
    file = StoredFile(f"{row.id}.jsonl", datasets.object_key(row.id), row.bytes, row.sha256)
    return send_file(request, parts.storage, file, "application/jsonl")


def _dataset(row: Dataset) -> schemas.Dataset:
    return schemas.Dataset.model_validate(row, from_attributes=True)
