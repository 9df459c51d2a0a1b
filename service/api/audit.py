"""/audit: who did what, or was refused it."""

from fastapi import APIRouter

from service import account_schemas as schemas
from service import audit, models
from service.api.request import After, Caller, Inside, Limit

router = APIRouter(prefix="/audit", tags=["audit"])


@router.get("", summary="List audit entries")
def list_entries(caller: Caller, parts: Inside, after: After = None, limit: Limit = 20) -> schemas.AuditEntries:
    """What your keys did, newest first. An operator's key sees everybody's, and those of requests without a key."""
    is_operator = caller.scope == "admin"
    database = parts.database.of_everybody() if is_operator else parts.database
    with database.reading() as session:
        rows, more = audit.page(session, None if is_operator else caller.user_id, after, limit)
        return schemas.AuditEntries.of([_entry(row) for row in rows], more)


def _entry(row: models.AuditEntry) -> schemas.AuditEntry:
    return schemas.AuditEntry(
        id=row.id, created_at=row.created_at, request=row.request_id, user=row.user_id, key=row.key_id,
        address=row.address, action=row.action, target=row.object_id, status=row.status,
    )  # fmt: skip
