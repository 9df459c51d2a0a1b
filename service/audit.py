"""The audit log: one row for each request that changes something or is refused for who makes it. Only ever added to.

A row is written right after the change and before the answer, in a transaction of its own; that of a submitted job, in
the job's. It is lost only if the process dies or the database fails in between; in the second case the process's log
has it. It holds ids, an address and an outcome, and nothing that was sent; whatever a client chose is escaped to
printable ASCII.
"""

from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.orm import Session

from service.db import newest
from service.models import AuditEntry, new_id


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What happened. `action` is the method and the route, `object_id` the ids of what it was done to."""

    request_id: str
    user_id: str | None
    key_id: str | None
    address: str
    action: str
    object_id: str | None
    status: int


def append(session: Session, entry: Entry) -> None:
    values: dict[str, Any] = asdict(entry)
    values["request_id"] = _printable(entry.request_id, 64)
    values["address"] = _printable(entry.address, 64)
    values["action"] = _printable(entry.action, 200)
    values["object_id"] = None if entry.object_id is None else _printable(entry.object_id, 200)
    session.execute(insert(AuditEntry.__table__).values(id=new_id("audit"), **values))  # type: ignore[arg-type]


def page(session: Session, user_id: str | None, after: str | None, limit: int) -> tuple[list[AuditEntry], bool]:
    """What one user's keys did, or everybody's, newest first, below the id `after`; and whether there is more."""
    rows = select(AuditEntry)
    if user_id is not None:
        rows = rows.where(AuditEntry.user_id == user_id)
    return newest(session, rows, AuditEntry.id, after, limit)


def _printable(text: str, length: int) -> str:
    """On one line, whatever it was (CR and LF forge lines in logs, bidirectional marks their order)."""
    return text.encode("unicode_escape").decode("ascii")[:length]
