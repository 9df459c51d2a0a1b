"""Erasing a dataset with all that was made of it, and the receipts of what was erased."""

from typing import Literal

from fastapi import APIRouter, Response

from service import account_schemas as schemas
from service import erasure, models
from service.api.errors import documented
from service.api.request import After, Caller, Inside, Limit
from service.users import Principal

router = APIRouter(tags=["erasures"])


@router.post(
    "/datasets/{dataset_id}/erase",
    status_code=202,
    summary="Erase a dataset and its lineage",
    responses=documented(404, 409, 507),
)
def erase_dataset(caller: Caller, parts: Inside, dataset_id: str, response: Response) -> schemas.Erasure:
    """The dataset, every job that used it, and all that came of them: checkpoints, adapters, merges of those, exports,
    events, files. Jobs that have not ended are cancelled; while a worker still holds one the answer is 202, and the
    rest follows by itself. What is erased cannot be had back."""
    database = parts.database.of_everybody()
    with parts.database.unit_of_work() as session:
        order_id = erasure.order_dataset(session, caller.user_id, dataset_id).id
    return erasure_object(erasure.work(database, parts.storage, order_id), response)


@router.get("/erasures", summary="List erasures")
def list_erasures(caller: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.Erasures:
    """Yours; everybody's for an operator."""
    database = parts.database.of_everybody() if caller.scope == "admin" else parts.database
    with database.reading() as session:
        rows, more = erasure.page(session, _whose(caller), after, limit)
        return schemas.Erasures.of([_erasure(row) for row in rows], more)


@router.get("/erasures/{erasure_id}", summary="Get an erasure", responses=documented(404))
def get_erasure(caller: Caller, parts: Inside, erasure_id: str) -> schemas.Erasure:
    """Yours; anybody's for an operator, also when the user is gone."""
    database = parts.database.of_everybody() if caller.scope == "admin" else parts.database
    with database.reading() as session:
        return _erasure(erasure.get(session, _whose(caller), erasure_id))


def erasure_object(row: models.Erasure, response: Response) -> schemas.Erasure:
    """The answer to an order: 200 when everything is gone already."""
    if row.finished_at is not None:
        response.status_code = 200
    return _erasure(row)


def _whose(caller: Principal) -> str | None:
    return None if caller.scope == "admin" else caller.user_id


def _erasure(row: models.Erasure) -> schemas.Erasure:
    kind: Literal["user", "dataset"] = row.kind  # type: ignore[assignment]
    return schemas.Erasure(
        id=row.id, kind=kind, subject=row.subject_id, created_at=row.created_at, finished_at=row.finished_at,
        receipt=row.receipt,
    )  # fmt: skip
