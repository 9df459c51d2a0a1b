"""/users: for operators, who see everybody's. A key of the scope "admin" is made at the console."""

from dataclasses import dataclass

from fastapi import APIRouter, Response
from sqlalchemy.orm import Session

from lora_engine.fields import bounded
from service import account_schemas as schemas
from service import erasure, jobs, models, quotas, users
from service.api.erasures import erasure_object
from service.api.errors import documented
from service.api.keys import new_key
from service.api.request import After, Caller, Everybody, Inside, JsonBody, Limit, body_schema, parse
from service.errors import Conflict
from service.users import KeyRequest

router = APIRouter(prefix="/users", tags=["users"], responses=documented(403))
_MOST = 2**53


@dataclass(frozen=True, kw_only=True)
class UserRequest:
    """The body of ``POST /users``.

    Attributes:
        name: nobody else's; for the operator's eyes.
    """

    name: str

    def __post_init__(self) -> None:
        jobs.check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class LimitsRequest:
    """The body of ``PUT /users/{user_id}/limits``: all three, those that are left out go back to the settings'.

    Attributes:
        unfinished_jobs: queued, paused and running.
        running_jobs: at once; 0 for any number.
        stored_bytes: of datasets, adapters and artifacts.
    """

    unfinished_jobs: int | None = None
    running_jobs: int | None = None
    stored_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("unfinished_jobs", "running_jobs", "stored_bytes"):
            if getattr(self, name) is not None:
                bounded(self, name, 0, _MOST)


@router.get("", summary="List users")
def list_users(database: Everybody, after: After = None, limit: Limit = 20) -> schemas.Users:
    with database.reading() as session:
        rows, more = users.page(session, after, limit)
        return schemas.Users.of([_user(session, row) for row in rows], more)


@router.post(
    "",
    status_code=201,
    summary="Add a user",
    responses=documented(400, 409, 413, 415),
    openapi_extra=body_schema(UserRequest, {"name": "ann"}),
)
def create_user(database: Everybody, body: JsonBody) -> schemas.NewUser:
    """Somebody with data of their own, and a first key for them."""
    request = parse(UserRequest, body)
    with database.unit_of_work() as session:
        row = users.create_user(session, request.name)
        session.refresh(row)
        key = new_key(*users.issue_key(session, row.id, KeyRequest()))
        return schemas.NewUser(**_user(session, row).model_dump(), key=key)


@router.get("/{user_id}", summary="Get a user", responses=documented(404))
def get_user(database: Everybody, user_id: str) -> schemas.User:
    with database.reading() as session:
        return _user(session, users.get_user(session, user_id))


@router.put(
    "/{user_id}/limits",
    summary="Limit a user",
    responses=documented(400, 404, 413, 415),
    openapi_extra=body_schema(LimitsRequest, {"unfinished_jobs": 100, "running_jobs": 2}),
)
def put_limits(database: Everybody, user_id: str, body: JsonBody) -> schemas.User:
    """How much one user may have. Nothing that is there is taken away."""
    request = parse(LimitsRequest, body)
    with database.unit_of_work() as session:
        row = users.get_user(session, user_id, keep=True)
        row.max_unfinished_jobs, row.max_running_jobs = request.unfinished_jobs, request.running_jobs
        row.max_stored_bytes = request.stored_bytes
        session.flush()
        return _user(session, row)


@router.delete("/{user_id}", status_code=202, summary="Erase a user", responses=documented(404, 409, 507))
def delete_user(
    caller: Caller, database: Everybody, parts: Inside, user_id: str, response: Response
) -> schemas.Erasure:
    """Their keys open nothing any more, their jobs are cancelled, and everything of theirs is removed: at once (200),
    or as soon as no worker holds a job of theirs (202). The receipt says what is gone."""
    if user_id == caller.user_id:
        raise Conflict("this key is of that very user; use another operator's", code="own_user")
    with database.unit_of_work() as session:
        order_id = erasure.order_user(session, user_id).id
    return erasure_object(erasure.work(database, parts.storage, order_id), response)


def _user(session: Session, row: models.User) -> schemas.User:
    limits = schemas.Limits(
        unfinished_jobs=row.max_unfinished_jobs, running_jobs=row.max_running_jobs, stored_bytes=row.max_stored_bytes
    )
    usage = schemas.Usage(
        unfinished_jobs=quotas.unfinished(session, row.id),
        running_jobs=quotas.running(session, row.id),
        stored_bytes=quotas.stored_bytes(session, row.id),
    )
    deleting = row.deleted_at is not None
    return schemas.User(
        id=row.id, name=row.name, created_at=row.created_at, deleting=deleting, limits=limits, usage=usage
    )
