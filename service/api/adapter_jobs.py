"""Work on adapters, as jobs: analyses, searches for weights, extractions, exports, verifications."""

from collections.abc import Callable, Sequence
from functools import partial

from fastapi import APIRouter, Response

from lora_engine.merging.config import MergeConfig
from lora_engine.merging.sources import Plan
from service import adapter_jobs, base_fit, schema_examples, schemas
from service.api.errors import documented
from service.api.jobs import submitted
from service.api.request import (
    Caller,
    IdempotencyHeader,
    Inside,
    JsonBody,
    Parts,
    PathBody,
    body_schema,
    idempotency,
    parse,
)
from service.jobs import Idempotency
from service.models import BaseModel
from service.sources import Source
from service.users import Principal

router = APIRouter(prefix="/adapters", tags=["adapters"])
_REFUSALS = documented(400, 404, 409, 413, 415, 422)


@router.post(
    "/analyze",
    status_code=202,
    summary="Compare adapters",
    responses=_REFUSALS,
    openapi_extra=body_schema(adapter_jobs.AnalyzeRequest, schema_examples.ANALYZE),
)
def analyze_adapters(
    caller: Caller, parts: Inside, body: JsonBody, response: Response, key: IdempotencyHeader = None
) -> schemas.Job:
    """Queue a report on how adapters would interfere in a merge: angles between them in all and by layer, norms, sign
    conflicts and what TIES would lose. Its artifact has `report.json`, and heat maps as PNG and SVG."""
    request = parse(adapter_jobs.AnalyzeRequest, body)
    known = idempotency(body, key)
    _check(parts, caller, request.adapters, known)
    with parts.database.unit_of_work() as session:
        result = adapter_jobs.submit_analysis(session, caller.user_id, request, known)
        return submitted(session, result, response)


@router.post(
    "/search-weights",
    status_code=202,
    summary="Find the weights of a stack",
    responses=_REFUSALS,
    openapi_extra=body_schema(adapter_jobs.SearchRequest, schema_examples.SEARCH),
)
def search_weights(
    caller: Caller, parts: Inside, body: JsonBody, response: Response, key: IdempotencyHeader = None
) -> schemas.Job:
    """Queue a search for the weights with which the adapters, stacked, have the lowest loss on a dataset. Its adapter
    is that stack; its metrics compare the best single adapter, equal weights and the weights that were found, on
    examples that nothing was chosen by."""
    request = parse(adapter_jobs.SearchRequest, body)
    known = idempotency(body, key)
    named = [Source(adapter=adapter) for adapter in request.adapters]
    _check(parts, caller, named, known, base_fit.check_search)
    with parts.database.unit_of_work() as session:
        result = adapter_jobs.submit_search(session, caller.user_id, request, known)
        return submitted(session, result, response)


@router.post(
    "/extract",
    status_code=202,
    summary="Extract an adapter from a tuned model",
    responses=_REFUSALS,
    openapi_extra=body_schema(adapter_jobs.ExtractRequest, schema_examples.EXTRACT),
)
def extract_adapter(
    caller: Caller, parts: Inside, body: JsonBody, response: Response, key: IdempotencyHeader = None
) -> schemas.Job:
    """Queue an extraction: the adapter that comes closest to the difference of two full models of the catalogue."""
    request = parse(adapter_jobs.ExtractRequest, body)
    with parts.database.unit_of_work() as session:
        result = adapter_jobs.submit_extraction(session, caller.user_id, request, idempotency(body, key))
        return submitted(session, result, response)


@router.post(
    "/{adapter_id}/export",
    status_code=202,
    summary="Export an adapter",
    responses=_REFUSALS,
    openapi_extra=body_schema(adapter_jobs.ExportRequest, schema_examples.EXPORT),
)
def export_adapter(
    caller: Caller,
    parts: Inside,
    adapter_id: str,
    body: JsonBody,
    response: Response,
    key: IdempotencyHeader = None,
) -> schemas.Job:
    """Queue an export: PEFT's layout, the whole model with the adapter in its weights, or a file for llama.cpp. The
    artifact is loaded again from its files and compared with base model and adapter as they were trained; where they
    differ by more than the limit, the job fails and says by how much."""
    request = parse(adapter_jobs.ExportRequest, body)
    known = idempotency(body, key)
    named = adapter_jobs.export_sources(adapter_id, request)
    inside = (parts.database, parts.storage, parts.settings)
    fits = partial(base_fit.check_export, request)
    adapter_jobs.check(*inside, caller.user_id, named, request.merge, known, param="others", first=-1, fits=fits)
    with parts.database.unit_of_work() as session:
        result = adapter_jobs.submit_export(session, caller.user_id, adapter_id, request, known)
        return submitted(session, result, response)


@router.post(
    "/{adapter_id}/verify", status_code=202, summary="Verify a merge", responses=documented(400, 404, 409, 422)
)
def verify_adapter(
    caller: Caller,
    parts: Inside,
    adapter_id: str,
    body: PathBody,
    response: Response,
    key: IdempotencyHeader = None,
) -> schemas.Job:
    """Queue a check: the certificate is computed again, from the adapters that the merge was made of."""
    with parts.database.unit_of_work() as session:
        result = adapter_jobs.submit_verification(session, caller.user_id, adapter_id, idempotency(body, key))
        return submitted(session, result, response)


def _check(
    parts: Parts,
    caller: Principal,
    named: Sequence[Source],
    known: Idempotency | None,
    fits: Callable[[BaseModel, Plan], None] | None = None,
) -> None:
    """That they can be stacked, and what else `fits` asks."""
    inside = (parts.database, parts.storage, parts.settings)
    adapter_jobs.check(*inside, caller.user_id, named, MergeConfig(), known, fits=fits)
