"""Users and their API keys. A key is 256 random bits; the database holds its SHA-256 only."""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from sqlalchemy import ColumnElement, bindparam, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lora_engine.fields import bounded, one_of
from service.db import newest, now
from service.errors import Conflict, Forbidden, NotFound, Unauthorized
from service.models import ApiKey, User, new_id

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)  # each may do what those before it may
MAX_LIVE_KEYS = 20  # of one user: enough for a rotation of each of several
_PREFIX = "luthier_"
_USE_SECONDS = 60.0  # how exactly it is known when a key was used last
_YEAR_SECONDS = 366 * 86400.0


@dataclass(frozen=True)
class Principal:
    """Who makes a request, and what the key allows; `is_stale`: that it is used now is to be noted."""

    user_id: str
    key_id: str
    scope: Scope
    is_stale: bool = False

    def require(self, scope: Scope) -> None:
        """Raises Forbidden."""
        if SCOPES.index(scope) > SCOPES.index(self.scope):
            message = f"this key's scope is {self.scope}, and this needs {scope}; use another key"
            raise Forbidden(message, code="insufficient_scope")


@dataclass(frozen=True, kw_only=True)
class KeyRequest:
    """The body of ``POST /keys``.

    Attributes:
        scope: "read" looks and downloads, "write" does everything with what is one's own, "admin" is the operator's.
        expires_in_seconds: after which the key opens nothing; never, when left out.
    """

    scope: Scope = "write"
    expires_in_seconds: float | None = None

    def __post_init__(self) -> None:
        one_of(self, "scope", SCOPES)
        if self.expires_in_seconds is not None:
            bounded(self, "expires_in_seconds", 1.0, 10 * _YEAR_SECONDS)


@dataclass(frozen=True, kw_only=True)
class RotationRequest:
    """The body of ``POST /keys/{key_id}/rotate``.

    Attributes:
        overlap_seconds: for which the old key still works beside the new one.
    """

    overlap_seconds: float = 86400.0

    def __post_init__(self) -> None:
        bounded(self, "overlap_seconds", 0.0, 30 * 86400.0)


def create_user(session: Session, name: str) -> User:
    """Raises Conflict when the name is taken."""
    user = User(id=new_id("user"), name=name)
    try:
        with session.begin_nested():
            session.add(user)
    except IntegrityError:
        raise Conflict(f"there is a user named {name!r} already", param="name") from None
    return user


def user_by_name(session: Session, name: str) -> User | None:
    return session.scalar(select(User).where(User.name == name))


def get_user(session: Session, user_id: str, *, keep: bool = False) -> User:
    """One user, also one who is being deleted; with `keep` nobody else changes the row before this transaction ends.

    Raises:
        NotFound.
    """
    rows = select(User).where(User.id == user_id)
    user = session.scalar(rows.with_for_update(key_share=True) if keep else rows)
    if user is None:
        raise NotFound(f"there is no user {user_id[:80]!r}")
    return user


def page(session: Session, after: str | None, limit: int) -> tuple[list[User], bool]:
    """All users, newest first, below the id `after`; and whether there are more."""
    rows = select(User)
    return newest(session, rows, User.id, after, limit)


def create_key(session: Session, user_id: str, request: KeyRequest | None = None) -> str:
    """A new key, returned this once."""
    return issue_key(session, user_id, request or KeyRequest())[1]


def issue_key(session: Session, user_id: str, request: KeyRequest, maker_id: str | None = None) -> tuple[ApiKey, str]:
    """A new key's row, and the key itself, which is returned this once. `maker_id`: of the key that asks for it.

    Raises:
        Conflict: the user has as many live keys as one may have, or is being deleted.
        Forbidden: it would outlive the key that asks.
    """
    user = get_user(session, user_id, keep=True)  # who counts keys at the same moment waits
    if user.deleted_at is not None:
        raise Conflict("the user is being deleted, and can have no new key", code="user_deleted")
    lifetime, left = request.expires_in_seconds, _left(session, maker_id)
    if left is not None and (lifetime is None or lifetime > left):
        message = f"this key ends in {left:.0f} seconds, and none that it makes may last longer; set expires_in_seconds"
        raise Forbidden(message, code="outlives_its_maker")
    if len(keys_of(session, user_id)) >= MAX_LIVE_KEYS:
        raise Conflict(f"there are {MAX_LIVE_KEYS} live keys; revoke one first", code="too_many_keys")
    # A fast hash is right here: 256 random bits cannot be guessed, unlike a password.
    key = _PREFIX + secrets.token_urlsafe(32)
    row = ApiKey(
        id=new_id("key"),
        user_id=user_id,
        sha256=_digest(key),
        hint=key[: len(_PREFIX) + 4],
        scope=request.scope,
        expires_at=None if request.expires_in_seconds is None else now() + request.expires_in_seconds,
    )
    session.add(row)
    session.flush()
    session.refresh(row)
    return row, key


def rotate_key(
    session: Session, user_id: str, key_id: str, request: RotationRequest, maker_id: str | None = None
) -> tuple[ApiKey, str]:
    """A new key of the same scope and length of life in the place of an old one, which works on for the overlap.

    It ends no later than the key that asks for it, `maker_id`, so that no key can make itself last.

    Raises:
        NotFound: no live key of this user.
        Conflict: as `issue_key`.
    """
    get_user(session, user_id, keep=True)
    old = session.scalar(select(ApiKey).where(ApiKey.id == key_id, ApiKey.user_id == user_id, *_live()))
    if old is None:
        raise NotFound(f"there is no live key {key_id[:80]!r}")
    own = None if old.expires_at is None else old.expires_at - old.created_at
    lifetime = min((seconds for seconds in (own, _left(session, maker_id)) if seconds is not None), default=None)
    ends = now() + request.overlap_seconds
    sooner = or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > ends)
    session.execute(update(ApiKey).where(ApiKey.id == key_id, sooner).values(expires_at=ends))
    scope: Scope = old.scope  # type: ignore[assignment]
    lasts = None if lifetime is None else max(1.0, lifetime)
    return issue_key(session, user_id, KeyRequest(scope=scope, expires_in_seconds=lasts))


def _left(session: Session, key_id: str | None) -> float | None:
    """Seconds after which a key opens nothing; None when it has no end."""
    return None if key_id is None else session.scalar(select(ApiKey.expires_at - now()).where(ApiKey.id == key_id))


def keys(session: Session) -> list[tuple[ApiKey, str]]:
    """Every key with its user's name."""
    rows = session.execute(select(ApiKey, User.name).join(User).order_by(ApiKey.id)).all()
    return [(row[0], row[1]) for row in rows]


def keys_of(session: Session, user_id: str) -> Sequence[ApiKey]:
    """A user's keys that open something, newest first, without the secrets, which nobody has but their holders."""
    rows = select(ApiKey).where(ApiKey.user_id == user_id, *_live())
    return session.scalars(rows.order_by(ApiKey.id.desc())).all()


def revoke_key(session: Session, key_id: str, user_id: str | None = None) -> Scope:
    """From the commit on the key opens nothing; its scope. With `user_id` only if it is this one's. Raises NotFound."""
    changed = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=now())
    if user_id is not None:
        changed = changed.where(ApiKey.user_id == user_id)
    row = session.execute(changed.returning(ApiKey.scope)).first()
    if row is None:
        raise NotFound(f"there is no live key {key_id[:80]!r}")
    scope: Scope = row.scope
    return scope


def authenticate(session: Session, key: str | None) -> Principal:
    """Who holds `key`. Unknown, revoked, expired and malformed ones get one answer, after the same work."""
    well_formed = key is not None and key.startswith(_PREFIX) and len(key) < 200 and key.isascii()
    sha256 = _digest(key if key is not None and well_formed else _PREFIX)
    row = session.execute(_HOLDER, {"sha256": sha256}).first()
    if row and well_formed:
        return Principal(row.user_id, row.id, row.scope, is_stale=row.is_stale)
    raise Unauthorized("a valid API key is needed: send it as 'Authorization: Bearer luthier_…'")


def note_use(session: Session, key_id: str) -> None:
    """The key was used just now; written at most once a minute."""
    session.execute(update(ApiKey).where(ApiKey.id == key_id, _STALE).values(last_used_at=now()))


def _live() -> tuple[ColumnElement[bool], ...]:
    return ApiKey.revoked_at.is_(None), or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > now())


# Put together once: every request asks this.
_STALE = func.coalesce(ApiKey.last_used_at, 0) < now() - _USE_SECONDS
_HOLDER = select(ApiKey.id, ApiKey.user_id, ApiKey.scope, _STALE.label("is_stale")).where(
    ApiKey.sha256 == bindparam("sha256"), *_live()
)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
