"""/keys: one's own, for looking or for all, to be replaced without a moment without one."""

from fastapi import APIRouter

from service import account_schemas as schemas
from service import models, users
from service.api.errors import documented
from service.api.request import Caller, Inside, JsonBody, body_schema, parse
from service.schemas import Deleted
from service.users import KeyRequest, RotationRequest

router = APIRouter(prefix="/keys", tags=["keys"])


@router.get("", summary="List your keys")
def list_keys(caller: Caller, parts: Inside) -> schemas.ApiKeys:
    with parts.database.reading() as session:
        return schemas.ApiKeys(data=[_key(row) for row in users.keys_of(session, caller.user_id)])


@router.post(
    "",
    status_code=201,
    summary="Make a key",
    responses=documented(400, 409, 413, 415),
    openapi_extra=body_schema(KeyRequest, {"scope": "read", "expires_in_seconds": 7776000.0}),
)
def create_key(caller: Caller, parts: Inside, body: JsonBody) -> schemas.NewApiKey:
    """One more key for yourself, of no wider scope and no longer life than the one that asks. Its secret is in this
    answer alone."""
    request = parse(KeyRequest, body)
    caller.require(request.scope)
    with parts.database.unit_of_work() as session:
        return new_key(*users.issue_key(session, caller.user_id, request, caller.key_id))


@router.post(
    "/{key_id}/rotate",
    status_code=201,
    summary="Replace a key",
    responses=documented(400, 404, 409, 413, 415),
    openapi_extra=body_schema(RotationRequest, {"overlap_seconds": 86400.0}),
)
def rotate_key(caller: Caller, parts: Inside, key_id: str, body: JsonBody) -> schemas.NewApiKey:
    """A new key of the same scope and length of life, though it ends no later than the key that asks. The old one
    works on for the overlap, so that everything that uses it can be told the new one meanwhile."""
    request = parse(RotationRequest, body)
    with parts.database.unit_of_work() as session:
        row, key = users.rotate_key(session, caller.user_id, key_id, request, caller.key_id)
        caller.require(row.scope)  # type: ignore[arg-type] # the column holds nothing else
        return new_key(row, key)


@router.delete("/{key_id}", summary="Revoke a key", responses=documented(404))
def revoke_key(caller: Caller, parts: Inside, key_id: str) -> Deleted:
    """It opens nothing from now on. A key of a wider scope than the one that asks stays."""
    with parts.database.unit_of_work() as session:
        caller.require(users.revoke_key(session, key_id, caller.user_id))
    return Deleted(id=key_id, object="api_key")


def new_key(row: models.ApiKey, key: str) -> schemas.NewApiKey:
    return schemas.NewApiKey(**_key(row).model_dump(), key=key)


def _key(row: models.ApiKey) -> schemas.ApiKey:
    return schemas.ApiKey.model_validate(row, from_attributes=True)
