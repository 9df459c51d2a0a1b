"""/adapters/aliases: names that stand for adapters, and that can be moved from one to the next."""

from dataclasses import dataclass

from fastapi import APIRouter

from service import adapters, schema_examples, schemas
from service.api.errors import documented
from service.api.request import Caller, Inside, JsonBody, body_schema, parse
from service.models import AdapterAlias

router = APIRouter(prefix="/adapters/aliases", tags=["adapters"])


@dataclass(frozen=True, kw_only=True)
class AliasRequest:
    """The body of ``PUT /adapters/aliases/{alias}``: the adapter's id, or another alias of it."""

    adapter: str


@router.get("", summary="List aliases")
def list_aliases(caller: Caller, parts: Inside) -> schemas.Aliases:
    with parts.database.reading() as session:
        return schemas.Aliases(data=[_alias(row) for row in adapters.aliases(session, caller.user_id)])


@router.put(
    "/{alias}",
    summary="Name an adapter",
    responses=documented(400, 404, 413, 415),
    openapi_extra=body_schema(AliasRequest, {"adapter": schema_examples.ADAPTER["id"]}),
)
def put_alias(caller: Caller, parts: Inside, alias: str, body: JsonBody) -> schemas.Alias:
    """From now on the alias stands for this adapter, wherever an id is asked for. It may have stood for another one:
    who uses the alias then gets the new one with the next request, and jobs that were queued keep the old one."""
    request = parse(AliasRequest, body)
    with parts.database.unit_of_work() as session:
        return _alias(adapters.set_alias(session, caller.user_id, alias, request.adapter))


@router.delete("/{alias}", summary="Remove an alias", responses=documented(404))
def delete_alias(caller: Caller, parts: Inside, alias: str) -> schemas.Deleted:
    """The adapter stays."""
    with parts.database.unit_of_work() as session:
        adapters.remove_alias(session, caller.user_id, alias)
    return schemas.Deleted(id=alias, object="adapter.alias")


def _alias(row: AdapterAlias) -> schemas.Alias:
    return schemas.Alias(alias=row.alias, adapter=row.adapter_id)
