"""/base-models"""

from fastapi import APIRouter

from service import base_models, schemas
from service.api.errors import documented
from service.api.request import After, Caller, Inside, Limit
from service.models import BaseModel

router = APIRouter(prefix="/base-models", tags=["base models"])


@router.get("", summary="List base models", responses=documented(422))
def list_base_models(_: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.BaseModels:
    """The operator's catalogue: what the field `base_model` of a job can name."""
    with parts.database.reading() as session:
        rows, more = base_models.page(session, after, limit)
        return schemas.BaseModels.of([_base_model(row) for row in rows], more)


@router.get("/{base_model_id}", summary="Get a base model", responses=documented(404))
def get_base_model(_: Caller, parts: Inside, base_model_id: str) -> schemas.BaseModel:
    with parts.database.reading() as session:
        return _base_model(base_models.get(session, base_model_id))


def _base_model(row: BaseModel) -> schemas.BaseModel:
    return schemas.BaseModel(
        id=row.id,
        source=row.source,
        revision=row.revision,
        digest=row.digest,
        files=row.files,
        architecture=row.architecture,
        parameters=row.parameters,
        context_length=row.context_length,
        target_modules=sorted({module["name"].rsplit(".", 1)[-1] for module in row.modules if not module["head"]}),
        created_at=row.created_at,
    )
