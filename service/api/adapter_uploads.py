"""POST /adapters: an adapter from elsewhere."""

from typing import Any

import anyio
from fastapi import APIRouter, Request, Response

from lora_engine import strict_json
from lora_engine.fields import from_mapping
from lora_engine.ingest_config import IngestConfig
from service import adapter_uploads, schemas, scratch
from service.adapter_uploads import Foreign, Upload
from service.api.errors import documented
from service.api.form import MAX_OWN_BYTES, Form, receive
from service.api.jobs import submitted
from service.api.request import Body, Caller, IdempotencyHeader, Inside, Parts, idempotency, media_type
from service.errors import Invalid, UnsupportedMedia
from service.jobs import Idempotency
from service.models import Job

router = APIRouter(prefix="/adapters", tags=["adapters"])


def _file(description: str) -> dict[str, str]:
    return {"type": "string", "format": "binary", "description": description}


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["base_model"],
                    "additionalProperties": False,
                    "properties": {
                        "base_model": {"type": "string", "description": "an id of the catalogue"},
                        "name": {"type": "string", "maxLength": 100},
                        "config": _file("adapter_config.json"),
                        "weights": _file("adapter_model.safetensors"),
                        "rank": {"type": "integer", "description": "of what has to be converted to low rank"},
                        "max_error": {"type": "number", "description": "relative, of such a conversion"},
                        "quantization": {
                            "type": "string",
                            "enum": ["none", "nf4", "int8"],
                            "description": "of the base model while the adapter was trained; exports go by it",
                        },
                        "initial_config": _file("of the adapter before training, which PiSSA and its kin need"),
                        "initial_weights": _file("of the same"),
                        "archive": _file("in place of the two: a tar that has both, without compression"),
                    },
                },
                "example": {"base_model": "smollm2-135m-instruct", "name": "from elsewhere", "archive": "adapter.tar"},
            }
        },
    }
}


@router.post(
    "",
    status_code=202,
    summary="Upload an adapter",
    responses=documented(400, 408, 413, 415, 422, 507),
    openapi_extra=_BODY,
)
async def upload_adapter(
    request: Request, caller: Caller, parts: Inside, response: Response, key: IdempotencyHeader = None
) -> schemas.Job:
    """Take in an adapter that PEFT wrote: `adapter_config.json` and `adapter_model.safetensors`, or a tar with both.
    Headers are checked while they arrive. The job then makes an adapter like any other of it: exactly, converted with a
    certificate, or refused with the reason."""
    if media_type(request) != "multipart/form-data":
        raise UnsupportedMedia("send a form with `base_model` and `config` and `weights`, or `archive`")
    with scratch.folder(parts.settings) as folder, Upload(parts.settings, folder) as upload:
        form = Form(
            request.headers["content-type"], ("base_model", "name", "rank", "max_error", "quantization"), upload.takers
        )
        await receive(request, form.write, parts.settings.max_upload_bytes + 2 * MAX_OWN_BYTES)
        form.finish()
        if (base_model := form.text("base_model")) is None:
            raise Invalid("base_model: is missing", param="base_model")
        archived = "archive" in form.seen
        if archived and {"config", "weights"} & set(form.seen):
            raise Invalid("archive: stands in the place of config and weights; send either", param="archive")
        config = _config(form)
        told, files = await anyio.to_thread.run_sync(lambda: upload.finish(config, archived=archived))
        foreign = Foreign(folder, files, told, base_model, form.text("name"), config)
        known = idempotency(Body({}, foreign.sha256), key)
        return await anyio.to_thread.run_sync(_submit, parts, caller.user_id, foreign, known, response)


def _config(form: Form) -> IngestConfig:
    """The engine's options, which a form has as texts."""
    values: dict[str, Any] = {}
    for field in ("rank", "max_error"):
        if (text := form.text(field)) is not None:
            try:
                values[field] = strict_json.loads(text)
            except strict_json.StrictJSONError:
                raise Invalid(f"{field}: {text[:40]!r} is no number", param=field) from None
    if (quantization := form.text("quantization")) is not None:
        values["quantization"] = quantization
    return from_mapping(IngestConfig, values)


def _submit(
    parts: Parts, owner_id: str, foreign: Foreign, known: Idempotency | None, response: Response
) -> schemas.Job:
    job, created = adapter_uploads.submit(parts.database, parts.storage, owner_id, foreign, known)
    with parts.database.reading() as session:
        return submitted(session, (session.get_one(Job, job.id), created), response)
